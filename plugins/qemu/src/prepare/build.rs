//! Builds a template: QEMU loads the snapshot once more, saves the devices, and its RAM is copied.
//!
//! The RAM is a file in memory at first. QEMU could write the template's file itself. But it writes page by
//! page as the snapshot comes in, for which a disk's file system takes ten times as long.
//!
//! ```text
//! query the machine's RAM block ─▶ reserve space ─▶ start with that block in memory ─▶ load the snapshot
//!   ─▶ save the devices ─▶ end QEMU ─▶ copy without zeros ─▶ identity unchanged? ─▶ publish
//! ```

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, Error, Result};
use qapi::qmp;
use rustix::fs::{MemfdFlags, memfd_create};

use super::identity::Identity;
use super::memory::{memory_shortage, no_memory};
use super::opener::Opener;
use super::sparse_copy::sparse_copy;
use super::store::Templates;
use super::unfinished::Unfinished;
use crate::launch::{Memory, Sharing};
use crate::restore::Load;
use crate::run::Run;
use crate::run::start_error::{Stage, StartError};
use crate::snapshot::{Format, Snapshot};

/// The machine for which a template is built.
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

    /// Returns the machine's current identity.
    ///
    /// # Errors
    /// A file of the machine cannot be read.
    fn identity(&self) -> Result<Identity>;

    /// Opens the machine's snapshot.
    ///
    /// # Errors
    /// The snapshot cannot be opened.
    fn snapshot(&self) -> Result<Snapshot>;

    /// Checks that the build was not cancelled.
    ///
    /// # Errors
    /// The build was cancelled.
    fn ensure_wanted(&self) -> Result<()>;

    /// Returns who opens the RAM file, and how.
    fn opener(&self) -> Opener;
}

/// The maximum time for a QEMU that only reports its RAM block.
const QUERY_TIMEOUT: Duration = Duration::from_secs(60);
/// The reason why a template was not built.
pub enum BuildError {
    /// There is not enough space on the disk or in memory now.
    NoSpace(String),
    /// The build failed.
    Failed(StartError),
}

impl From<StartError> for BuildError {
    fn from(why: StartError) -> Self {
        BuildError::Failed(why)
    }
}

impl From<Error> for BuildError {
    fn from(error: Error) -> Self {
        // An error of the process is a `StartError` already.
        BuildError::Failed(StartError { error, at: Stage::Run, still_running: None })
    }
}

/// Builds the machine's template, in place of the one that it has.
///
/// # Errors
/// See [`BuildError`]. Nothing of the template remains then.
pub fn build(
    templates: &Templates,
    machine: &str,
    build: &dyn Build,
    deadline: Deadline,
) -> Result<(), BuildError> {
    let identity = build.identity()?;
    templates.remove(machine)?;
    let unfinished = Unfinished::begin(templates, machine)?;
    let (block, size) = query_ram(build, &unfinished.disk(), deadline)?;
    let snapshot = build.snapshot()?;
    let needed = max_size(&snapshot, &identity, size);
    let _reservation = templates.space().reserve(needed).map_err(BuildError::NoSpace)?;
    memory_shortage("building its template", size).map_or(Ok(()), |why| Err(BuildError::NoSpace(why)))?;
    let ram = file_in_memory()?;
    let file = ram.try_clone().map_err(|error| no_memory(&error))?;
    let memory = Memory { file, size, block: block.clone(), sharing: Sharing::Written };
    let run = build.start(&unfinished.disk(), Some(memory), Load::Snapshot(snapshot), deadline)?;
    let saved = run.save_devices(&unfinished.devices(), deadline);
    run.end(deadline)?;
    saved?;
    sparse_copy(&ram, &unfinished.create_ram()?, &|| {
        deadline.check("the template's RAM to be copied")?;
        build.ensure_wanted()
    })?;
    if let Some(change) = build.identity()?.change_since(&identity) {
        return Err(Error::failed(format!("{change} while its template was built")).into());
    }
    unfinished.publish(identity, &block, build.opener())?;
    Ok(())
}

/// Starts a QEMU only to return its name for the machine's RAM, and the RAM's size in bytes.
fn query_ram(build: &dyn Build, disk: &Path, deadline: Deadline) -> Result<(String, u64), BuildError> {
    let deadline = deadline.within(QUERY_TIMEOUT);
    let run = build.start(disk, None, Load::Nothing, deadline)?;
    let ram = ram_of(&run, deadline);
    run.end(deadline)?;
    Ok(ram?)
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
        None => Err(Error::failed("QEMU does not report the size of the machine's RAM")),
    }
}

fn file_in_memory() -> Result<File> {
    let made = memfd_create("template", MemfdFlags::CLOEXEC);
    Ok(made.map_err(|error| no_memory(&error.into()))?.into())
}

/// Returns the maximum size of the template, in bytes. Zeros take no space, and a plain snapshot has none.
fn max_size(snapshot: &Snapshot, identity: &Identity, ram: u64) -> u64 {
    if snapshot.format() == Format::Plain { identity.snapshot_size().min(ram) } else { ram }
}
