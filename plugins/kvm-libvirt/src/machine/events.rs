//! Events: those of the machine's domain, and those of the connection.
//!
//! An event may belong to the operation under way, to hidden work, or to neither. Only in the last case the
//! host gets it as a change by itself. While a start is under way its events are steps of the start.

use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, State};
use machinery_backend::Operation;
use virt::connect::Connect;
use virt::domain::Domain;

use super::base::Machine;
use super::state::{Activity, is_hidden};
use crate::domain;
use crate::events::Event;
use crate::states::{StateReport, is_end, is_revert_step, is_save, is_start, state_of_event};

/// The time that libvirt has to report the state of a domain whose end is in doubt.
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);

impl Machine {
    /// Handles an event of the machine's domain.
    pub fn on_event(self: &Arc<Self>, event: Event) {
        if event == Event::Reset {
            return self.on_reset();
        }
        let Some(report) = state_of_event(&event) else { return };
        let mut state = self.lock();
        let (operation, hidden) = (state.operation(), is_hidden(&state));
        if operation == Operation::Starting {
            state.start_event = Some(report.clone());
        }
        let is_foreign = operation == Operation::Idle && !hidden && !state.has_run;
        state.was_saved |= is_save(&event) && state.run_disks.is_some();
        state.awaits_start &= !is_start(&event);
        let may_be_late = state.awaits_start && state.has_run && operation == Operation::Idle && !hidden;
        drop(state);
        if may_be_late && is_end(&event) {
            return self.on_doubtful_end(report);
        }
        if is_foreign && is_start(&event) {
            self.on_foreign_start();
        }
        match is_end(&event) {
            _ if hidden => self.on_hidden_event(&event, &report),
            true => self.on_end(operation, report),
            false => self.report(operation, report),
        }
        if hidden && is_end(&event) {
            self.signal_end();
        }
    }

    /// Reports the end of a run, except during a start, which handles the end of its run itself. A run that
    /// ended by itself is closed before the report: its receiver may use the machine at once.
    /// The end of a stopped run is reported first, so that the stop does not return before the report.
    fn on_end(&self, operation: Operation, report: StateReport) {
        self.close_run_unless_starting();
        if operation == Operation::Stopping {
            self.report(operation, report);
            self.signal_end();
        } else {
            self.signal_end();
            self.report(operation, report);
        }
    }

    /// Handles an end before the event of the run's start: it may be that of an earlier run. Only libvirt knows that, which a
    /// thread of its own asks.
    fn on_doubtful_end(self: &Arc<Self>, report: StateReport) {
        let machine = Arc::clone(self);
        let asked = self.connection.calls().start(move || {
            machine.end_if_off(report);
            Ok(())
        });
        if let Err(error) = asked {
            tracing::error!(machine = self.name(), %error, "an end of the domain is not handled");
        }
    }

    fn end_if_off(&self, report: StateReport) {
        let before = self.activity();
        match self.query_state(Deadline::after(LOOK_TIMEOUT)) {
            // An action came meanwhile, and its outcome is newer.
            _ if self.activity() != before => {}
            Ok((State::Poweroff, _)) => self.on_end(before.operation, report),
            Ok(_) => tracing::debug!(machine = self.name(), "a late end of an earlier run"),
            Err(error) => {
                tracing::warn!(machine = self.name(), %error, "an end is reported, but the domain's state is unknown");
            }
        }
    }

    /// Records that somebody else has started the domain.
    fn on_foreign_start(&self) {
        match self.marker.set_aside_if_elsewhere() {
            Ok(()) => self.marker.remove(),
            Err(error) => tracing::warn!(machine = self.name(), %error, "a run marker remains"),
        }
        self.lock().only_own_runs = false;
    }

    /// Handles a reset, which boots the guest again. A standby, or a domain that is about to be resumed, has
    /// lost its snapshot's state. A guest that runs may reboot.
    fn on_reset(self: &Arc<Self>) {
        let hidden = {
            let mut state = self.lock();
            state.was_reset = true;
            is_hidden(&state)
        };
        if hidden {
            self.replace_standby("somebody has reset the standby");
        }
    }

    /// Handles an event of a hidden domain, which is reported as powered off. Any event but a step of the
    /// revert makes the standby unusable.
    fn on_hidden_event(self: &Arc<Self>, event: &Event, (state, reason): &StateReport) {
        tracing::debug!(machine = self.name(), %state, reason, "an event of a hidden domain");
        if !is_revert_step(event) {
            self.replace_standby(&format!("the standby is {state} by itself: {reason}"));
        }
    }

    /// Handles the loss of the connection: the events of the domain are lost until it is back.
    pub fn on_connection_lost(&self, why: &str) {
        // No event reports meanwhile that somebody starts the domain, or that its own start is done.
        {
            let mut state = self.lock();
            (state.only_own_runs, state.awaits_start) = (false, false);
        }
        if self.has_run() {
            self.report_state(State::Error, why);
        }
        self.invalidate_standby(why);
    }

    /// Handles a connection that is open again: queries the domain's state.
    pub fn on_reconnected(self: &Arc<Self>, connect: &Connect) {
        self.renew_standby();
        let before @ Activity { has_run, operation, .. } = self.activity();
        if operation == Operation::Starting {
            return;
        }
        if !has_run {
            return self.report_unseen_off(connect, before);
        }
        let query = |domain: Domain| Ok((domain::state(&domain)?, self.marker.matches(&domain)?));
        let state = domain::domain(connect, self.label()).and_then(query);
        if self.activity() != before {
            // An action came meanwhile, and its outcome is newer.
            return;
        }
        match state {
            Ok((report, true)) => self.report(operation, report),
            Ok((report, false)) => self.on_unseen_end(operation, report),
            Err(error) => {
                tracing::warn!(machine = self.name(), %error, "libvirt is back, but the domain's state is unknown");
            }
        }
    }

    /// Reports that the domain is off, if libvirt was away when the host started: the host does not know it then.
    fn report_unseen_off(&self, connect: &Connect, before: Activity) {
        if !self.connection.was_unreachable() {
            return;
        }
        let state = domain::domain(connect, self.label()).and_then(|domain| domain::state(&domain));
        if self.activity() == before && matches!(state, Ok((State::Poweroff, _))) {
            self.report_state(State::Poweroff, "");
        }
    }

    /// Records that the own run ended while libvirt was away. The domain's current state may be that of
    /// somebody else's run.
    fn on_unseen_end(&self, operation: Operation, report: StateReport) {
        self.lock().run_disks = None;
        self.on_end(operation, (State::Poweroff, "it ended while libvirt was away".to_owned()));
        if report.0 != State::Poweroff {
            self.report(operation, report);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::lab::{MachineLab, StateChange, destroyed, lifecycle, soon, started};
    use crate::test_driver::connect;
    use virt_sys as sys;

    fn saved() -> Event {
        lifecycle(sys::VIR_DOMAIN_EVENT_STOPPED, sys::VIR_DOMAIN_EVENT_STOPPED_SAVED)
    }

    fn failed() -> Event {
        lifecycle(sys::VIR_DOMAIN_EVENT_SUSPENDED, sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR)
    }

    fn change(state: State, reason: &str, ends: u64) -> StateChange {
        StateChange { state, reason: reason.to_owned(), ends }
    }

    #[test]
    fn event_of_a_run_is_reported_with_its_reason() {
        let lab = MachineLab::new("events-run");
        lab.run();
        lab.machine.on_event(Event::Reset);
        lab.machine.on_event(lifecycle(sys::VIR_DOMAIN_EVENT_DEFINED, 0));
        lab.machine.on_event(started());
        assert_eq!(lab.host.changes(), [], "a guest may reboot, and the host knows that it runs");
        lab.machine.on_event(failed());
        assert_eq!(
            lab.host.changes(),
            [change(State::Error, "the guest is paused because its disk failed", 0)]
        );
        assert!(lab.machine.lock().start_event.is_none() && lab.machine.has_run());
    }

    #[test]
    fn run_that_ends_by_itself_is_closed_before_its_report() {
        let lab = MachineLab::new("events-end");
        lab.run();
        lab.machine.on_event(destroyed());
        assert_eq!(lab.host.changes(), [change(State::Poweroff, "the domain was destroyed", 1)]);
        let state = lab.machine.lock();
        assert!(!state.has_run && state.run_disks.is_none() && state.only_own_runs);
        assert_eq!((state.end_count, state.was_saved), (1, false));
        drop(state);
        assert!(!lab.machine.marker.exists());
    }

    #[test]
    fn end_of_a_stopped_run_is_reported_before_the_stop_returns() {
        let lab = MachineLab::new("events-stop");
        lab.run();
        let stopping = lab.machine.begin(Operation::Stopping, soon()).unwrap();
        lab.machine.on_event(lifecycle(sys::VIR_DOMAIN_EVENT_SHUTDOWN, 0));
        lab.machine.on_event(destroyed());
        assert_eq!(lab.host.changes(), [change(State::Poweroff, "", 0)]);
        assert_eq!(lab.machine.lock().end_count, 1);
        assert!(!lab.machine.has_run());
        drop(stopping);
    }

    #[test]
    fn event_of_a_start_is_a_step_of_it() {
        let lab = MachineLab::new("events-start");
        let starting = lab.machine.begin(Operation::Starting, soon()).unwrap();
        lab.machine.lock().only_own_runs = true;
        lab.machine.on_event(started());
        assert!(lab.machine.lock().only_own_runs, "the host starts the domain");
        lab.run();
        assert_eq!(lab.machine.lock().start_event.as_ref().map(|(state, _)| *state), Some(State::Running));
        lab.machine.on_event(destroyed());
        assert_eq!(lab.machine.lock().start_event.as_ref().map(|(state, _)| *state), Some(State::Poweroff));
        assert_eq!(lab.machine.lock().end_count, 1);
        assert!(lab.machine.has_run() && lab.machine.marker.exists(), "the start handles the end of its run");
        assert_eq!(lab.host.changes(), []);
        drop(starting);
    }

    /// The event was read before the start began.
    #[test]
    fn late_end_of_an_earlier_run_does_not_close_the_start_that_has_begun() {
        let lab = MachineLab::new("events-late");
        let starting = lab.machine.begin(Operation::Starting, soon()).unwrap();
        lab.machine.begin_marker(&lab.domain.domain).unwrap();
        lab.machine.lock().has_run = true;
        lab.machine.on_end(Operation::Idle, (State::Poweroff, String::new()));
        assert!(lab.machine.marker.exists() && lab.machine.has_run());
        drop(starting);
        lab.machine.on_end(Operation::Idle, (State::Poweroff, String::new()));
        assert!(!lab.machine.marker.exists() && !lab.machine.has_run());
    }

    /// The event was read after the next start has returned.
    #[test]
    fn late_end_of_an_earlier_run_does_not_close_the_run_that_has_started() {
        let lab = MachineLab::new("events-later");
        lab.run();
        lab.machine.lock().awaits_start = true;
        lab.machine.end_if_off((State::Poweroff, String::new()));
        assert!(lab.machine.has_run() && lab.machine.marker.exists() && lab.host.changes().is_empty());
        lab.machine.on_event(destroyed());
        lab.machine.on_event(started());
        assert!(lab.machine.has_run() && lab.machine.marker.exists());
        assert!(!lab.machine.lock().awaits_start);
        lab.domain.domain.destroy().unwrap();
        let before = lab.machine.lock().end_count;
        lab.machine.lock().awaits_start = true;
        lab.machine.on_event(destroyed());
        assert!(lab.machine.wait_for_end(before, soon()), "the event was that of this run");
        assert!(!lab.machine.has_run() && !lab.machine.marker.exists());
    }

    #[test]
    fn run_that_was_saved_keeps_its_marker() {
        let lab = MachineLab::new("events-saved");
        lab.run();
        lab.machine.on_event(saved());
        assert!(lab.machine.lock().was_saved && lab.machine.marker.exists());
        // The run of somebody else.
        lab.machine.on_event(started());
        assert!(!lab.machine.marker.exists());
        lab.machine.lock().was_saved = false;
        lab.machine.on_event(saved());
        assert!(!lab.machine.lock().was_saved);
    }

    #[test]
    fn start_by_somebody_else_is_remembered() {
        let lab = MachineLab::new("events-foreign");
        let only_own_runs = |event| {
            lab.machine.lock().only_own_runs = true;
            lab.machine.on_event(event);
            lab.machine.lock().only_own_runs
        };
        assert!(only_own_runs(destroyed()));
        assert!(!only_own_runs(started()));
        assert_eq!(lab.host.states(), [State::Poweroff, State::Running]);
        lab.run();
        assert!(only_own_runs(started()) && lab.machine.marker.exists());
        let stopping = lab.machine.begin(Operation::Stopping, soon()).unwrap();
        lab.machine.lock().has_run = false;
        assert!(only_own_runs(started()), "the stop ends that domain");
        drop(stopping);
    }

    #[test]
    fn steps_of_a_revert_do_not_replace_a_standby() {
        let lab = MachineLab::new("events-steps");
        lab.prepare();
        lab.machine.lock().only_own_runs = true;
        lab.machine.on_event(started());
        lab.machine
            .on_event(lifecycle(sys::VIR_DOMAIN_EVENT_SUSPENDED, sys::VIR_DOMAIN_EVENT_SUSPENDED_PAUSED));
        let state = lab.machine.lock();
        assert!(state.standby.as_ref().is_some_and(|standby| standby.unusable.is_none()));
        assert!(state.only_own_runs && state.end_count == 0);
        drop(state);
        assert!(lab.machine.marker.exists() && !lab.host.was_invalidated());
        assert_eq!(lab.host.changes(), []);
    }

    #[test]
    fn standby_is_replaced_when_it_does_not_stay_as_it_is() {
        for (name, event, expected) in [
            ("events-failed", failed(), "the standby is error by itself: the guest is paused because"),
            ("events-ended", destroyed(), "the standby is poweroff by itself: the domain was destroyed"),
            ("events-reset", Event::Reset, "somebody has reset the standby"),
        ] {
            let lab = MachineLab::new(name);
            lab.prepare();
            let is_end = event == destroyed();
            lab.machine.on_event(event);
            assert!(!is_end || lab.machine.lock().end_count >= 1);
            let reason = lab.host.wait_for_invalidation();
            assert!(reason.starts_with(expected), "{reason}");
            assert_eq!(lab.host.changes(), [], "the host does not see a standby");
            assert!(lab.machine.lock().standby.is_none() && !lab.machine.marker.exists());
        }
    }

    #[test]
    fn run_has_an_error_while_its_connection_is_lost() {
        let lab = MachineLab::new("events-lost");
        lab.machine.lock().only_own_runs = true;
        lab.machine.on_connection_lost("libvirtd has ended");
        assert!(!lab.machine.lock().only_own_runs);
        assert_eq!(lab.host.changes(), [], "the machine is off");
        lab.run();
        lab.machine.on_connection_lost("libvirtd has ended");
        assert_eq!(lab.host.changes(), [change(State::Error, "libvirtd has ended", 0)]);
        lab.machine.on_reconnected(&connect());
        assert_eq!(lab.host.changes(), [change(State::Running, "", 0)]);
        let _starting = lab.machine.begin(Operation::Starting, soon()).unwrap();
        lab.machine.lock().host_knows_running = false;
        lab.machine.on_reconnected(&connect());
        assert_eq!(lab.host.changes(), [], "the start itself reports the state");
    }

    #[test]
    fn standby_is_replaced_when_its_connection_was_lost() {
        let lab = MachineLab::new("events-renewed");
        lab.prepare();
        lab.machine.on_connection_lost("libvirtd has ended");
        let unusable = lab.machine.lock().standby.as_ref().and_then(|standby| standby.unusable.clone());
        assert_eq!(unusable.as_deref(), Some("libvirtd has ended"));
        lab.machine.on_reconnected(&connect());
        assert_eq!(lab.host.wait_for_invalidation(), "libvirtd has ended meanwhile");
        assert_eq!(lab.host.changes(), []);
    }

    #[test]
    fn run_that_has_ended_without_an_event_is_reported_after_the_reconnection() {
        let lab = MachineLab::new("events-unseen");
        lab.run();
        lab.domain.domain.destroy().unwrap();
        lab.machine.on_reconnected(&connect());
        let ended = "it ended while libvirt was away";
        assert_eq!(lab.host.changes(), [change(State::Poweroff, ended, 1)]);
        assert!(!lab.machine.has_run());
        lab.machine.on_reconnected(&connect());
        assert_eq!(lab.host.changes(), [], "there is no run any more");
        lab.run();
        lab.domain.domain.destroy().unwrap();
        lab.domain.start();
        lab.machine.on_reconnected(&connect());
        let states = lab.host.states();
        assert_eq!(states, [State::Poweroff, State::Running], "somebody else has started the domain");
        assert!(!lab.machine.has_run() && !lab.machine.lock().only_own_runs);
    }
}
