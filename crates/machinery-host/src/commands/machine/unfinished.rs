//! The record of a machine that is being made, so that nothing remains of one that is never finished.
//!
//! ```text
//! <state>/machines/<name>/lock           held by the command
//!                        /record.json    the machine's folder, and the plugin's setup
//!                        /sockets, state, cache
//! <machine's folder>/.unfinished         until the machine is finished
//! ```
//!
//! The plugin gets folders of its own, so that a running host and its machines are not affected. A command that fails
//! clears its record. After a command that was killed, the next one does: it has the plugin end the leftovers in these
//! folders, and removes the machine's folder.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery::config::ConfigFile;
use machinery::{Error, Result, Setup};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::context::Context;
use super::session::with_session;
use super::{host, info};
use crate::cwd::{Cwd, make_reachable_folder, make_state_folder};

const LOCK: &str = "lock";
const RECORD: &str = "record.json";
/// The beginning of the name of a record that is being made, and the time in which it gets its own name.
const NEW: &str = ".new-";
const MAX_BEGIN: Duration = Duration::from_secs(60);
/// The file in the folder of an unfinished machine.
pub const MARK: &str = ".unfinished";

/// The record of an unfinished machine.
pub struct Unfinished {
    folder: PathBuf,
    record: Record,
    _lock: File,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    name: String,
    /// The folder of the machine that is made.
    folder: PathBuf,
    /// The setup of the plugin, once it has one.
    setup: Option<Setup>,
    /// The machines that a running host is to give to tasks again.
    #[serde(default)]
    disabled: Vec<String>,
}

/// A record that was cleared.
pub struct Cleared {
    pub name: String,
    /// True if the configuration has the machine, which stays then.
    pub is_configured: bool,
}

impl Unfinished {
    /// Makes the record and the machine's folder, which must not exist.
    ///
    /// # Errors
    /// Another command is at work on a machine of this name, the folder exists, or cannot be made.
    pub fn begin(cwd: &Cwd, name: &str, folder: &Path) -> Result<Unfinished> {
        let unfinished = Unfinished::record(cwd, name, folder)?;
        if let Err(error) = unfinished.make_folder() {
            // The folder of somebody else remains.
            let _ = fs::remove_dir_all(&unfinished.folder);
            return Err(error.machine(name));
        }
        Ok(unfinished)
    }

    /// Makes the record of a machine that is to be removed with its folder, once the configuration does not have it.
    ///
    /// # Errors
    /// Another command is at work on the machine, or a file cannot be written.
    pub fn begin_removal(cwd: &Cwd, name: &str, folder: &Path) -> Result<Unfinished> {
        let removal = Unfinished::record(cwd, name, folder)?;
        match File::create(folder.join(MARK)) {
            Ok(_) => Ok(removal),
            Err(error) => {
                let _ = fs::remove_dir_all(&removal.folder);
                Err(Error::io("write to", folder, &error).machine(name))
            }
        }
    }

    fn record(cwd: &Cwd, name: &str, folder: &Path) -> Result<Unfinished> {
        make_state_folder(cwd)?;
        let records = cwd.unfinished_machines();
        make_reachable_folder(&records)?;
        let failed = |error: io::Error| Error::io("make a folder in", &records, &error);
        let new = tempfile::Builder::new().prefix(NEW).tempdir_in(&records).map_err(failed)?;
        let lock =
            try_lock(new.path()).map_err(failed)?.ok_or_else(|| failed(io::ErrorKind::WouldBlock.into()))?;
        let record =
            Record { name: name.to_owned(), folder: folder.to_owned(), setup: None, disabled: Vec::new() };
        record.write(new.path())?;
        let own = records.join(name);
        // A name of which a record exists is refused.
        fs::rename(new.path(), &own).map_err(|_| {
            Error::environment("another command is at work on this machine")
                .machine(name)
                .advice("Wait for its end")
        })?;
        drop(new.keep());
        Ok(Unfinished { folder: own, record, _lock: lock })
    }

    fn make_folder(&self) -> Result<()> {
        let folder = &self.record.folder;
        if let Some(parent) = folder.parent() {
            make_reachable_folder(parent)?;
        }
        let made = fs::create_dir(folder).and_then(|()| File::create_new(folder.join(MARK)));
        made.map(drop).map_err(|error| {
            let failed = Error::io("make the folder", folder, &error);
            match error.kind() {
                io::ErrorKind::AlreadyExists => {
                    failed.advice("Give the machine another name or --folder, or remove the folder")
                }
                _ => failed,
            }
        })
    }

    /// Returns the folder of the machine.
    pub fn machine_folder(&self) -> &Path {
        &self.record.folder
    }

    /// Returns a folder that is removed with the record.
    pub fn scratch(&self) -> &Path {
        &self.folder
    }

    /// Returns the plugin's setup with this configuration, and records it.
    ///
    /// # Errors
    /// The folders or the record cannot be written.
    pub fn setup(&mut self, config: ConfigFile, host_config: ConfigFile) -> Result<Setup> {
        let folder = |name: &str| {
            let folder = self.folder.join(name);
            make_reachable_folder(&folder).map(|()| folder)
        };
        let setup = Setup {
            config,
            host_config: Some(host_config),
            sockets_dir: folder("sockets")?,
            state_dir: folder("state")?,
            cache_dir: folder("cache")?,
            adopts: false,
            result_server: None,
        };
        self.record.setup = Some(setup.clone());
        self.record.write(&self.folder)?;
        Ok(setup)
    }

    /// Has a running host give the machines of these entries to no task until the record ends.
    ///
    /// # Errors
    /// The host uses a machine, or the record cannot be written.
    pub fn hold(&mut self, cwd: &Cwd, entries: &[String]) -> Result<()> {
        let machines = host::machines_of(cwd, entries)?;
        host::expect_unused(&machines)?;
        let in_use = machines.iter().filter(|machine| host::is_in_use(machine));
        self.record.disabled = in_use.map(|machine| host::name(machine).to_owned()).collect();
        self.record.write(&self.folder)?;
        self.record.disabled.iter().try_for_each(|name| host::disable(cwd, name))?;
        host::expect_unused(&host::machines_of(cwd, entries)?)?;
        machines.iter().try_for_each(|machine| host::stop(cwd, host::name(machine)))
    }

    /// Ends the record of a finished machine, whose folder is at `folder` now.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn finish(self, cwd: &Cwd, folder: &Path) -> Result<()> {
        remove_mark(folder)?;
        self.record.release(cwd);
        remove_folder(&self.folder)
    }

    /// Removes everything of a machine that is not to be finished.
    ///
    /// # Errors
    /// A process or a file remains.
    pub fn clear(self, context: &Context<'_>) -> Result<()> {
        clear(&self.folder, &self.record, context).map(drop)
    }

    /// Ends the record of a machine that was made, whose folder is at `folder`, or clears one that was not.
    ///
    /// # Errors
    /// The machine was not made; something remains.
    pub fn conclude<T>(self, context: &Context<'_>, folder: &Path, made: Result<T>) -> Result<T> {
        match made {
            Ok(made) => self.finish(context.cwd, folder).map(|()| made),
            Err(error) => match self.clear(context) {
                Ok(()) => Err(error),
                Err(remains) => Err(error.detail(&format!("and something remains of it: {remains}"))),
            },
        }
    }
}

impl Record {
    /// Has a running host give the machines to tasks again.
    fn release(&self, cwd: &Cwd) {
        self.disabled.iter().for_each(|name| host::enable(cwd, name));
    }

    fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(RECORD);
        let written = serde_json::to_vec(self).map_err(io::Error::other).and_then(|text| {
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            io::Write::write_all(&mut file, &text)?;
            file.persist(&path).map_err(|failed| failed.error)
        });
        written.map(drop).map_err(|error| Error::io("write", &path, &error))
    }
}

/// Clears what commands that were killed have left: all of it, or that of one machine.
///
/// # Errors
/// A process or a file remains.
pub fn clear_abandoned(context: &Context<'_>, only: Option<&str>) -> Result<Vec<Cleared>> {
    let entries = fs::read_dir(context.cwd.unfinished_machines()).into_iter().flatten().flatten();
    let mut cleared = Vec::new();
    for folder in entries.map(|entry| entry.path()).filter(|folder| !is_being_made(folder)) {
        let Ok(Some(_lock)) = try_lock(&folder) else { continue };
        let text = fs::read(folder.join(RECORD)).unwrap_or_default();
        // A command that was killed at its beginning has written no record, and made nothing else.
        let Ok(record) = serde_json::from_slice::<Record>(&text) else {
            remove_folder(&folder)?;
            continue;
        };
        if only.is_none_or(|only| only == record.name) {
            let is_configured = clear(&folder, &record, context)?;
            cleared.push(Cleared { name: record.name, is_configured });
        }
    }
    Ok(cleared)
}

/// Reports whether a command may be about to lock the record, which has no name yet.
fn is_being_made(folder: &Path) -> bool {
    let is_new = folder.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(NEW.as_bytes()));
    let age = folder.metadata().and_then(|found| found.modified()).ok().and_then(|made| made.elapsed().ok());
    is_new && age.is_none_or(|age| age < MAX_BEGIN)
}

/// Locks the record in that folder, unless its command is at work.
fn try_lock(folder: &Path) -> io::Result<Option<File>> {
    let file = File::options().write(true).create(true).truncate(false).open(folder.join(LOCK))?;
    Ok(flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok().then_some(file))
}

/// Clears a record. Reports whether its machine is in the configuration, and stays.
fn clear(folder: &Path, record: &Record, context: &Context<'_>) -> Result<bool> {
    if let Some(setup) = &record.setup {
        // A template is of no use any more.
        remove_folder(&setup.cache_dir)?;
        // The load ends the leftovers.
        let ended = with_session(context, setup, &record.name, |_| Ok(()));
        let has_left = || fs::read_dir(&setup.state_dir).is_ok_and(|mut entries| entries.next().is_some());
        match ended {
            Err(error) if has_left() => {
                return Err(error.action("ending what an unfinished machine has left").machine(&record.name));
            }
            Err(error) => tracing::debug!(machine = record.name, %error, "the plugin does not load"),
            Ok(()) => {}
        }
    }
    record.release(context.cwd);
    let own = &record.folder;
    let is_configured = info::is_configured(context.cwd, own);
    if is_configured {
        remove_mark(own)?;
    } else if own.join(MARK).exists() {
        remove_folder(own)?;
    } else {
        // A folder without the mark is empty, or somebody else's.
        let _ = fs::remove_dir(own);
    }
    remove_folder(folder).map(|()| is_configured)
}

fn remove_mark(folder: &Path) -> Result<()> {
    gone(fs::remove_file(folder.join(MARK)))
        .map_err(|error| Error::io("finish the machine in", folder, &error))
}

/// Removes a folder with everything in it, if it exists.
///
/// # Errors
/// A file cannot be removed.
pub fn remove_folder(folder: &Path) -> Result<()> {
    gone(fs::remove_dir_all(folder)).map_err(|error| Error::io("remove", folder, &error))
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}
