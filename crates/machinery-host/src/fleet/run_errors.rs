//! The errors of a task's run: it is lost, or its result is incomplete.
//!
//! A run that was lost, or not observed as it should be, must not look like a clean one. Such an error is a warning in
//! the log and an event. The machine keeps it until another task locks the machine, so that a client can read it after
//! the end of the run. Errors of a run that no task holds concern nobody.
//!
//! A lost run has not gone to the end that its task wanted. An incomplete one has, but something of it was not observed.

use std::sync::atomic::Ordering;

use super::Machine;
use super::availability::TaskLock;
use super::status::Status;
use crate::events::Event;

/// The number of errors that are kept for one run.
const MAX_ERRORS: usize = 20;

impl Machine {
    /// Records that the run of the task that holds the machine is lost, if a task holds it.
    pub fn run_lost(&self, reason: &str) {
        self.keep_run_error(&mut self.lock_status(), reason, true);
    }

    /// Records that the run of the task that holds the machine is incomplete, if a task holds it.
    pub fn run_incomplete(&self, reason: &str) {
        self.keep_run_error(&mut self.lock_status(), reason, false);
    }

    /// Records that the run of this task is incomplete, if the task still holds the machine.
    pub(super) fn run_of_task_incomplete(&self, task: &TaskLock, reason: &str) {
        let mut status = self.lock_status();
        if status.availability.lock.as_ref().is_some_and(|lock| lock.task_id == task.task_id) {
            self.keep_run_error(&mut status, reason, false);
        }
    }

    /// Records the error in this machine's status, which is locked, and sends the event.
    pub(super) fn keep_run_error(&self, status: &mut Status, reason: &str, lost: bool) {
        let availability = &mut status.availability;
        let Some(lock) = &availability.lock else { return };
        let (machine, task_id) = (self.name().to_owned(), lock.task_id.clone());
        let what = if lost { "lost" } else { "incomplete" };
        tracing::warn!(machine, task_id, reason, "the run of its task is {what}");
        availability.run_lost |= lost;
        if availability.run_errors.len() == MAX_ERRORS {
            // The first error is the cause of the others.
            availability.run_errors.remove(1);
        }
        availability.run_errors.push(reason.to_owned());
        self.machinery.losses.run_errors.fetch_add(1, Ordering::Relaxed);
        self.events.send(Event::RunError { machine, task_id, reason: reason.to_owned(), lost });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::fake_plugin::machine;

    fn lock(task_id: &str) -> TaskLock {
        TaskLock { task_id: task_id.into(), ..TaskLock::default() }
    }

    #[test]
    fn run_error_is_kept_until_another_task_locks_the_machine() {
        let (machine, mut events) = machine();
        machine.run_lost("no task");
        machine.lock(&lock("a")).unwrap();
        assert!(!machine.status().availability.run_lost);
        machine.run_lost("killed");
        machine.run_incomplete("packets are lost");
        machine.unlock(None).unwrap();
        let availability = machine.status().availability;
        assert_eq!(availability.run_errors, ["killed", "packets are lost"]);
        assert!(availability.run_lost);
        let sent = std::iter::from_fn(|| events.try_recv().ok()).find_map(|event| match event {
            Event::RunError { task_id, reason, lost, .. } => Some((task_id, reason, lost)),
            _ => None,
        });
        assert_eq!(sent, Some(("a".to_owned(), "killed".to_owned(), true)));
        machine.lock(&lock("b")).unwrap();
        let availability = machine.status().availability;
        assert!(availability.run_errors.is_empty() && !availability.run_lost);
    }

    #[test]
    fn late_error_of_a_task_is_no_error_of_the_next_one() {
        let (machine, _) = machine();
        let errors = || machine.status().availability.run_errors;
        machine.lock(&lock("a")).unwrap();
        machine.run_of_task_incomplete(&lock("a"), "packets are lost");
        assert_eq!(errors(), ["packets are lost"]);
        machine.unlock(None).unwrap();
        machine.lock(&lock("b")).unwrap();
        machine.run_of_task_incomplete(&lock("a"), "more packets are lost");
        assert!(errors().is_empty());
    }

    #[test]
    fn first_and_latest_errors_are_kept_when_there_are_too_many() {
        let (machine, _) = machine();
        machine.lock(&lock("a")).unwrap();
        (0..MAX_ERRORS + 3).for_each(|number| machine.run_lost(&number.to_string()));
        let errors = machine.status().availability.run_errors;
        assert_eq!((errors.len(), errors[0].as_str(), errors[1].as_str()), (MAX_ERRORS, "0", "4"));
    }
}
