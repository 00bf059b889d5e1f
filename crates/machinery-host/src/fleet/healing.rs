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

    /// Returns the time of the next try, unless the machine is not in quarantine, or must be left alone: a task has
    /// it, its plugin cannot use it, or it runs for somebody.
    pub fn next_try(&self) -> Option<Instant> {
        let status = self.lock_status();
        let availability = &status.availability;
        let runs = !matches!(status.state, State::Poweroff | State::Error);
        let is_needed = availability.lock.is_some()
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
