//! A machine's way into its quarantine and out of it: applies the rules of [`quarantine`](super::quarantine), and
//! sends the events.

use std::sync::MutexGuard;
use std::time::Duration;

use machinery::{ErrorKind, State};
use tokio::time::Instant;

use super::Machine;
use super::quarantine::{Consequence, Quarantine, consequence, is_plugin_fault, unix_now};
use super::status::Status;
use crate::config::Heal;
use crate::events::Event;

/// A healed machine: the number of tries, and the time since its failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Healed {
    /// The number of tries, with the one that succeeded.
    pub tries: u32,
    /// The time in quarantine.
    pub took: Duration,
}

impl Machine {
    /// Takes the machine out of the pool after a failure of this kind. An operator's disable stays as it is, unless
    /// the failure disables the machine too.
    pub fn take_out(&self, kind: ErrorKind, reason: &str, heal: Heal) {
        let mut status = self.lock_status();
        status.started_well = false;
        if choose(&mut status, kind, heal) == Consequence::Disable {
            drop(status);
            return self.disable(reason);
        }
        if status.availability.disabled.is_some() {
            return;
        }
        self.enter_quarantine(status, reason);
    }

    fn enter_quarantine(&self, mut status: MutexGuard<'_, Status>, reason: &str) {
        let machine = self.name();
        if let Some(quarantine) = &mut status.availability.quarantine {
            // A client has used the machine meanwhile. The tries go on as planned.
            quarantine.reason = reason.to_owned();
        } else {
            let quarantine = Quarantine::new(reason);
            let next_try_in = quarantine.next_try_in();
            tracing::error!(machine, reason, next_try_in, "machine in quarantine");
            status.availability.quarantine = Some(quarantine);
            self.events.send(Event::Disabled { machine: machine.to_owned(), reason: reason.to_owned() });
        }
        self.send_quarantined(&status);
        self.notify_idle_work();
    }

    fn send_quarantined(&self, status: &Status) {
        if let Some(quarantine) = &status.availability.quarantine {
            self.events.send(Event::Quarantined {
                machine: self.name().to_owned(),
                reason: quarantine.reason.clone(),
                tries: quarantine.tries,
                next_try_in: quarantine.next_try_in(),
            });
        }
    }

    /// Returns the time of the next try, unless the machine is not in quarantine, or must be left alone: a task or a
    /// command has it, its plugin cannot use it, or it runs for somebody.
    pub fn next_try(&self) -> Option<Instant> {
        let status = self.lock_status();
        let availability = &status.availability;
        let runs = !matches!(status.state, State::Poweroff | State::Error);
        let is_needed = availability.lock.is_some()
            || availability.held.is_some()
            || availability.unusable.is_some()
            || runs && (status.started_well || !status.own_run);
        let quarantine = availability.quarantine.as_ref().filter(|quarantine| !quarantine.is_left_alone);
        quarantine.filter(|_| !is_needed).map(|quarantine| quarantine.next_try)
    }

    /// Records a failed try. The machine stays in quarantine until the next one, or is disabled.
    pub fn try_failed(&self, kind: ErrorKind, reason: &str, heal: Heal) {
        let mut status = self.lock_status();
        if choose(&mut status, kind, heal) == Consequence::Disable {
            drop(status);
            return self.disable(reason);
        }
        if status.availability.disabled.is_some() {
            return;
        }
        let Some(quarantine) = &mut status.availability.quarantine else {
            // An operator has enabled it during the try.
            return self.enter_quarantine(status, reason);
        };
        quarantine.count_failed_try(reason);
        let (tries, next_try_in) = (quarantine.tries, quarantine.next_try_in());
        tracing::warn!(machine = self.name(), tries, next_try_in, reason, "not healed: tried again later");
        self.send_quarantined(&status);
    }

    /// Records that somebody else runs a machine in quarantine. It is not tried any more.
    pub fn leave_alone(&self) {
        self.lock_status().leave_alone(self.name());
    }

    /// Postpones the next try, which cannot be made now.
    pub fn postpone_try(&self) {
        if let Some(quarantine) = &mut self.lock_status().availability.quarantine {
            quarantine.postpone();
        }
    }

    /// Puts a machine back into the pool, because a try has worked. Returns nothing if the machine is not in
    /// quarantine any more.
    pub fn try_succeeded(&self) -> Option<Healed> {
        let mut status = self.lock_status();
        let quarantine = status.availability.quarantine.take()?;
        let healed = Healed {
            tries: quarantine.tries.saturating_add(1),
            took: Duration::from_secs(unix_now().saturating_sub(quarantine.since)),
        };
        let (tries, seconds) = (healed.tries, healed.took.as_secs());
        let machine = self.name().to_owned();
        tracing::info!(machine, tries, seconds, "machine healed");
        if status.availability.unusable.is_none() {
            self.events.send(Event::Enabled { machine: machine.clone() });
        }
        self.events.send(Event::Healed { machine, tries, seconds });
        self.notify_idle_work();
        Some(healed)
    }

    /// Has a machine in quarantine tried at once, with all tries before it: its configuration has changed.
    pub fn restart_quarantine(&self) {
        let mut status = self.lock_status();
        if let Some(quarantine) = &mut status.availability.quarantine {
            quarantine.restart();
            self.send_quarantined(&status);
            self.notify_idle_work();
        }
    }

    /// Disables a machine that is in quarantine: the host heals no machines any more. Returns whether it was.
    pub fn disable_quarantined(&self) -> bool {
        let mut status = self.lock_status();
        let Some(quarantine) = status.availability.quarantine.take() else { return false };
        tracing::error!(machine = self.name(), reason = quarantine.reason, "machine disabled: `heal` is off");
        // Its clients know already that it is out of the pool.
        status.availability.disabled = Some(quarantine.reason);
        true
    }

    /// Ends the row of plugin faults: an action has succeeded.
    pub fn reset_plugin_faults(&self) {
        self.lock_status().plugin_faults = 0;
    }

    /// Records that a client's start has succeeded. A machine in quarantine is not tried during such a run.
    pub fn set_started_well(&self) {
        self.lock_status().started_well = true;
    }
}

/// Counts a plugin fault, and returns the consequence of the failure.
fn choose(status: &mut Status, kind: ErrorKind, heal: Heal) -> Consequence {
    if is_plugin_fault(kind) {
        status.plugin_faults = status.plugin_faults.saturating_add(1);
    }
    consequence(kind, status.plugin_faults, heal)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::events::Events;
    use crate::fleet::availability::TaskLock;
    use crate::fleet::fake_plugin::FakePlugin;
    use tokio::sync::broadcast::Receiver;
    use tokio::time::timeout;

    const ACCIDENT: ErrorKind = ErrorKind::Failed;

    fn failed_machine() -> (Arc<Machine>, Receiver<Event>) {
        let events = Events::default();
        let machine = FakePlugin::default().machine("m", &events);
        machine.take_out(ACCIDENT, "killed", Heal::Auto);
        (machine, events.subscribe())
    }

    fn quarantine(machine: &Machine) -> Option<Quarantine> {
        machine.status().availability.quarantine
    }

    #[tokio::test(start_paused = true)]
    async fn machine_is_tried_five_seconds_after_its_failure() {
        let (machine, _) = failed_machine();
        assert_eq!(machine.next_try(), Some(Instant::now() + Duration::from_secs(5)));
        assert!(timeout(Duration::ZERO, machine.idle_work()).await.is_ok(), "its worker is woken");
    }

    #[test]
    fn machine_is_not_tried_when_somebody_needs_it() {
        type Change = fn(&mut Status);
        let lock: Change = |status| status.availability.lock = Some(TaskLock::default());
        let unusable: Change = |status| status.availability.unusable = Some("no disk".into());
        let healthy: Change = |status| status.availability.quarantine = None;
        let left: Change = |status| status.leave_alone("m");
        let foreign: Change = |status| status.state = State::Running;
        let tried: Change = |status| (status.state, status.own_run) = (State::Running, true);
        let started: Change = |status| {
            (status.state, status.own_run, status.started_well) = (State::Running, true, true);
        };
        let broken: Change = |status| (status.state, status.started_well) = (State::Error, true);
        for (what, change, expected) in [
            ("locked", lock, false),
            ("unusable", unusable, false),
            ("healthy", healthy, false),
            ("left alone", left, false),
            ("runs for somebody else", foreign, false),
            ("runs since a try", tried, true),
            ("runs for a client", started, false),
            ("in an unknown state", broken, true),
        ] {
            let (machine, _) = failed_machine();
            change(&mut machine.lock_status());
            assert_eq!(machine.next_try().is_some(), expected, "{what}");
        }
    }

    #[test]
    fn failed_try_counts_and_is_sent() {
        let (machine, mut events) = failed_machine();
        machine.try_failed(ACCIDENT, "killed again", Heal::Auto);
        let quarantine = quarantine(&machine).unwrap();
        assert_eq!((quarantine.tries, quarantine.reason.as_str()), (1, "killed again"));
        let event = events.try_recv().unwrap();
        assert!(matches!(event, Event::Quarantined { tries: 1, next_try_in: 30, .. }), "{event:?}");
    }

    #[test]
    fn failed_try_disables_the_machine_when_it_cannot_heal() {
        let (machine, _) = failed_machine();
        machine.try_failed(ErrorKind::Configuration, "no such disk", Heal::Auto);
        assert_eq!(machine.status().availability.disabled.as_deref(), Some("no such disk"));
        assert!(quarantine(&machine).is_none());
        machine.try_failed(ACCIDENT, "killed", Heal::Auto);
        assert!(quarantine(&machine).is_none(), "an operator's disable stays");
    }

    #[test]
    fn failed_try_begins_a_new_quarantine_when_an_operator_has_enabled_the_machine() {
        let (machine, _) = failed_machine();
        machine.enable();
        machine.try_failed(ACCIDENT, "killed", Heal::Auto);
        assert_eq!(quarantine(&machine).unwrap().tries, 0);
    }

    #[test]
    fn third_plugin_fault_in_a_row_disables_the_machine() {
        let (machine, _) = failed_machine();
        let fault = || machine.take_out(ErrorKind::PluginPanicked, "panicked", Heal::Auto);
        fault();
        fault();
        machine.reset_plugin_faults();
        fault();
        fault();
        assert!(machine.status().availability.disabled.is_none(), "an action has succeeded between them");
        fault();
        assert!(machine.status().availability.disabled.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn postponed_try_counts_no_failure() {
        let (machine, _) = failed_machine();
        tokio::time::advance(Duration::from_secs(60)).await;
        machine.postpone_try();
        let quarantine = quarantine(&machine).unwrap();
        assert_eq!((quarantine.tries, quarantine.next_try_in()), (0, 5));
    }

    #[test]
    fn machine_is_back_in_the_pool_when_a_try_has_worked() {
        let (machine, mut events) = failed_machine();
        machine.try_failed(ACCIDENT, "killed again", Heal::Auto);
        let _ = events.try_recv();
        let healed = machine.try_succeeded().unwrap();
        assert_eq!((healed.tries, machine.status().availability.disabled_reason()), (2, None));
        assert!(matches!(events.try_recv().unwrap(), Event::Enabled { .. }));
        assert!(matches!(events.try_recv().unwrap(), Event::Healed { tries: 2, .. }));
        assert_eq!(machine.try_succeeded(), None);
    }

    #[test]
    fn healed_machine_is_not_enabled_while_its_plugin_cannot_use_it() {
        let (machine, mut events) = failed_machine();
        machine.lock_status().availability.unusable = Some("no disk".into());
        machine.try_succeeded().unwrap();
        assert!(matches!(events.try_recv().unwrap(), Event::Healed { .. }));
    }

    #[test]
    fn quarantine_becomes_a_disable_when_heal_is_off() {
        let (machine, _) = failed_machine();
        assert!(machine.disable_quarantined() && !machine.disable_quarantined());
        assert_eq!(machine.status().availability.disabled.as_deref(), Some("killed"));
    }

    #[test]
    fn machine_is_left_alone_when_it_runs_for_somebody_else() {
        let (machine, _) = failed_machine();
        machine.leave_alone();
        assert!(quarantine(&machine).unwrap().is_left_alone);
    }

    #[test]
    fn run_counts_as_started_well_until_it_fails() {
        let (machine, _) = failed_machine();
        machine.set_started_well();
        assert!(machine.status().started_well);
        machine.take_out(ACCIDENT, "killed", Heal::Auto);
        assert!(!machine.status().started_well);
    }
}
