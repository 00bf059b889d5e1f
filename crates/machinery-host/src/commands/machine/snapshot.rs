//! `machine snapshot`: takes the snapshot of a machine anew, from a cold boot of the disk that the machine was made of.
//!
//! ```text
//! boot, save and restore in a folder beside the machine's ─▶ exchange both folders ─▶ remove the old one
//! ```
//!
//! The exchange is atomic: at each moment, the machine has the old disk and snapshot, or the new ones.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use machinery::{Error, RestoreReadiness, Result};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde_json::json;

use super::create::lock_base;
use super::info::{DISK, INFO, Info, MEMORY, files_of};
use super::make::{Plan, make};
use super::options::Ready;
use super::publish::{Made, ask, expect_unused, reload};
use super::unfinished::{MARK, Unfinished};
use super::{Context, finish_or_clear};

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
    let held = hold(context, name);
    let made = held.and_then(|_held| {
        let plan = Plan { info, base, files: other_files(&folder)?, ready: &snapshot.ready };
        let readiness = make(context, &plan, &mut unfinished)?;
        expect_unused(cwd, name)?;
        exchange(&folder, unfinished.machine_folder())?;
        Ok(made(context, name, &folder, readiness))
    });
    finish_or_clear(context, unfinished, &folder, made)
}

fn made(context: &Context<'_>, name: &str, folder: &Path, ready: RestoreReadiness) -> Made {
    let notes = reload(context.cwd).into_iter().collect();
    Made { machine: name.to_owned(), folder: folder.to_owned(), ready, notes }
}

/// Returns the further files in the machine's folder, such as its firmware's variables.
pub fn other_files(folder: &Path) -> Result<Vec<(PathBuf, String)>> {
    let entries = fs::read_dir(folder).map_err(|error| Error::io("look into", folder, &error))?;
    let files = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    let named = files.filter_map(|entry| Some((entry.path(), entry.file_name().into_string().ok()?)));
    let is_own = |name: &str| [DISK, MEMORY, INFO, MARK].contains(&name) || name.contains("_disposable");
    Ok(named.filter(|(_, name)| !is_own(name) && !name.ends_with(".log")).collect())
}

/// Exchanges both folders. The mark of an unfinished machine goes with the old one.
fn exchange(folder: &Path, new: &Path) -> Result<()> {
    let mark = folder.join(MARK);
    fs::write(&mark, "").map_err(|error| Error::io("write", &mark, &error))?;
    renameat_with(CWD, new, CWD, folder, RenameFlags::EXCHANGE)
        .map_err(|error| Error::io("replace the machine in", folder, &error.into()))?;
    super::unfinished::remove_folder(new)
}

/// A machine that a running host gives to no task meanwhile.
struct Held<'a>(&'a Context<'a>, Option<&'a str>);

/// Has a running host give the machine to nobody, unless it does not do so anyway.
fn hold<'a>(context: &'a Context<'a>, name: &'a str) -> Result<Held<'a>> {
    let reason = "its snapshot is taken anew";
    let disable = json!({"action": "disable_machine", "machine": name, "reason": reason});
    let is_enabled = || {
        let list = ask(context.cwd, json!({"action": "list"}))?.ok()?;
        let machine =
            list["machines"].as_array()?.iter().find(|machine| machine["name"] == json!(name))?.clone();
        (machine["disabled"] == json!(false)).then_some(())
    };
    if is_enabled().is_none() {
        return Ok(Held(context, None));
    }
    ask(context.cwd, disable).transpose()?;
    let held = Held(context, Some(name));
    // A standby has the machine's tap, and its address.
    ask(context.cwd, json!({"action": "stop", "machine": name})).transpose()?;
    expect_unused(context.cwd, name)?;
    Ok(held)
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Some(name) = self.1 {
            let _ = ask(self.0.cwd, json!({"action": "enable_machine", "machine": name}));
        }
    }
}
