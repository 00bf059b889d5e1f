//! A file for each run of a task, so that the next host notices a run that ended with an earlier one.
//!
//! ```text
//! start of a locked machine ─▶ file made ─▶ run ─▶ stop ─▶ file removed
//! start of a host: file and lock of the same task, and the run was not adopted ─▶ the run is lost
//! ```
//!
//! A mark is not synced: it outlives the host, and a computer that crashes ends the task as well. The file is named
//! after the machine, and contains the task.

use std::fs;
use std::io;
use std::path::PathBuf;

use super::Machine;

/// The marks of all runs.
#[derive(Debug)]
pub struct RunMarks {
    folder: PathBuf,
}

impl RunMarks {
    /// Returns the marks in that folder, which is made when there is the first one.
    pub fn new(folder: PathBuf) -> Self {
        RunMarks { folder }
    }

    /// Marks a run of the task that holds the machine, if there is one.
    pub fn begin(&self, machine: &Machine) {
        let Some(lock) = machine.task_lock() else { return };
        let written = fs::create_dir_all(&self.folder)
            .and_then(|()| fs::write(self.path(machine), lock.task_id.as_bytes()));
        if let Err(error) = written {
            let (machine, path) = (machine.name(), self.folder.display());
            tracing::error!(machine, %path, %error, "the loss of its run would not be noticed after a crash of the host");
        }
    }

    /// Removes the mark of the machine's run, if there is one.
    pub fn end(&self, machine: &Machine) {
        if let Err(error) = fs::remove_file(self.path(machine))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(machine = machine.name(), %error, "the mark of its run cannot be removed");
        }
    }

    /// Reports whether a run of the task that holds the machine is marked.
    pub fn has_run(&self, machine: &Machine) -> bool {
        let marked = fs::read(self.path(machine));
        machine.task_lock().is_some_and(|lock| marked.is_ok_and(|task_id| task_id == lock.task_id.as_bytes()))
    }

    fn path(&self, machine: &Machine) -> PathBuf {
        self.folder.join(machine.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::availability::TaskLock;
    use crate::fleet::fake_plugin::machine;

    #[test]
    fn run_is_marked_until_its_end_for_the_task_that_holds_the_machine() {
        let folder = tempfile::tempdir().unwrap();
        let marks = RunMarks::new(folder.path().join("machines.runs"));
        let (machine, _) = machine();
        let lock = |task_id: &str| TaskLock { task_id: task_id.into(), ..TaskLock::default() };
        marks.end(&machine);
        marks.begin(&machine);
        assert!(!folder.path().join("machines.runs").exists(), "no task holds it");
        machine.lock(&lock("a")).unwrap();
        marks.begin(&machine);
        assert!(marks.has_run(&machine));
        machine.unlock(None).unwrap();
        machine.lock(&lock("b")).unwrap();
        assert!(!marks.has_run(&machine), "another task holds it");
        marks.begin(&machine);
        marks.end(&machine);
        assert!(!marks.has_run(&machine));
    }
}
