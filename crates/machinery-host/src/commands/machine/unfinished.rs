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

use machinery::config::ConfigFile;
use machinery::{Error, Result, Setup};
use serde_yaml::Mapping;

use super::context::Context;
use super::domain::{DomainEntry, Recorded};
use super::folder::{MARK, expect_kept, remove_folder, remove_mark, set_mark};
use super::locks::{NEW, records, try_lock};
use super::record::{RECORD, Record};
use super::replaced::Replaced;
use super::section::{section_of, withdraw};
use super::{host, leftovers};
use crate::cwd::{Cwd, make_reachable_folder, make_state_folder};

/// The record of an unfinished machine.
pub struct Unfinished {
    folder: PathBuf,
    record: Record,
    _lock: File,
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
    /// Another command is at work on a machine of this name, the folder exists, or cannot be made. Other users could
    /// replace it.
    pub fn begin(cwd: &Cwd, name: &str, folder: &Path) -> Result<Unfinished> {
        expect_kept(folder.parent().unwrap_or(folder)).map_err(|error| error.machine(name))?;
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
    pub fn begin_removal(
        cwd: &Cwd,
        name: &str,
        folder: &Path,
        domain: Option<Recorded>,
    ) -> Result<Unfinished> {
        let mut removal = Unfinished::record(cwd, name, folder)?;
        match domain.map_or(Ok(()), |domain| removal.record_domain(domain)).and_then(|()| set_mark(folder)) {
            Ok(()) => Ok(removal),
            Err(error) => {
                let _ = fs::remove_dir_all(&removal.folder);
                Err(error.machine(name))
            }
        }
    }

    /// Makes the record of a new snapshot of a domain. The machine's folder stays.
    ///
    /// # Errors
    /// Another command is at work on the machine, or a file cannot be written.
    pub fn begin_snapshot(cwd: &Cwd, name: &str, folder: &Path, domain: Recorded) -> Result<Unfinished> {
        let mut snapshot = Unfinished::record(cwd, name, folder)?;
        snapshot.record_domain(domain).map(|()| snapshot)
    }

    /// Records the domain, before it is made or changed.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn record_domain(&mut self, domain: Recorded) -> Result<()> {
        self.record.domain = Some(domain);
        self.record.write(&self.folder)
    }

    fn record(cwd: &Cwd, name: &str, folder: &Path) -> Result<Unfinished> {
        make_state_folder(cwd)?;
        let records = cwd.unfinished_machines();
        make_reachable_folder(&records)?;
        let failed = |error: io::Error| Error::io("make a folder in", &records, &error);
        let new = tempfile::Builder::new().prefix(NEW).tempdir_in(&records).map_err(failed)?;
        let lock =
            try_lock(new.path()).map_err(failed)?.ok_or_else(|| failed(io::ErrorKind::WouldBlock.into()))?;
        let record = Record { name: name.to_owned(), folder: folder.to_owned(), ..Record::default() };
        record.write(new.path())?;
        let own = records.join(name);
        // A name of which a record exists is refused.
        fs::rename(new.path(), &own).map_err(|_| match try_lock(&own) {
            Ok(Some(_)) => Error::environment("an earlier command has left something of this machine")
                .machine(name)
                .advice("Run `cuckoo-machinery machine clear`"),
            _ => Error::environment("another command is at work on this machine")
                .machine(name)
                .advice("Wait for its end"),
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

    /// Has a host hold the machines of these entries until the record ends. A host that starts later reads the record:
    /// see [`held_entries`].
    ///
    /// # Errors
    /// The host uses a machine, or the record cannot be written.
    pub fn hold(&mut self, cwd: &Cwd, entries: &[String]) -> Result<()> {
        entries.clone_into(&mut self.record.held);
        self.record.write(&self.folder)?;
        let machinery = self.record.machinery();
        let machines = host::machines_of(cwd, machinery, entries)?;
        host::expect_unused(&machines)?;
        machines.iter().try_for_each(|machine| host::hold(cwd, host::name(machine)))?;
        host::expect_unused(&host::machines_of(cwd, machinery, entries)?)?;
        machines.iter().try_for_each(|machine| host::stop(cwd, host::name(machine)))
    }

    /// Records the machine's section of `machinery-host.yaml`, which does not stay without the machine.
    ///
    /// # Errors
    /// The record cannot be written.
    pub fn record_section(&mut self, keys: &Mapping) -> Result<()> {
        self.record.section = Some(keys.clone());
        self.record.write(&self.folder)
    }

    /// Adds the machine's section to `machinery-host.yaml`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn add_section(&mut self, cwd: &Cwd, keys: &Mapping) -> Result<()> {
        self.record_section(keys)?;
        section_of(&self.record.name).add(&cwd.host_yaml(), keys)
    }

    /// Removes the entry of the domain whose copy the machine is. The caller has the lock of the configuration.
    ///
    /// # Errors
    /// A file cannot be written, or the entry is another one.
    pub fn replace(&mut self, cwd: &Cwd, entry: &DomainEntry) -> Result<()> {
        self.record.replaced = Replaced::of(cwd, entry)?;
        self.record.write(&self.folder)?;
        self.record.replaced.iter().try_for_each(|replaced| replaced.remove(cwd))
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

/// Clears what commands that were killed have left: all of it, or that of one machine.
///
/// # Errors
/// A process or a file remains. Everything else is cleared.
pub fn clear_abandoned(context: &Context<'_>, only: Option<&str>) -> Result<Vec<Cleared>> {
    let mut cleared = Vec::new();
    let mut remains = Vec::new();
    for folder in records(context.cwd) {
        let Ok(Some(_lock)) = try_lock(&folder) else { continue };
        let text = fs::read(folder.join(RECORD)).unwrap_or_default();
        // A command that was killed at its beginning has written no record, and made nothing else.
        let Ok(record) = serde_json::from_slice::<Record>(&text) else {
            remains.extend(remove_folder(&folder).err());
            continue;
        };
        if only.is_none_or(|only| only == record.name) {
            match clear(&folder, &record, context) {
                Ok(is_configured) => cleared.push(Cleared { name: record.name, is_configured }),
                Err(error) => remains.push(error.machine(&record.name)),
            }
        }
    }
    Error::all(remains).map_or(Ok(cleared), Err)
}

/// Returns the entries whose machines commands hold that are at work.
pub fn held_entries(cwd: &Cwd) -> Vec<String> {
    let is_at_work = |folder: &PathBuf| matches!(try_lock(folder), Ok(None));
    let record = |folder: PathBuf| serde_json::from_slice(&fs::read(folder.join(RECORD)).ok()?).ok();
    records(cwd).filter(is_at_work).filter_map(record).flat_map(|record: Record| record.held).collect()
}

/// Clears a record. Reports whether its machine is in the configuration, and stays.
fn clear(folder: &Path, record: &Record, context: &Context<'_>) -> Result<bool> {
    let context = Context { machinery: record.machinery(), ..context.clone() };
    let domain = record.domain.as_ref();
    if let Some(setup) = &record.setup {
        // A template is of no use any more.
        remove_folder(&setup.cache_dir)?;
        leftovers::end_runs(&context, setup, &record.name).map_err(|error| {
            error.action("ending what an unfinished machine has left").machine(&record.name).advice(format!(
                "Correct this, and run `cuckoo-machinery machine clear`. Or end the machine's processes, and remove {}",
                folder.display()
            ))
        })?;
    }
    domain
        .map_or(Ok(()), |domain| {
            leftovers::clear_domain(&context, &record.name, domain, record.setup.as_ref(), folder)
        })
        .map_err(|error| error.machine(&record.name))?;
    record.release(context.cwd);
    let own = &record.folder;
    let is_configured = leftovers::is_configured(context.cwd, domain, own)?;
    if is_configured {
        remove_mark(own)?;
    } else {
        record.section.iter().try_for_each(|keys| withdraw(context.cwd, &record.name, keys))?;
        record.replaced.iter().try_for_each(|replaced| replaced.undo(context.cwd))?;
        match own.join(MARK).exists() {
            true => remove_folder(own)?,
            // A folder without the mark is empty, or somebody else's.
            false => drop(fs::remove_dir(own)),
        }
    }
    if record.replaced.is_some() {
        // The command may have ended before a running host has loaded the exchange.
        host::reload(context.cwd).into_iter().for_each(|note| tracing::warn!("{note}"));
    }
    remove_folder(folder).map(|()| is_configured)
}

#[cfg(test)]
mod tests {
    use super::super::locks::expect_no_command;
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    fn cwd(root: &Path) -> Cwd {
        fs::write(root.join(".cuckoocwd"), "").unwrap();
        Cwd::find(Some(root)).unwrap()
    }

    #[test]
    fn folder_is_refused_where_other_users_could_replace_it() {
        let root = tempfile::tempdir().unwrap();
        let (cwd, shared) = (cwd(root.path()), root.path().join("shared"));
        fs::create_dir(&shared).unwrap();
        fs::set_permissions(&shared, Permissions::from_mode(0o777)).unwrap();
        for parent in [shared.clone(), shared.join("new")] {
            let refused = Unfinished::begin(&cwd, "m", &parent.join("m")).map(drop).unwrap_err().to_string();
            assert!(refused.contains("other users could") && refused.contains("Name a folder"), "{refused}");
        }
        assert!(!cwd.state().exists() && fs::read_dir(&shared).unwrap().count() == 0);
        fs::set_permissions(&shared, Permissions::from_mode(0o755)).unwrap();
        Unfinished::begin(&cwd, "m", &shared.join("m")).unwrap();
        assert!(shared.join("m").join(MARK).exists());
    }

    #[test]
    fn command_is_at_work_until_its_record_is_not_locked() {
        let root = tempfile::tempdir().unwrap();
        let cwd = cwd(root.path());
        expect_no_command(&cwd).unwrap();
        let begin = || Unfinished::begin(&cwd, "m", &root.path().join("m"));
        let refusal = || begin().map(drop).unwrap_err().to_string();
        let unfinished = begin().unwrap();
        let refused = expect_no_command(&cwd).unwrap_err().to_string();
        assert!(refused.contains("at work") && refused.contains("'m'"), "{refused}");
        assert!(refusal().contains("another command is at work"), "{}", refusal());
        drop(unfinished);
        expect_no_command(&cwd).unwrap();
        assert!(refusal().contains("machine clear"), "{}", refusal());
    }
}
