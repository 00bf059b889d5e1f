//! The folder of one run: its disk, its sockets, its log.
//!
//! The folder is removed with the run. A host that was killed leaves the folder and the process of the run. The process
//! and its children have the folder's path in their environment, by which the next host finds them. A process that only
//! looks at the folder, such as an operator's shell, has no such entry and is left alone. The path has the whole name of
//! its machine, so that no machine takes the folder of another.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery::{Error, Result};

use crate::process::leftovers;

/// The suffix of a run folder in the state folder. It follows the whole name, so that no two machines share a folder.
const SUFFIX: &str = ".run";

/// The variable of the environment that marks the processes of a run: the path of its folder, or of another file that only
/// this machine has.
pub const RUN_VARIABLE: &str = "CUCKOO_MACHINERY_RUN_FOLDER";

/// The folder of one run. Dropping the value removes the folder.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// Creates the empty folder of a run of that machine, in the state folder of the machinery.
    ///
    /// # Errors
    /// The folder cannot be created; one of an earlier run cannot be removed.
    pub fn create(state_dir: &Path, machine: &str) -> Result<RunFolder> {
        let path = RunFolder::path_of(state_dir, machine)?;
        remove(&path)?;
        fs::create_dir(&path).map_err(|error| Error::io("make the run folder", &path, &error))?;
        Ok(RunFolder { path })
    }

    /// Has the command run in the folder, and marks its process as one of this run.
    pub fn enter(&self, command: &mut Command) {
        command.current_dir(&self.path).env(RUN_VARIABLE, &self.path);
    }

    /// Returns the path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of a file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Ends the processes of a run that a killed host has left, and removes the folder.
    ///
    /// # Errors
    /// A process does not end; the folder cannot be removed.
    pub fn clear_leftovers(state_dir: &Path, machine: &str) -> Result<()> {
        let path = RunFolder::path_of(state_dir, machine)?;
        // The folder outlives the process, and a search through all processes for each machine would delay a load.
        if !path.exists() {
            return Ok(());
        }
        for process in leftovers().filter(|process| process.has_variable(RUN_VARIABLE, path.as_os_str())) {
            tracing::warn!(machine, pid = process.number(), "ending a process of a host that died");
            process.end()?;
        }
        remove(&path)
    }

    /// Returns the path of the folder, without links: the next host may name the state folder in another way.
    fn path_of(state_dir: &Path, machine: &str) -> Result<PathBuf> {
        let failed = |error| Error::io("use the state folder", state_dir, &error);
        fs::create_dir_all(state_dir).map_err(failed)?;
        Ok(fs::canonicalize(state_dir).map_err(failed)?.join(format!("{machine}{SUFFIX}")))
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(%error, "cannot remove a run folder");
        }
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove the run folder", path, &error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{LineKind, Process};
    use std::time::Duration;

    #[test]
    fn folder_is_empty_at_first_and_removed_with_its_run() {
        let state = tempfile::tempdir().unwrap();
        fs::create_dir(state.path().join("m.run")).unwrap();
        fs::write(state.path().join("m.run/old"), "of a killed host").unwrap();
        let folder = RunFolder::create(state.path(), "m").unwrap();
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
        fs::write(folder.file("disk"), "written").unwrap();
        drop(folder);
        assert_eq!(state.path().read_dir().unwrap().count(), 0);
    }

    /// Starts a process in a run folder that its host, which is killed, does not remove.
    fn left(state: &Path, machine: &str) -> Process {
        let folder = RunFolder::create(state, machine).unwrap();
        let mut command = machinery::command(Path::new("/bin/sleep"));
        folder.enter(command.arg("600"));
        std::mem::forget(folder);
        Process::start(command, machine, |_| LineKind::Other).unwrap()
    }

    #[test]
    fn leftovers_are_ended_for_one_machine_only() {
        let state = tempfile::tempdir().unwrap();
        let (own, other) = (left(state.path(), "m"), left(state.path(), "m2"));
        let cleared = std::thread::scope(|scope| {
            let end = scope.spawn(|| own.end(Duration::from_secs(60)));
            RunFolder::clear_leftovers(state.path(), "m").unwrap();
            end.join().unwrap()
        });
        assert_eq!(cleared.describe(), "sleep was killed by signal 15");
        assert!(!state.path().join("m.run").exists() && state.path().join("m2.run").exists());
        assert!(!other.handle().wait(Duration::ZERO), "the process of another machine still runs");
        other.end(Duration::ZERO);
        RunFolder::clear_leftovers(state.path(), "none").unwrap();
    }

    #[test]
    fn process_that_only_looks_at_the_folder_is_left_alone() {
        let state = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(state.path(), "m").unwrap();
        let mut command = machinery::command(Path::new("/bin/sh"));
        command.args(["-c", "sleep 600", folder.path().to_str().unwrap()]).current_dir(folder.path());
        let looks = Process::start(command, "m", |_| LineKind::Other).unwrap();
        RunFolder::clear_leftovers(state.path(), "m").unwrap();
        assert!(!folder.path().exists() && !looks.handle().wait(Duration::ZERO));
        looks.end(Duration::ZERO);
    }
}
