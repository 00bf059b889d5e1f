//! The folder of one run: its disk, its sockets, its log.
//!
//! The folder is removed with the run. A host that was killed leaves the folder and the process that runs in it; the next
//! host finds both by the folder's path, which has the whole name of its machine, so that no machine takes the folder of
//! another.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};

use crate::process::leftovers;

/// The suffix of a run folder in the state folder. It follows the whole name, so that no two machines share a folder.
const SUFFIX: &str = ".run";

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
        let path = RunFolder::path_of(state_dir, machine);
        remove(&path)?;
        fs::create_dir_all(&path).map_err(|error| Error::io("make the run folder", &path, &error))?;
        // The kernel returns the real path of a process's folder, and leftovers are found by it.
        let path = fs::canonicalize(&path).map_err(|error| Error::io("find", &path, &error))?;
        Ok(RunFolder { path })
    }

    /// Returns the path of the folder. The process of the run should have it as its working folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path of a file in the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Ends the processes that a killed host has left in the folder of that machine, and removes the folder.
    ///
    /// # Errors
    /// A process does not end; the folder cannot be removed.
    pub fn clear_leftovers(state_dir: &Path, machine: &str) -> Result<()> {
        let path = RunFolder::path_of(state_dir, machine);
        // No process can run in a folder that does not exist.
        let Ok(real) = fs::canonicalize(&path) else { return Ok(()) };
        for process in leftovers().filter(|process| process.runs_in(&real) || process.uses(&real)) {
            tracing::warn!(machine, pid = process.number(), "ending a process of a host that died");
            process.end()?;
        }
        remove(&path)
    }

    fn path_of(state_dir: &Path, machine: &str) -> PathBuf {
        state_dir.join(format!("{machine}{SUFFIX}"))
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

    #[test]
    fn leftovers_are_ended_for_one_machine_only() {
        let state = tempfile::tempdir().unwrap();
        let run = |machine| {
            let folder = RunFolder::create(state.path(), machine).unwrap();
            let mut command = machinery::command(Path::new("/bin/sleep"));
            command.arg("600").current_dir(folder.path());
            // The host is killed: it removes nothing.
            std::mem::forget(folder);
            Process::start(command, machine, |_| LineKind::Other).unwrap()
        };
        let (own, other) = (run("m"), run("m2"));
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
}
