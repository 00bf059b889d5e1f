//! `machine snapshot`: takes the snapshot of a machine anew, from a cold boot of the disk that the machine was made of.
//!
//! ```text
//! boot, save and restore in a folder beside the machine's ─▶ exchange both folders ─▶ remove the old one
//! ```
//!
//! The exchange is atomic: at each moment, the machine has the old disk and snapshot, or the new ones.

use std::path::Path;

use clap::Args;
use machinery::{Error, Result};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::context::Context;
use super::create::lock_base;
use super::folder::{set_mark, sync_name};
use super::info::{Info, files_of};
use super::make::{Plan, make, other_files};
use super::options::Ready;
use super::publish::{Made, expect_unused, reload};
use super::unfinished::Unfinished;

/// The machine whose snapshot is taken.
#[derive(Debug, Clone, Args)]
pub struct Snapshot {
    /// Name of the machine, which `machine create` has made
    pub name: String,
    #[command(flatten)]
    pub ready: Ready,
}

/// Takes the snapshot.
///
/// # Errors
/// A host uses the machine, the guest is not ready in time, or a step fails. The machine then is as it was.
pub fn snapshot(context: &Context<'_>, snapshot: &Snapshot) -> Result<Made> {
    let (cwd, name) = (context.cwd, &snapshot.name);
    snapshot.ready.expect_in_time()?;
    let files = files_of(cwd, name)?;
    let folder = files[files.len() - 1].parent().unwrap_or(Path::new("/")).to_owned();
    let info = Info::read(&folder).map_err(|error| error.machine(name))?;
    let Some(base) = info.machine.base.clone() else {
        return Err(Error::configuration("the machine is from an archive, which has no disk to boot from")
            .machine(name)
            .advice("Take the snapshot on the host that has made it, and export it again"));
    };
    expect_unused(cwd, name)?;
    let _base = lock_base(context, &base)?;
    let mut unfinished = Unfinished::begin(cwd, name, &folder.with_file_name(format!(".{name}.new")))?;
    let made = (|| {
        unfinished.hold(cwd)?;
        let plan = Plan { info, base, files: other_files(&folder)?, ready: &snapshot.ready };
        let ready = make(context, &plan, &mut unfinished, &folder)?;
        expect_unused(cwd, name)?;
        exchange(&folder, unfinished.machine_folder())?;
        let notes = reload(cwd).into_iter().collect();
        Ok(Made { machine: name.clone(), folder: folder.clone(), ready, notes })
    })();
    unfinished.conclude(context, &folder, made)
}

/// Exchanges both folders. The mark of an unfinished machine goes with the old one.
fn exchange(folder: &Path, new: &Path) -> Result<()> {
    set_mark(folder)?;
    renameat_with(CWD, new, CWD, folder, RenameFlags::EXCHANGE)
        .map_err(|error| Error::io("replace the machine in", folder, &error.into()))?;
    sync_name(folder)?;
    super::unfinished::remove_folder(new)
}
