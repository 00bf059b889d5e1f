//! The errors of a task's run, which make its result incomplete.
//!
//! A run that was lost, or not observed as it should be, must not look like a clean one. Such an error is a warning in
//! the log and an event. The machine keeps it until another task locks the machine, so that a client can read it after
//! the end of the run. Errors of a run that no task holds concern nobody.

use std::sync::atomic::Ordering;

use super::Machine;
use super::status::Status;
use crate::events::Event;

/// The number of errors that are kept for one run.
const MAX_ERRORS: usize = 20;

impl Machine {
    /// Records that the run of the task that holds the machine is lost or incomplete. Returns whether a task holds it.
    pub fn run_failed(&self, reason: &str) -> bool {
        self.keep_run_error(&mut self.lock_status(), reason)
    }

    /// Records the error in this machine's status, which is locked, and sends the event.
    pub(super) fn keep_run_error(&self, status: &mut Status, reason: &str) -> bool {
        let availability = &mut status.availability;
        let Some(lock) = &availability.lock else { return false };
        let (machine, task_id) = (self.name().to_owned(), lock.task_id.clone());
        tracing::warn!(machine, task_id, reason, "the run of its task is lost or incomplete");
        if availability.run_errors.len() == MAX_ERRORS {
            // The first error is the cause of the others.
            availability.run_errors.remove(1);
        }
        availability.run_errors.push(reason.to_owned());
        self.machinery.losses.run_errors.fetch_add(1, Ordering::Relaxed);
        self.events.send(Event::RunError { machine, task_id, reason: reason.to_owned() });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::availability::TaskLock;
    use crate::fleet::fake_plugin::machine;

    fn lock(task_id: &str) -> TaskLock {
        TaskLock { task_id: task_id.into(), ..TaskLock::default() }
    }

    #[test]
    fn run_error_is_kept_until_another_task_locks_the_machine() {
        let (machine, mut events) = machine();
        assert!(!machine.run_failed("no task"));
        machine.lock(&lock("a")).unwrap();
        assert!(machine.run_failed("killed"));
        machine.unlock(None).unwrap();
        assert_eq!(machine.status().availability.run_errors, ["killed"]);
        let sent = std::iter::from_fn(|| events.try_recv().ok()).find_map(|event| match event {
            Event::RunError { task_id, reason, .. } => Some((task_id, reason)),
            _ => None,
        });
        assert_eq!(sent, Some(("a".to_owned(), "killed".to_owned())));
        machine.lock(&lock("b")).unwrap();
        assert!(machine.status().availability.run_errors.is_empty());
    }

    #[test]
    fn first_and_latest_errors_are_kept_when_there_are_too_many() {
        let (machine, _) = machine();
        machine.lock(&lock("a")).unwrap();
        (0..MAX_ERRORS + 3).for_each(|number| assert!(machine.run_failed(&number.to_string())));
        let errors = machine.status().availability.run_errors;
        assert_eq!((errors.len(), errors[0].as_str(), errors[1].as_str()), (MAX_ERRORS, "0", "4"));
    }
}
