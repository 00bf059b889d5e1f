//! Events: those of the machine's domain, and those of the connection.
//!
//! An event may belong to the operation under way, to hidden work, or to neither. Only in the last case the
//! host gets it as a change by itself. While a start is under way its events are steps of the start.

use std::sync::Arc;

use machinery::State;
use machinery_backend::Operation;
use virt::connect::Connect;
use virt::domain::Domain;

use super::base::Machine;
use super::state::{Activity, is_hidden};
use crate::domain;
use crate::events::Event;
use crate::states::{StateReport, is_end, is_revert_step, is_save, is_start, state_of_event};

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
        drop(state);
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
        if operation != Operation::Starting {
            self.close_run();
        }
        if operation == Operation::Stopping {
            self.report(operation, report);
            self.signal_end();
        } else {
            self.signal_end();
            self.report(operation, report);
        }
    }

    /// Records that somebody else has started the domain.
    fn on_foreign_start(&self) {
        self.marker.remove();
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
        // No event reports meanwhile that somebody starts the domain.
        self.lock().only_own_runs = false;
        if self.has_run() {
            self.report_state(State::Error, why);
        }
        self.invalidate_standby(why);
    }

    /// Handles a connection that is open again: queries the domain's state.
    pub fn on_reconnected(self: &Arc<Self>, connect: &Connect) {
        self.renew_standby();
        let before @ Activity { has_run, operation, .. } = self.activity();
        if !has_run || operation == Operation::Starting {
            return;
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
