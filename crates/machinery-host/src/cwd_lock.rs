//! The lock of the CWD: exclusive for a host, and shared for a command that ends the runs of a host that is gone.
//!
//! The lock ends with the process. The file has the number of the process of the host that has, or had, the lock.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process;
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
    // A command that only checks for a host has the lock for a moment.
    for _ in 0..ATTEMPTS {
        if let Some(locked) = try_lock(&path)? {
            return signed(locked, &path);
        }
        thread::sleep(INTERVAL);
    }
    let file = open(&path)?;
    if flock(&file, FlockOperation::NonBlockingLockShared).is_err() {
        return Err(Error::environment(format!(
            "another host already serves this CWD{}: it holds {}",
            holder(&path).map(|pid| format!(" as process {pid}")).unwrap_or_default(),
            path.display()
        ))
        .advice("Stop it first with `cuckoo-machinery shutdown`, or use it: the other commands of cuckoo-machinery talk to it"));
    }
    tracing::info!("waiting for the end of `cuckoo-machinery end-runs`");
    let locked = wait(file, limit).map_err(|error| error.action(format!("locking {}", path.display())))?;
    signed(locked, &path)
}

/// Locks the file, unless another process has the lock.
fn try_lock(path: &Path) -> Result<Option<File>> {
    let file = open(path)?;
    let locked = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
    // `clean` may have removed the file meanwhile: the lock of a removed file keeps nobody out.
    Ok((locked && is_at(&file, path)).then_some(file))
}

/// Reports whether the file is the one at this path.
fn is_at(file: &File, path: &Path) -> bool {
    let identity = |found: fs::Metadata| (found.dev(), found.ino());
    file.metadata()
        .map(identity)
        .is_ok_and(|own| path.metadata().map(identity).is_ok_and(|found| found == own))
}

/// Writes the number of this process into the file, which this process has locked.
fn signed(file: File, path: &Path) -> Result<File> {
    let pid = format!("{}\n", process::id());
    let written = file.set_len(0).and_then(|()| file.write_all_at(pid.as_bytes(), 0));
    written.map_err(|error| Error::io("write to", path, &error))?;
    Ok(file)
}

/// Returns the process that has locked the file, if the file has its number.
fn holder(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Waits until no host serves the CWD.
///
/// # Errors
/// The host has not ended in time.
pub fn wait_for_end_of_host(state: &Path, limit: Duration) -> Result<()> {
    let path = state.join("lock");
    let locked = wait_for(open(&path)?, FlockOperation::LockShared, limit)?;
    locked.map(drop).ok_or_else(|| {
        let pid = holder(&path).map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
        Error::timeout(format!("the host (process {pid}) has not ended within {limit:?}"))
            .advice("Look at its log")
    })
}

/// Waits for the lock while others have it shared.
fn wait(file: File, limit: Duration) -> Result<File> {
    wait_for(file, FlockOperation::LockExclusive, limit)?.ok_or_else(|| {
        Error::environment(format!("`cuckoo-machinery end-runs` has not ended within {limit:?}"))
            .advice("Look at its log, or end it: the host adopts the runs that remain")
    })
}

/// Waits for a lock. Returns `None` if the time is up.
fn wait_for(file: File, operation: FlockOperation, limit: Duration) -> Result<Option<File>> {
    let (sender, receiver) = sync_channel(1);
    let locking = move || {
        let locked = retry_on_intr(|| flock(&file, operation));
        // The receiver has gone if the time was up.
        let _ = sender.send(locked.map(|()| file));
    };
    let started = thread::Builder::new().name("lock".to_owned()).spawn(locking);
    started.map_err(|error| Error::environment(format!("cannot start a thread: {error}")))?;
    match receiver.recv_timeout(limit) {
        Ok(Ok(file)) => Ok(Some(file)),
        Ok(Err(error)) => Err(Error::environment(error.to_string())),
        Err(_) => Ok(None),
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
        let expected = format!("another host already serves this CWD as process {}", process::id());
        assert!(refused.contains(&expected), "{refused}");
        assert!(lock_without_host(folder.path()).unwrap().is_none());
    }

    #[test]
    fn lock_of_a_removed_file_is_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let removed = open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(!is_at(&removed, &path));
        let _host = lock(folder.path(), SOON).unwrap();
        assert!(!is_at(&removed, &path), "another file is there");
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

    #[test]
    fn end_of_a_host_is_waited_for_until_its_lock_is_released() {
        let folder = tempfile::tempdir().unwrap();
        let host = lock(folder.path(), SOON).unwrap();
        let late = wait_for_end_of_host(folder.path(), Duration::from_millis(10)).unwrap_err().to_string();
        assert!(late.contains(&format!("process {}", process::id())), "{late}");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait_for_end_of_host(folder.path(), SOON));
            drop(host);
            waiting.join().unwrap().unwrap();
        });
    }
}
