//! Files of a machinery: replaced atomically, removed, locked, and the space for them.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::thread::{self, sleep};
use std::time::Duration;

use machinery::{Error, Result};
use rustix::fs::{Mode, OFlags, open, statvfs};
use serde::Serialize;

/// Writes a record to a file. At any time the file has either its old content or the complete new one.
///
/// # Errors
/// The file cannot be written.
pub fn replace_json(path: &Path, record: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(record).map_err(|error| {
        Error::failed(format!("a record for {} cannot be written: {error}", path.display()))
    })?;
    replace(path, text.as_bytes())
}

/// Writes a file. At any time the file has either its old content or the complete new one.
///
/// # Errors
/// The file cannot be written.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let mut new_file = path.as_os_str().to_owned();
    new_file.push(".new");
    fs::write(&new_file, content).map_err(|error| Error::io("write", Path::new(&new_file), &error))?;
    fs::rename(&new_file, path).map_err(|error| Error::io("replace", path, &error))
}

/// Returns the names of the files in that folder that end in `suffix`, without it. A folder that cannot be listed has none.
pub fn stems(folder: &Path, suffix: &str) -> Vec<String> {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| name.strip_suffix(suffix).map(str::to_owned)).collect()
}

/// Removes a socket, if it exists. A file of another kind stays, because a socket's path may be a mistake.
///
/// # Errors
/// The socket cannot be removed.
pub fn remove_socket(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => remove(path),
        _ => Ok(()),
    }
}

/// Removes a file, if it exists.
///
/// # Errors
/// The file exists and cannot be removed.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path, &error)),
        _ => Ok(()),
    }
}

/// Removes a file, if it exists. A thread of its own frees the file's space: for a large file in many pieces the kernel
/// takes seconds. If the process ends first, the kernel frees the space as well.
///
/// # Errors
/// As [`remove`].
pub fn remove_large(path: &Path) -> Result<()> {
    // A file that is open keeps its space.
    let held = open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
    remove(path)?;
    if let Ok(held) = held {
        // Without a thread, the space is freed here.
        drop(thread::Builder::new().name("free-space".to_owned()).spawn(move || drop(held)));
    }
    Ok(())
}

/// Returns the space that is free for this user on the file system of `path`, in bytes. Source: statvfs(3).
///
/// # Errors
/// The file system does not answer.
pub fn free_space(path: &Path) -> io::Result<u64> {
    let space = statvfs(path)?;
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

/// The number of attempts to lock a file, and the pause between two of them. A process that another thread is
/// starting holds the descriptors of this one for a moment.
const LOCK_TRIES: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// A lock that one host of this computer at a time can hold. The kernel releases it when the host ends, however it
/// ends.
#[derive(Debug)]
pub struct HostLock {
    _file: File,
}

impl HostLock {
    /// Locks the file at `path`, which is created if it does not exist. The error of a lock that another host holds is
    /// `held`.
    ///
    /// # Errors
    /// Another host holds the lock; the file cannot be created.
    pub fn take(path: &Path, held: impl FnOnce() -> Error) -> Result<HostLock> {
        let file = File::create(path).map_err(|error| Error::io("make the lock", path, &error))?;
        for attempt in 1.. {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if attempt < LOCK_TRIES => sleep(LOCK_PAUSE),
                Err(TryLockError::WouldBlock) => return Err(held()),
                Err(TryLockError::Error(error)) => return Err(Error::io("lock", path, &error)),
            }
        }
        Ok(HostLock { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_file_is_gone_at_once_and_a_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "x").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        remove_large(&link).unwrap();
        assert!(file.exists() && fs::symlink_metadata(&link).is_err());
        for _ in 0..2 {
            remove_large(&file).unwrap();
            assert!(!file.exists());
        }
        assert!(remove_large(folder.path()).is_err());
    }

    #[test]
    fn record_replaces_the_old_one_and_leaves_no_other_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.run");
        for text in ["one", "two"] {
            replace_json(&path, &text).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("\"{text}\""));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let error = replace_json(&folder.path().join("none/m.run"), &"x").unwrap_err().to_string();
        assert!(error.contains("none/m.run.new"), "{error}");
    }

    #[test]
    fn lock_is_refused_while_another_has_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = || Error::environment("another host has it");
        let first = HostLock::take(&path, held).unwrap();
        assert_eq!(HostLock::take(&path, held).unwrap_err().to_string(), "another host has it");
        drop(first);
        HostLock::take(&path, held).unwrap();
    }

    #[test]
    fn remove_succeeds_when_there_is_no_file() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(remove(&folder.path().join("none")), Ok(()));
        assert!(remove(folder.path()).unwrap_err().to_string().starts_with("cannot remove"));
    }
}
