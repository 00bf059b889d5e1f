//! The assignment of a machine to tasks: locks, reservations, and whether the machine is in the pool.
//!
//! [`availability`](super::availability) has the rules. This applies them to a machine, and sends the events.

use machinery::Error;

use super::Machine;
use super::availability::{Availability, NotHeld, TaskLock, Unavailable};
use super::quarantine::{Quarantine, unix_now};
use crate::events::Event;

impl Machine {
    /// Gives the machine the availability that it had before the host was started.
    pub fn restore_availability(&self, availability: Availability) {
        let mut status = self.lock_status();
        // The host may have disabled the machine since its start.
        let Availability { disabled, quarantine, held, unusable, .. } =
            std::mem::take(&mut status.availability);
        let disabled = availability.disabled.or(disabled);
        let saved = availability.quarantine.map(Quarantine::resumed);
        let quarantine = saved.or(quarantine).filter(|_| disabled.is_none());
        status.availability = Availability { disabled, quarantine, held, unusable, ..availability };
    }

    /// Locks the machine for a task. Returns whether the lock is new.
    ///
    /// # Errors
    /// The machine is not available to that task. A lock that the task has already is no error.
    pub fn lock(&self, lock: &TaskLock) -> Result<bool, Unavailable> {
        let mut status = self.lock_status();
        let own = status.availability.lock.as_ref();
        let is_repeated = own.is_some_and(|own| own.is_repeated_by(lock));
        if is_repeated && status.availability.disabled_reason().is_none() {
            status.availability.lock = Some(lock.clone());
            return Ok(false);
        }
        if let Some(reason) = status.availability.unavailable_reason(&lock.task_id) {
            return Err(Unavailable { machine: self.name().to_owned(), wanted: "locked", reason });
        }
        status.availability.lock = Some(lock.clone());
        status.availability.locked_since = Some(unix_now());
        status.availability.run_errors.clear();
        status.availability.run_lost = false;
        let (machine, task_id) = (self.name().to_owned(), lock.task_id.clone());
        self.events.send(Event::Locked { machine, task_id, uid: lock.uid });
        Ok(true)
    }

    /// Releases the machine's lock; with a `task_id`, only that task's.
    ///
    /// # Errors
    /// The machine is not locked, or another task has it.
    pub fn unlock(&self, task_id: Option<&str>) -> Result<(), NotHeld> {
        let mut status = self.lock_status();
        let machine = self.name().to_owned();
        let Some(lock) = &status.availability.lock else { return Err(NotHeld::NotLocked(machine)) };
        if task_id.is_some_and(|task_id| task_id != lock.task_id) {
            return Err(NotHeld::OfAnother { machine, holder: lock.task_id.clone() });
        }
        status.availability.lock = None;
        status.availability.locked_since = None;
        self.notify_idle_work();
        self.events.send(Event::Unlocked { machine });
        Ok(())
    }

    /// Reserves the machine for a task. Returns whether the reservation is new.
    ///
    /// # Errors
    /// The machine is not available to that task.
    pub fn reserve(&self, task_id: &str) -> Result<bool, Unavailable> {
        let mut status = self.lock_status();
        let machine = self.name().to_owned();
        if let Some(reason) = status.availability.unavailable_reason(task_id) {
            return Err(Unavailable { machine, wanted: "reserved", reason });
        }
        if status.availability.reserved_by.is_some() {
            return Ok(false);
        }
        status.availability.reserved_by = Some(task_id.to_owned());
        self.events.send(Event::Reserved { machine, task_id: task_id.to_owned() });
        Ok(true)
    }

    /// Cancels the machine's reservation.
    ///
    /// # Errors
    /// The machine is not reserved.
    pub fn unreserve(&self) -> Result<(), NotHeld> {
        let mut status = self.lock_status();
        let machine = self.name().to_owned();
        if status.availability.reserved_by.take().is_none() {
            return Err(NotHeld::NotReserved(machine));
        }
        self.events.send(Event::Unreserved { machine });
        Ok(())
    }

    /// Returns the lock of the task that has the machine.
    pub fn task_lock(&self) -> Option<TaskLock> {
        self.lock_status().availability.lock.clone()
    }

    /// Takes the machine out of the pool until an operator enables it.
    pub fn disable(&self, reason: &str) {
        tracing::error!(machine = self.name(), reason, "machine disabled");
        let mut status = self.lock_status();
        status.availability.disabled = Some(reason.to_owned());
        if status.availability.quarantine.take().is_some() {
            // The worker waits for the next try.
            self.notify_idle_work();
        }
        self.events.send(Event::Disabled { machine: self.name().to_owned(), reason: reason.to_owned() });
    }

    /// Puts the machine back into the pool.
    pub fn enable(&self) {
        let mut status = self.lock_status();
        // The operator who enables it has looked at the plugin.
        status.plugin_faults = 0;
        let was_held = status.availability.held.take().is_some();
        let was_disabled = status.availability.disabled.take().is_some() || was_held;
        if status.availability.quarantine.take().is_some() || was_disabled {
            tracing::info!(machine = self.name(), "machine enabled");
            self.notify_idle_work();
            self.events.send(Event::Enabled { machine: self.name().to_owned() });
        }
    }

    /// Takes the machine out of the pool until it is released. It keeps everything else, such as a quarantine, which waits
    /// meanwhile.
    pub fn hold(&self, reason: &str) {
        let mut status = self.lock_status();
        let was_in_pool = status.availability.disabled_reason().is_none();
        status.availability.held = Some(reason.to_owned());
        tracing::info!(machine = self.name(), reason, "machine held");
        if was_in_pool {
            self.events.send(Event::Disabled { machine: self.name().to_owned(), reason: reason.to_owned() });
        }
        self.notify_idle_work();
    }

    /// Releases a machine that is held.
    pub fn release(&self) {
        let mut status = self.lock_status();
        if status.availability.held.take().is_none() {
            return;
        }
        tracing::info!(machine = self.name(), "machine released");
        if status.availability.disabled_reason().is_none() {
            self.events.send(Event::Enabled { machine: self.name().to_owned() });
        }
        self.notify_idle_work();
    }

    /// Records the plugin's diagnosis. A machine that the plugin cannot use leaves the pool until it can be
    /// used again.
    pub fn set_diagnosis(&self, unusable: Option<&Error>, warnings: Vec<String>) {
        let mut status = self.lock_status();
        for warning in warnings.iter().filter(|warning| !status.warnings.contains(warning)) {
            tracing::warn!(machine = self.name(), warning, "its plugin warns");
        }
        status.warnings = warnings;
        let unusable = unusable.map(Error::to_string);
        if status.availability.unusable == unusable {
            return;
        }
        match &unusable {
            Some(reason) => tracing::error!(machine = self.name(), reason, "machine cannot be used"),
            None => tracing::info!(machine = self.name(), "machine can be used again"),
        }
        status.availability.unusable.clone_from(&unusable);
        // A machine that is out of the pool for another reason stays out of it, for the same reason.
        let Availability { disabled, quarantine, held, .. } = &status.availability;
        if disabled.is_some() || quarantine.is_some() || held.is_some() {
            return self.notify_idle_work();
        }
        let machine = self.name().to_owned();
        match unusable {
            Some(reason) => self.events.send(Event::Disabled { machine, reason }),
            None => {
                self.notify_idle_work();
                self.events.send(Event::Enabled { machine });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fleet::availability::Reason;
    use crate::fleet::fake_plugin::machine;
    use tokio::sync::broadcast::Receiver;
    use tokio::time::timeout;

    fn lock(task_id: &str) -> TaskLock {
        TaskLock { task_id: task_id.into(), ..TaskLock::default() }
    }

    fn names(events: &mut Receiver<Event>) -> Vec<String> {
        std::iter::from_fn(|| events.try_recv().ok())
            .map(|event| serde_json::to_value(event).unwrap()["event"].as_str().unwrap().to_owned())
            .collect()
    }

    async fn is_woken(machine: &Machine) -> bool {
        timeout(Duration::ZERO, machine.idle_work()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn lock_is_new_once_and_excludes_other_tasks_until_it_is_released() {
        let (machine, mut events) = machine();
        assert_eq!(machine.lock(&lock("1")), Ok(true));
        assert_eq!(machine.lock(&lock("1")), Ok(false));
        assert_eq!(machine.lock(&lock("2")).unwrap_err().reason, Reason::Locked("1".into()));
        assert_eq!(machine.task_lock(), Some(lock("1")));
        assert!(machine.status().availability.locked_since.is_some());
        assert_eq!(
            machine.unlock(Some("2")),
            Err(NotHeld::OfAnother { machine: "m".into(), holder: "1".into() })
        );
        assert!(!is_woken(&machine).await);
        machine.unlock(Some("1")).unwrap();
        assert!(is_woken(&machine).await, "the next restore can be prepared");
        assert_eq!((machine.task_lock(), machine.unlock(None)), (None, Err(NotHeld::NotLocked("m".into()))));
        machine.lock(&lock("2")).unwrap();
        machine.unlock(None).unwrap();
        assert_eq!(names(&mut events), ["locked", "unlocked", "locked", "unlocked"]);
    }

    #[test]
    fn lock_is_not_repeated_when_the_machine_is_out_of_the_pool() {
        let (machine, _) = machine();
        machine.lock(&lock("1")).unwrap();
        machine.disable("by hand");
        assert_eq!(machine.lock(&lock("1")).unwrap_err().reason, Reason::Disabled("by hand".into()));
    }

    #[test]
    fn reservation_is_new_once_and_excludes_other_tasks() {
        let (machine, mut events) = machine();
        assert_eq!((machine.reserve("1"), machine.reserve("1")), (Ok(true), Ok(false)));
        assert_eq!(machine.reserve("2").unwrap_err().reason, Reason::Reserved("1".into()));
        machine.unreserve().unwrap();
        assert_eq!(machine.unreserve(), Err(NotHeld::NotReserved("m".into())));
        assert_eq!(names(&mut events), ["reserved", "unreserved"]);
    }

    #[test]
    fn restored_availability_keeps_what_this_host_has_found() {
        let (machine, _) = machine();
        machine.lock_status().availability.unusable = Some("no disk".into());
        let quarantine = Some(Quarantine::new("killed"));
        machine.restore_availability(Availability {
            lock: Some(lock("1")),
            quarantine: quarantine.clone(),
            ..Availability::default()
        });
        let availability = machine.status().availability;
        assert_eq!((availability.unusable.as_deref(), availability.lock), (Some("no disk"), Some(lock("1"))));
        assert!(availability.quarantine.is_some());
        machine.disable("panicked");
        machine.restore_availability(Availability { quarantine, ..Availability::default() });
        let availability = machine.status().availability;
        assert_eq!((availability.disabled.as_deref(), availability.quarantine), (Some("panicked"), None));
    }

    #[tokio::test(start_paused = true)]
    async fn diagnosis_takes_the_machine_out_of_the_pool_and_puts_it_back() {
        let (machine, mut events) = machine();
        let no_disk = Error::environment("no disk");
        for _ in 0..2 {
            machine.set_diagnosis(Some(&no_disk), vec!["old QEMU".into()]);
        }
        assert_eq!(machine.status().warnings, ["old QEMU"]);
        assert_eq!((names(&mut events), is_woken(&machine).await), (vec!["disabled".into()], false));
        for _ in 0..2 {
            machine.set_diagnosis(None, Vec::new());
        }
        assert!(is_woken(&machine).await && machine.status().warnings.is_empty());
        assert_eq!(names(&mut events), ["enabled"]);
    }

    #[tokio::test(start_paused = true)]
    async fn diagnosis_sends_nothing_when_the_machine_is_out_of_the_pool_already() {
        let quarantined = |machine: &Machine| {
            machine.lock_status().availability.quarantine = Some(Quarantine::new("killed"));
        };
        let disabled = |machine: &Machine| {
            machine.lock_status().availability.disabled = Some("by hand".into());
        };
        let changes: [&dyn Fn(&Machine); 2] = [&quarantined, &disabled];
        for change in changes {
            let (machine, mut events) = machine();
            change(&machine);
            machine.set_diagnosis(Some(&Error::environment("no disk")), Vec::new());
            machine.set_diagnosis(None, Vec::new());
            assert!(is_woken(&machine).await, "a try may be possible now");
            assert!(names(&mut events).is_empty());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn held_machine_is_afterwards_as_it_was_before() {
        for before in [
            Availability::default(),
            Availability { disabled: Some("by hand".into()), ..Availability::default() },
            Availability { quarantine: Some(Quarantine::new("killed")), ..Availability::default() },
        ] {
            let (machine, mut events) = machine();
            machine.lock_status().availability = before.clone();
            let (was_out, try_at) = (before.disabled_reason().is_some(), machine.next_try());
            machine.hold("held");
            assert_eq!(machine.status().availability.disabled_reason(), Some("held"));
            assert!(machine.lock(&lock("t")).is_err() && machine.next_try().is_none());
            machine.restore_availability(before.clone());
            assert_eq!(machine.status().availability.disabled_reason(), Some("held"));
            machine.release();
            machine.release();
            assert_eq!(
                (machine.status().availability, machine.next_try().is_some()),
                (before, try_at.is_some())
            );
            let expected = if was_out { vec![] } else { vec!["disabled", "enabled"] };
            assert_eq!(names(&mut events), expected);
        }
        let (machine, _events) = machine();
        machine.hold("held");
        machine.enable();
        assert_eq!(machine.status().availability.disabled_reason(), None);
    }
}
