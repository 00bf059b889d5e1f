//! Building a template: the snapshot is loaded once more, into a file, and then saved without its RAM.
//!
//! ```text
//! ask QEMU for the machine's RAM block ─▶ room? ─▶ start with that block in .new/ram ─▶ load the snapshot
//!        ─▶ save the devices to .new/devices ─▶ end QEMU ─▶ still made from the same? ─▶ publish
//! ```

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use machinery::{Deadline, Error, Result};
use qapi::qmp;

use super::{DEVICES, Identity, RAM, RECORD, Record, Templates, UNFINISHED, absent, checksum, remove};
use crate::files::FileId;
use crate::launch::{Memory, Sharing};
use crate::run::{Load, NotStarted, Run};
use crate::snapshot::{Format, Snapshot};

/// What building needs from the machine it is for.
pub trait Build {
    /// Starts a QEMU of the machine that stays paused, with that memory if any.
    ///
    /// # Errors
    /// It does not start, or is not wanted any more.
    fn start(&self, memory: Option<Memory>, load: Load, deadline: Deadline) -> Result<Arc<Run>, NotStarted>;

    /// What the machine is made from now.
    ///
    /// # Errors
    /// It cannot be looked at.
    fn identity(&self) -> Result<Identity>;

    /// A new snapshot to load.
    ///
    /// # Errors
    /// It cannot be opened.
    fn snapshot(&self) -> Result<Snapshot>;

    /// Whether the RAM file has to stay writable for its owner, because this QEMU opens it so.
    fn opens_for_writing(&self) -> bool;
}

/// Why there is no template.
pub enum NotBuilt {
    /// There is no room for it now.
    NoRoom(String),
    /// It was tried, and failed.
    Failed(NotStarted),
}

impl From<NotStarted> for NotBuilt {
    fn from(why: NotStarted) -> Self {
        NotBuilt::Failed(why)
    }
}

impl From<Error> for NotBuilt {
    fn from(error: Error) -> Self {
        NotBuilt::Failed(error.into())
    }
}

/// Builds the machine's template. One that it has is replaced.
///
/// # Errors
/// See [`NotBuilt`]; nothing of it is left then.
pub fn build(
    templates: &Templates,
    machine: &str,
    build: &dyn Build,
    deadline: Deadline,
) -> Result<(), NotBuilt> {
    let identity = build.identity()?;
    let (block, size) = ask_for_ram(build, deadline)?;
    templates.remove(machine)?;
    let snapshot = build.snapshot()?;
    if let Some(why) = templates.lacks_room(machine, likely_size(&snapshot, &identity, size)) {
        return Err(NotBuilt::NoRoom(why));
    }
    let unfinished = templates.begin(machine)?;
    let memory = Memory { file: unfinished.ram(), size, block: block.clone(), sharing: Sharing::Written };
    let run = build.start(Some(memory), Load::Snapshot(snapshot), deadline)?;
    let saved = run.save_devices(&unfinished.devices(), deadline);
    // Its RAM is in the file when it has ended.
    run.end(deadline)?;
    saved?;
    if let Some(change) = build.identity()?.change_since(&identity) {
        return Err(Error::failed(format!("{change} while its template was built")).into());
    }
    unfinished.publish(identity, &block, build.opens_for_writing())?;
    Ok(())
}

/// QEMU's name for the machine's RAM, and its size in bytes.
fn ask_for_ram(build: &dyn Build, deadline: Deadline) -> Result<(String, u64), NotBuilt> {
    let run = build.start(None, Load::Nothing, deadline)?;
    let told = ram_of(&run, deadline);
    run.end(deadline)?;
    Ok(told?)
}

/// Source: `machine_get_memdev` in QEMU's hw/core/machine.c; a machine's default RAM is an object too.
fn ram_of(run: &Run, deadline: Deadline) -> Result<(String, u64)> {
    let get = |path: &str, property: &str| {
        run.execute(&qmp::qom_get { path: path.to_owned(), property: property.to_owned() }, deadline)
    };
    let path = get("/machine", "memory-backend")?;
    let block = path.as_str().and_then(|path| path.strip_prefix("/objects/"));
    let Some(block) = block.filter(|block| !block.is_empty()) else {
        return Err(Error::failed(format!(
            "this machine type has no RAM of its own: its memory-backend is {path}"
        )));
    };
    match get(path.as_str().unwrap_or(""), "size")?.as_u64() {
        Some(size) => Ok((block.to_owned(), size)),
        None => Err(Error::failed("QEMU does not tell the size of the machine's RAM")),
    }
}

/// At most: what is zero takes no room, and is not in a plain snapshot either.
fn likely_size(snapshot: &Snapshot, identity: &Identity, ram: u64) -> u64 {
    if snapshot.format() == Format::Plain { identity.snapshot_size().min(ram) } else { ram }
}

/// A template that is being built. It is removed with the value, unless it is published.
pub struct Unfinished {
    folder: PathBuf,
    published_as: PathBuf,
}

impl Templates {
    /// Begins a template.
    ///
    /// # Errors
    /// Its folder cannot be made.
    pub(super) fn begin(&self, machine: &str) -> Result<Unfinished> {
        let folder = self.dir.join(format!("{UNFINISHED}{machine}"));
        remove(&folder)?;
        let made = fs::DirBuilder::new().mode(0o700).create(&folder);
        made.map_err(|error| Error::io("make the template's folder", &folder, &error))?;
        Ok(Unfinished { folder, published_as: self.folder(machine) })
    }
}

impl Unfinished {
    pub fn ram(&self) -> PathBuf {
        self.folder.join(RAM)
    }

    pub fn devices(&self) -> PathBuf {
        self.folder.join(DEVICES)
    }

    /// Puts it in its place, where it survives a crash of this computer too.
    ///
    /// # Errors
    /// It cannot be brought to the disk.
    pub fn publish(self, identity: Identity, block: &str, writable: bool) -> Result<()> {
        self.bring_to_disk(identity, block, writable)
            .map_err(|error| Error::io("publish the template", &self.published_as, &error))
    }

    fn bring_to_disk(&self, identity: Identity, block: &str, writable: bool) -> io::Result<()> {
        let mode = |writable| Permissions::from_mode(if writable { 0o600 } else { 0o400 });
        for (path, writable) in [(self.ram(), writable), (self.devices(), false)] {
            fs::set_permissions(&path, mode(writable))?;
            File::open(&path)?.sync_all()?;
        }
        // What is looked at later is where it will be then; a rename of the folder changes neither file.
        let id = |name: &str| {
            let file = File::open(self.folder.join(name))?;
            FileId::of_open(&self.published_as.join(name), &file)
        };
        let record = Record {
            identity,
            block: block.to_owned(),
            ram: id(RAM)?,
            devices: id(DEVICES)?,
            devices_crc32: checksum(&mut File::open(self.devices())?)?,
        };
        let path = self.folder.join(RECORD);
        fs::write(&path, serde_json::to_vec(&record)?)?;
        File::open(&path)?.sync_all()?;
        fs::remove_dir_all(&self.published_as).or_else(absent)?;
        fs::rename(&self.folder, &self.published_as)?;
        match self.published_as.parent() {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Once published, it is not there any more.
        if let Err(error) = remove(&self.folder) {
            tracing::warn!(%error, "an unfinished template stays behind");
        }
    }
}
