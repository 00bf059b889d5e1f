//! Building a template: the snapshot is loaded once more, and saved without its RAM, which is copied.
//!
//! The RAM is a file in memory at first. QEMU could write the template's file itself; but it does that
//! page by page as the snapshot comes in, which takes a disk's file system ten times as long.
//!
//! ```text
//! ask QEMU for the machine's RAM block ─▶ room? ─▶ start with that block in memory ─▶ load the snapshot
//!   ─▶ save the devices ─▶ end QEMU ─▶ copy what is not zero ─▶ still made from the same? ─▶ publish
//! ```

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, Error, Result, format_bytes};
use qapi::qmp;
use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use rustix::io::Errno;

use super::{DEVICES, DISK, Identity, RAM, RECORD, Record, Templates, UNFINISHED, checksum, remove};
use crate::launch::{Memory, Sharing};
use crate::process::bytes_of;
use crate::run::{Load, Run, Stage, StartError};
use crate::snapshot::{Format, Snapshot};
use machinery_images::FileId;

/// What building needs from the machine it is for.
pub trait Build {
    /// Starts a QEMU of the machine that stays paused, with that memory if any, and its first overlay at
    /// `disk`. The overlays of a run are not touched, because the operator may want to keep them.
    ///
    /// # Errors
    /// QEMU does not start, or the build was cancelled.
    fn start(
        &self,
        disk: &Path,
        memory: Option<Memory>,
        load: Load,
        deadline: Deadline,
    ) -> Result<Arc<Run>, StartError>;

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

    /// Whether it is still wanted.
    ///
    /// # Errors
    /// It is not.
    fn goes_on(&self) -> Result<()>;

    /// Whether the RAM file has to stay writable for its owner, because this QEMU opens it so.
    fn opens_for_writing(&self) -> bool;
}

/// How long QEMU may take to tell about a machine that does not run.
const QUESTION: Duration = Duration::from_secs(60);

/// Why there is no template.
pub enum BuildError {
    /// There is no room for it now.
    NoSpace(String),
    /// It was tried, and failed.
    Failed(StartError),
}

impl From<StartError> for BuildError {
    fn from(why: StartError) -> Self {
        BuildError::Failed(why)
    }
}

impl From<Error> for BuildError {
    fn from(error: Error) -> Self {
        // This error is not one of the process: such an error is a `StartError` already.
        BuildError::Failed(StartError { error, at: Stage::Run, still_running: None })
    }
}

/// Builds the machine's template. One that it has is replaced.
///
/// # Errors
/// See [`BuildError`]; nothing of it is left then.
pub fn build(
    templates: &Templates,
    machine: &str,
    build: &dyn Build,
    deadline: Deadline,
) -> Result<(), BuildError> {
    let identity = build.identity()?;
    templates.remove(machine)?;
    let unfinished = templates.begin(machine)?;
    let (block, size) = ask_for_ram(build, &unfinished.disk(), deadline)?;
    let snapshot = build.snapshot()?;
    let needed = likely_size(&snapshot, &identity, size);
    let _room = templates.reserve_space(needed).map_err(BuildError::NoSpace)?;
    lacks_memory(size).map_or(Ok(()), |why| Err(BuildError::NoSpace(why)))?;
    let ram = file_in_memory()?;
    let file = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), ram.as_raw_fd()));
    let memory = Memory { file, size, block: block.clone(), sharing: Sharing::Written };
    let run = build.start(&unfinished.disk(), Some(memory), Load::Snapshot(snapshot), deadline)?;
    let saved = run.save_devices(&unfinished.devices(), deadline);
    run.end(deadline)?;
    saved?;
    copy_what_is_not_zero(&ram, &unfinished.ram(), &|| {
        deadline.check("the template's RAM to be copied")?;
        build.goes_on()
    })?;
    if let Some(change) = build.identity()?.change_since(&identity) {
        return Err(Error::failed(format!("{change} while its template was built")).into());
    }
    unfinished.publish(identity, &block, build.opens_for_writing())?;
    Ok(())
}

/// What is left of this computer's memory when a template is built: guests that run need some too.
const MEMORY_LEFT: u64 = 512 << 20;

/// Why there is no memory to load a guest of that size, if there is none. Source: `MemAvailable` in
/// proc_meminfo(5), in KiB.
fn lacks_memory(needed: u64) -> Option<String> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let available = bytes_of(&text, "MemAvailable:")?;
    (needed.saturating_add(MEMORY_LEFT) > available).then(|| {
        format!(
            "building its template takes {} of memory, and only {} are available",
            format_bytes(needed),
            format_bytes(available)
        )
    })
}

/// QEMU's name for the machine's RAM, and its size in bytes.
fn ask_for_ram(build: &dyn Build, disk: &Path, deadline: Deadline) -> Result<(String, u64), BuildError> {
    let deadline = deadline.within(QUESTION);
    let run = build.start(disk, None, Load::Nothing, deadline)?;
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

fn file_in_memory() -> Result<File> {
    let made = memfd_create("template", MemfdFlags::CLOEXEC);
    let made = made.map_err(|error| Error::environment(format!("cannot make a file in memory: {error}")))?;
    Ok(made.into())
}

/// How much is copied at once, and how much has to be zero to be left out: a page.
const CHUNK: usize = 1 << 20;
const PAGE: usize = 4096;
const ZERO: [u8; PAGE] = [0; PAGE];

fn copy_what_is_not_zero(from: &File, path: &Path, goes_on: &dyn Fn() -> Result<()>) -> Result<()> {
    let failed = |error: io::Error| Error::io("write the template's", path, &error);
    let to = File::create_new(path).map_err(failed)?;
    let size = from.metadata().map_err(failed)?.len();
    to.set_len(size).map_err(failed)?;
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    while let Some(next) = next_data(from, at).map_err(failed)? {
        goes_on()?;
        at = next - next % PAGE as u64;
        let length = (size - at).min(CHUNK as u64) as usize;
        from.read_exact_at(&mut chunk[..length], at).map_err(failed)?;
        copy_chunk(&chunk[..length], &to, at).map_err(failed)?;
        at += length as u64;
    }
    Ok(())
}

/// From where on there is something in the file, at or behind that place.
fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(next) => Ok(Some(next)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Pages in a row are written at once.
fn copy_chunk(chunk: &[u8], to: &File, at: u64) -> io::Result<()> {
    let is_zero = |page: &[u8]| *page == ZERO[..page.len()];
    let mut begin = 0;
    while begin < chunk.len() {
        let zeros = chunk[begin..].chunks(PAGE).take_while(|page| is_zero(page)).count() * PAGE;
        begin += zeros;
        let Some(rest) = chunk.get(begin..) else { break };
        let full = rest.chunks(PAGE).take_while(|page| !is_zero(page)).map(<[u8]>::len).sum::<usize>();
        to.write_all_at(&rest[..full], at + begin as u64)?;
        begin += full;
    }
    Ok(())
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
        let folder = self.dir.join(format!("{machine}{UNFINISHED}"));
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

    fn disk(&self) -> PathBuf {
        self.folder.join(DISK)
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn what_is_zero_is_left_out_and_the_rest_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        let memory = file_in_memory().unwrap();
        memory.set_len(64 << 20).unwrap();
        let noise: Vec<u8> = (0..3 * PAGE).map(|n| (n % 251) as u8 + 1).collect();
        // At the begin, over the border of a chunk, in zeros that were written, at the end.
        for at in [0, CHUNK - PAGE, 5 * CHUNK, (64 << 20) - noise.len()] {
            memory.write_all_at(&noise, at as u64).unwrap();
        }
        memory.write_all_at(&vec![0; CHUNK], 9 * CHUNK as u64).unwrap();
        copy_what_is_not_zero(&memory, &path, &|| Ok(())).unwrap();
        let (mut original, copy) = (vec![0; 64 << 20], fs::read(&path).unwrap());
        memory.read_exact_at(&mut original, 0).unwrap();
        assert!(original == copy, "the copy is another");
        assert!(fs::metadata(&path).unwrap().blocks() * 512 <= 16 * PAGE as u64);
        fs::remove_file(&path).unwrap();
        let cancelled = copy_what_is_not_zero(&memory, &path, &|| Err(Error::failed("given up")));
        assert!(cancelled.unwrap_err().to_string().contains("given up"));
    }
}
