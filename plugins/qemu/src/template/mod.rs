//! Templates: what makes a restore instant, whatever the size of the guest's RAM.
//!
//! A template is a machine's snapshot in another form: its RAM as a file, which a restore only maps
//! (copy-on-write, so the file never changes), and the state of its devices, less than a megabyte, which
//! a restore loads. QEMU's migration capability `x-ignore-shared` makes and reads that form.
//!
//! ```text
//! <instant_dir>/<machine>.template/ram           as large as the guest's RAM, sparse where that is zero
//!                                   devices       a migration stream without RAM
//!                                   record.json   what it was made from, and how its files were then
//! <instant_dir>/<machine>.unfinished/            one that is being built; renamed when it is whole
//! <instant_dir>/templates.lock                   held by the host whose templates they are
//!
//! (none) ── build ──▶ unfinished ── fsync, rename ──▶ whole ──▶ used, again and again
//!                       │ failure                        │ anything it was made from has changed, a file
//!                       ▼                                ▼ of it has, or QEMU does not load it
//!                     (none)                           (none)
//! ```
//!
//! The operator may have chosen a folder that holds other things, so nothing is removed but files of these
//! names in folders of these names.
//!
//! It belongs to one [`Identity`]; it is looked at before each use, and one that does not fit is never
//! used. Without a template a machine is restored plainly.

mod build;
mod identity;
mod unavailable_reason;

pub use build::{Build, BuildError, build};
pub use identity::Identity;
pub use unavailable_reason::unavailable_reason;

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use machinery::{Error, Result, format_bytes};
use rustix::fs::{FlockOperation, flock, statvfs};
use serde::{Deserialize, Serialize};

use crate::disk;
use crate::launch::{Memory, Sharing};
use machinery_images::FileId;

const RAM: &str = "ram";
const DEVICES: &str = "devices";
const RECORD: &str = "record.json";
/// The first overlay of a template that is being built.
const DISK: &str = "disk";
/// All files that a template's folder may contain, besides overlays. The record is removed first, because
/// without it the other files are no template.
const OURS: [&str; 3] = [RECORD, RAM, DEVICES];

const WHOLE: &str = ".template";
const UNFINISHED: &str = ".unfinished";

/// What stays free on the disk when a template is built: runs need space too.
const RESERVE: u64 = 512 << 20;
/// And as large a part of the disk, where the operator has not said what templates may take.
const RESERVED_PART: u64 = 10;

/// What is as good as no space at all.
const FULL: u64 = 1 << 20;

/// All templates of a host.
pub struct Templates {
    dir: PathBuf,
    /// How much they may take together, in bytes, if there is a bound.
    space: Mutex<Option<u64>>,
    /// What templates that are being built may still take, in bytes.
    reserved: Arc<Mutex<u64>>,
    _lock: File,
}

/// A template that was looked at just now, and fits.
pub struct Template {
    /// The RAM, to be mapped.
    pub memory: Memory,
    /// The state of the devices.
    pub devices: Devices,
    /// The RAM's file. Whoever maps it sees what becomes of it.
    pub ram: FileId,
    /// What it takes on disk, in bytes.
    pub disk: u64,
}

/// The state of a machine's devices, opened at its begin.
pub struct Devices {
    pub path: PathBuf,
    pub file: File,
}

/// What a template was made from, and how its files were then.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    identity: Identity,
    /// QEMU's name for the machine's RAM.
    block: String,
    ram: FileId,
    devices: FileId,
    devices_crc32: u32,
}

impl Templates {
    /// Those in the folder `dir`, which is made if it is not there. What was left unfinished is removed.
    ///
    /// # Errors
    /// The folder cannot be used, or another host uses it.
    pub fn open(dir: &Path) -> Result<Templates> {
        let failed = |error: io::Error| Error::io("use the folder of the templates,", dir, &error);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        let lock = File::create(dir.join("templates.lock")).map_err(failed)?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            let reason = format!("another host keeps its templates in {}", dir.display());
            return Err(Error::environment(reason).advice("Give each host a instant_dir of its own"));
        }
        dir.read_dir().map_err(failed)?;
        let (space, reserved) = (Mutex::new(None), Arc::default());
        let templates = Templates { dir: dir.to_owned(), space, reserved, _lock: lock };
        templates.remove_all(|name| name.ends_with(UNFINISHED));
        Ok(templates)
    }

    /// Removes those that belong to none of these machines.
    pub fn keep_only(&self, machines: &[&str]) {
        let is_stranger = |machine: &str| !machines.contains(&machine);
        self.remove_all(|name| name.strip_suffix(WHOLE).is_some_and(is_stranger));
    }

    fn remove_all(&self, is_meant: impl Fn(&str) -> bool) {
        for entry in self.dir.read_dir().into_iter().flatten().flatten() {
            if is_meant(&entry.file_name().to_string_lossy()) {
                // It may be somebody else's, whose name looks like one of ours.
                let _ = remove(&entry.path()).inspect_err(|error| tracing::warn!(%error, "left alone"));
            }
        }
    }

    /// From now on they may take that much together, in bytes.
    pub fn set_space(&self, space: Option<u64>) {
        *self.space.lock().unwrap_or_else(PoisonError::into_inner) = space;
    }

    fn space(&self) -> Option<u64> {
        *self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether paths in it can stand in the middle of QEMU's arguments, as a machine's disk does.
    pub fn fits_into_arguments(&self) -> bool {
        !self.dir.to_string_lossy().contains([',', '"', '\\'])
    }

    fn folder(&self, machine: &str) -> PathBuf {
        self.dir.join(format!("{machine}{WHOLE}"))
    }

    /// Returns the path of the RAM file of the machine's template.
    pub fn ram(&self, machine: &str) -> PathBuf {
        self.folder(machine).join(RAM)
    }

    /// The machine's template, if it has one that was made from just this.
    ///
    /// # Errors
    /// It has one that cannot be used any more; the text says why.
    pub fn find(&self, machine: &str, identity: &Identity) -> Result<Option<Template>, String> {
        let folder = self.folder(machine);
        let text = match fs::read(folder.join(RECORD)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("its record cannot be read: {error}")),
        };
        let record: Record =
            serde_json::from_slice(&text).map_err(|error| format!("its record makes no sense: {error}"))?;
        if let Some(change) = identity.change_since(&record.identity) {
            return Err(change);
        }
        let unreadable = |error: io::Error| format!("it cannot be read: {error}");
        let (ram, path) = (folder.join(RAM), folder.join(DEVICES));
        if FileId::of(&ram).map_err(unreadable)? != record.ram {
            return Err("its RAM file was changed".to_owned());
        }
        let mut file = File::open(&path).map_err(unreadable)?;
        if FileId::of_open(&path, &file).map_err(unreadable)? != record.devices
            || checksum(&mut file).map_err(unreadable)? != record.devices_crc32
        {
            return Err("its device file was changed".to_owned());
        }
        let memory =
            Memory { file: ram, size: record.ram.size(), block: record.block, sharing: Sharing::Mapped };
        let (ram, disk) = (record.ram, size_on_disk(&folder));
        Ok(Some(Template { memory, devices: Devices { path, file }, ram, disk }))
    }

    /// Removes the machine's template, if there is one.
    ///
    /// # Errors
    /// It stays.
    pub fn remove(&self, machine: &str) -> Result<()> {
        remove(&self.folder(machine))
    }

    /// Room for one of about that size. Others that are built at the same time have theirs already.
    ///
    /// # Errors
    /// There is none; the text says how much there is.
    fn reserve_space(&self, needed: u64) -> Result<SpaceReservation, String> {
        let mut reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        match self.lacks_space(needed, *reserved) {
            Some(why) => Err(why),
            None => {
                *reserved += needed;
                Ok(SpaceReservation { reserved: Arc::clone(&self.reserved), bytes: needed })
            }
        }
    }

    fn lacks_space(&self, needed: u64, reserved: u64) -> Option<String> {
        let taken = self.used().saturating_add(reserved);
        if let Some(space) = self.space()
            && taken.saturating_add(needed) > space
        {
            return Some(format!(
                "its template would take up to {}, and {} of the {} for templates are taken (instant_space_limit)",
                format_bytes(needed),
                format_bytes(taken),
                format_bytes(space)
            ));
        }
        let (free, reserve) = (self.free().saturating_sub(reserved), self.reserve());
        (needed.saturating_add(reserve) > free).then(|| {
            format!(
                "its template would take up to {}, and only {} are free in {}, of which {} are to stay free. Free some, \
                 or set instant_dir and instant_space_limit",
                format_bytes(needed),
                format_bytes(free),
                self.dir.display(),
                format_bytes(reserve)
            )
        })
    }

    fn reserve(&self) -> u64 {
        let size = statvfs(&self.dir).map_or(0, |disk| disk.f_blocks.saturating_mul(disk.f_frsize));
        if self.space().is_some() { RESERVE } else { RESERVE.max(size / RESERVED_PART) }
    }

    fn free(&self) -> u64 {
        statvfs(&self.dir).map_or(0, |disk| disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    /// That their disk is full, for people, if it is: a QEMU that writes its RAM there then only says that
    /// it was killed.
    pub fn is_full(&self) -> Option<String> {
        (self.free() < FULL).then(|| format!("the disk of {} is full", self.dir.display()))
    }

    /// What all of them take on disk, in bytes.
    fn used(&self) -> u64 {
        let entries = self.dir.read_dir().into_iter().flatten().flatten();
        entries.map(|entry| size_on_disk(&entry.path())).sum()
    }
}

/// Room that is kept for a template that is being built, until this is dropped.
pub struct SpaceReservation {
    reserved: Arc<Mutex<u64>>,
    bytes: u64,
}

impl Drop for SpaceReservation {
    fn drop(&mut self) {
        *self.reserved.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
    }
}

/// Nothing but what this module has made: a folder with anything else in it stays.
fn remove(folder: &Path) -> Result<()> {
    let removed = OURS.iter().try_for_each(|name| fs::remove_file(folder.join(name)).or_else(absent));
    disk::remove_overlays(&folder.join(DISK))?;
    let removed = removed.and_then(|()| fs::remove_dir(folder).or_else(absent));
    removed.map_err(|error| Error::io("remove the template", folder, &error))
}

fn absent(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// In bytes; holes take nothing.
fn size_on_disk(folder: &Path) -> u64 {
    let size = |name: &str| fs::metadata(folder.join(name)).map_or(0, |file| file.blocks() * 512);
    size(RAM) + size(DEVICES)
}

/// Of all of the file, which is at its begin before and after.
fn checksum(file: &mut File) -> io::Result<u32> {
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    file.rewind()?;
    Ok(crc32fast::hash(&content))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Made {
        folder: tempfile::TempDir,
        templates: Templates,
        identity: Identity,
    }

    /// A template of machine `m`, of files that no QEMU has seen.
    fn made() -> Made {
        let folder = tempfile::tempdir().unwrap();
        let identity = identity::tests::identity(folder.path());
        let dir = folder.path().join("templates");
        let templates = Templates::open(&dir).unwrap();
        templates.set_space(Some(1 << 30));
        let unfinished = templates.begin("m").unwrap();
        File::create(unfinished.ram()).unwrap().set_len(1 << 20).unwrap();
        fs::write(unfinished.devices(), "the devices").unwrap();
        unfinished.publish(identity.clone(), "pc.ram", false).unwrap();
        Made { folder, templates, identity }
    }

    #[test]
    fn a_template_is_found_as_it_was_published() {
        let Made { templates, identity, folder: _folder } = made();
        let template = templates.find("m", &identity).unwrap().unwrap();
        assert_eq!((template.memory.size, template.memory.block.as_str()), (1 << 20, "pc.ram"));
        assert!(template.disk < 1 << 20, "it is not sparse");
        assert!(templates.find("n", &identity).unwrap().is_none());
        templates.remove("m").unwrap();
        assert!(templates.find("m", &identity).unwrap().is_none());
        templates.remove("m").unwrap();
    }

    #[test]
    fn one_that_was_touched_is_not_used() {
        type Harm = fn(&Path);
        let harms: [(Harm, &str); 6] = [
            (
                |folder| {
                    File::options().write(true).open(folder.join(RAM)).unwrap().set_len(1 << 19).unwrap()
                },
                "RAM",
            ),
            (|folder| fs::write(folder.join(RAM), vec![1; 1 << 20]).unwrap(), "RAM"),
            (|folder| fs::write(folder.join(DEVICES), "the levices").unwrap(), "device"),
            (|folder| fs::remove_file(folder.join(DEVICES)).unwrap(), "cannot be read"),
            (|folder| fs::write(folder.join(RECORD), "{").unwrap(), "no sense"),
            (|folder| fs::write(folder.join("../../snapshot"), "another").unwrap(), "snapshot"),
        ];
        for (harm, expected) in harms {
            let Made { templates, identity, folder } = made();
            harm(&templates.folder("m"));
            let identity = identity::tests::identity_again(folder.path(), &identity);
            let why = templates.find("m", &identity).err().unwrap();
            assert!(why.contains(expected), "{why}");
        }
    }

    #[test]
    fn a_bit_that_flips_on_the_disk_is_found_by_the_checksum() {
        let Made { templates, identity, folder: _folder } = made();
        let folder = templates.folder("m");
        fs::write(folder.join(DEVICES), "the devicer").unwrap();
        let mut record: Record = serde_json::from_slice(&fs::read(folder.join(RECORD)).unwrap()).unwrap();
        record.devices = FileId::of(&folder.join(DEVICES)).unwrap();
        fs::write(folder.join(RECORD), serde_json::to_vec(&record).unwrap()).unwrap();
        assert!(templates.find("m", &identity).err().unwrap().contains("device"));
    }

    #[test]
    fn room_is_looked_for_before() {
        let Made { templates, folder: _folder, .. } = made();
        let refused = |templates: &Templates, needed| templates.reserve_space(needed).err();
        let room = templates.reserve_space(800 << 20).unwrap();
        // What others are about to write counts too.
        assert!(refused(&templates, 800 << 20).unwrap().contains("of the 1 GiB for templates"));
        drop(room);
        assert!(refused(&templates, 800 << 20).is_none());
        templates.set_space(None);
        assert!(refused(&templates, 1 << 60).unwrap().contains("are free in"));
    }

    #[test]
    fn what_is_left_is_cleared_away_and_nothing_else() {
        let Made { folder, templates, identity } = made();
        let dir = templates.dir.clone();
        drop(templates.begin("m").unwrap());
        assert_eq!(dir.read_dir().unwrap().count(), 2, "an unfinished one stays behind");
        std::mem::forget(templates.begin("m").unwrap());
        for name in ["of-the-operator", "m", "other.template", "x.unfinished"] {
            fs::create_dir(dir.join(name)).unwrap();
            fs::write(dir.join(name).join("win10.qcow2"), "precious").unwrap();
        }
        assert!(Templates::open(&dir).err().unwrap().to_string().contains("another host"));
        drop(templates);
        let templates = Templates::open(&dir).unwrap();
        templates.keep_only(&["m"]);
        assert!(templates.find("m", &identity).unwrap().is_some());
        assert!(!dir.join("m.unfinished").exists());
        templates.keep_only(&["else"]);
        assert!(templates.find("m", &identity).unwrap().is_none());
        for name in ["of-the-operator", "m", "other.template", "x.unfinished"] {
            assert_eq!(fs::read_to_string(dir.join(name).join("win10.qcow2")).unwrap(), "precious", "{name}");
        }
        assert!(templates.remove("other").is_err());
        assert!(templates.begin("x").is_err());
        drop(folder);
    }
}
