//! The lock of the CWD: exclusive for a host, and shared for a command that ends the runs of a host that is gone.
//!
//! The lock ends with the process.

use std::fs::{File, Permissions};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::Duration;

use machinery::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, retry_on_intr};

/// The mode of the file: for the host's user.
const PRIVATE: u32 = 0o600;
/// The number of attempts to lock the CWD, and the pause between two of them.
const ATTEMPTS: u32 = 10;
const INTERVAL: Duration = Duration::from_millis(20);

/// Locks the CWD for one host. `limit` is for a command that ends the runs of an earlier host: this one waits for it.
///
/// # Errors
/// Another host serves the CWD, or the command does not end in time.
pub fn lock(state: &Path, limit: Duration) -> Result<File> {
    let path = state.join("lock");
    let file = open(&path)?;
    // A command that only checks for a host has the lock for a moment.
    let attempt = (0..ATTEMPTS).find(|_| {
        flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() || {
            thread::sleep(INTERVAL);
            false
        }
    });
    if attempt.is_some() {
        return Ok(file);
    }
    if flock(&file, FlockOperation::NonBlockingLockShared).is_err() {
        return Err(Error::environment(format!(
            "another host already serves this CWD: it holds {}",
            path.display()
        ))
        .advice("Stop it first, or use it: the other commands of cuckoo-machinery talk to it"));
    }
    tracing::info!("waiting for the end of `cuckoo-machinery end-runs`");
    wait(file, limit).map_err(|error| error.action(format!("locking {}", path.display())))
}

/// Waits for the lock while others have it shared.
fn wait(file: File, limit: Duration) -> Result<File> {
    let (sender, receiver) = sync_channel(1);
    let locking = move || {
        let locked = retry_on_intr(|| flock(&file, FlockOperation::LockExclusive));
        // The receiver has gone if the time was up.
        let _ = sender.send(locked.map(|()| file));
    };
    let started = thread::Builder::new().name("lock".to_owned()).spawn(locking);
    started.map_err(|error| Error::environment(format!("cannot start a thread: {error}")))?;
    match receiver.recv_timeout(limit) {
        Ok(Ok(file)) => Ok(file),
        Ok(Err(error)) => Err(Error::environment(error.to_string())),
        Err(_) => {
            Err(Error::environment(format!("`cuckoo-machinery end-runs` has not ended within {limit:?}"))
                .advice("Look at its log, or end it: the host adopts the runs that remain"))
        }
    }
}

/// Locks the CWD for a command that ends runs. Returns `None` if a host serves the CWD.
///
/// # Errors
/// The lock cannot be made.
pub fn lock_without_host(state: &Path) -> Result<Option<File>> {
    let path = state.join("lock");
    let file = open(&path)?;
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(Error::io("lock", &path, &error.into())),
    }
}

/// Opens the file of the lock. Other users cannot: whoever opens it may lock it, and so keep a host from starting.
fn open(path: &Path) -> Result<File> {
    let mut options = File::options();
    let opened = options.write(true).create(true).truncate(false).mode(PRIVATE).open(path);
    let closed = opened.and_then(|file| file.set_permissions(Permissions::from_mode(PRIVATE)).map(|()| file));
    closed.map_err(|error| Error::io("make the lock", path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(60);

    #[test]
    fn lock_is_refused_when_another_host_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let _host = lock(folder.path(), SOON).unwrap();
        let refused = lock(folder.path(), SOON).unwrap_err().to_string();
        assert!(refused.contains("another host already serves this CWD"), "{refused}");
        assert!(lock_without_host(folder.path()).unwrap().is_none());
    }

    #[test]
    fn host_waits_for_the_lock_when_a_command_ends_runs() {
        let folder = tempfile::tempdir().unwrap();
        let ending = lock_without_host(folder.path()).unwrap().unwrap();
        let limit = Duration::from_millis(10);
        let refused = lock(folder.path(), limit).unwrap_err().to_string();
        assert!(refused.contains("end-runs"), "{refused}");
        std::thread::scope(|scope| {
            let host = scope.spawn(|| lock(folder.path(), SOON));
            drop(ending);
            host.join().unwrap().unwrap();
        });
    }
}
