//! The locks of the records of unfinished machines: the command at work holds that of its record.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery::{Error, Result};
use rustix::fs::{FlockOperation, flock};

use crate::cwd::Cwd;

const LOCK: &str = "lock";
/// The beginning of the name of a record that is being made, and the time in which it gets its own name.
pub const NEW: &str = ".new-";
const MAX_BEGIN: Duration = Duration::from_secs(60);

/// Returns the folders of all records that have their name.
pub fn records(cwd: &Cwd) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(cwd.unfinished_machines()).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|folder| !is_being_made(folder))
}

/// Reports whether a command may be about to lock the record, which has no name yet.
fn is_being_made(folder: &Path) -> bool {
    let is_new = folder.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(NEW.as_bytes()));
    let age = folder.metadata().and_then(|found| found.modified()).ok().and_then(|made| made.elapsed().ok());
    is_new && age.is_none_or(|age| age < MAX_BEGIN)
}

/// Locks the record in that folder, unless its command is at work.
///
/// # Errors
/// The file cannot be opened.
pub fn try_lock(folder: &Path) -> io::Result<Option<File>> {
    let file = File::options().write(true).create(true).truncate(false).open(folder.join(LOCK))?;
    Ok(flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok().then_some(file))
}

/// Expects that no command is at work.
///
/// # Errors
/// One is.
pub fn expect_no_command(cwd: &Cwd) -> Result<()> {
    let is_at_work = |folder: &PathBuf| !matches!(try_lock(folder), Ok(Some(_)));
    match records(cwd).find(is_at_work) {
        None => Ok(()),
        Some(folder) => Err(Error::environment("a `machine` command is at work on this machine")
            .machine(folder.file_name().unwrap_or_default().display().to_string())
            .advice("Wait for its end")),
    }
}
