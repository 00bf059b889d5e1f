//! `machine snapshot`: takes the snapshot of a machine anew, from a cold boot of the disk that the machine was made of.
//!
//! ```text
//! boot, save and restore in a folder beside the machine's ─▶ exchange both folders ─▶ remove the old one
//! ```
//!
//! The exchange is atomic: at each moment, the machine has the old disk and snapshot, or the new ones. All other files in
//! the folder stay.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use machinery::{Error, Result};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::base::{expect_unchanged, identify};
use super::context::{Context, KVM};
use super::dependents::{dependents_of, lock_base, refuse};
use super::folder::{remove_folder, set_mark, sync, sync_name};
use super::host;
use super::info::{Info, files_of};
use super::kvm;
use super::make::{Plan, make, other_files};
use super::options::Ready;
use super::publish::Made;
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
/// A host uses the machine, another machine needs its present files, the guest is not ready in time, or a step fails.
/// The machine then is as it was.
pub fn snapshot(context: &Context<'_>, snapshot: &Snapshot) -> Result<Made> {
    let (cwd, name) = (context.cwd, &snapshot.name);
    snapshot.ready.expect_in_time()?;
    if context.machinery == KVM {
        return kvm::snapshot(context, name, &snapshot.ready);
    }
    let files = files_of(cwd, name)?;
    let folder = files[files.len() - 1].parent().unwrap_or(Path::new("/")).to_owned();
    let mut info = Info::read(&folder).map_err(|error| error.machine(name))?;
    if info.machine.copied_from.is_some() {
        return Err(Error::configuration(
            "the machine is the copy of a domain's snapshot, and has no disk to boot from",
        )
        .machine(name)
        .advice("Take the snapshot of the domain anew, remove the machine, and import the domain again"));
    }
    let Some(base) = info.machine.base.clone() else {
        return Err(Error::configuration("the machine is from an archive, which has no disk to boot from")
            .machine(name)
            .advice("Take the snapshot on the host that has made it, and export it again"));
    };
    expect_no_folders(&folder).map_err(|error| error.machine(name))?;
    let entries = entries_of(context, name, &files, &folder)?;
    host::expect_unused(&host::machines_of(cwd, context.machinery, &entries)?)?;
    let _base = lock_base(cwd, &base)?;
    let warnings = expect_unchanged(&info.machine)?;
    info.machine.base_files = identify(&base).map_err(|error| error.machine(name))?;
    let mut unfinished = Unfinished::begin(cwd, name, &folder.with_file_name(format!(".{name}.new")))?;
    let made = (|| {
        unfinished.hold(cwd, &entries)?;
        let mut files = other_files(&folder)?;
        // The installed disk boots with a new TPM, whose state the snapshot gets.
        files.retain(|(_, name)| info.machine.tpm_state.as_ref() != Some(name));
        let plan = Plan { info, files, ready: &snapshot.ready };
        let ready = make(context, &plan, &mut unfinished, &folder)?;
        let notes = publish(context, &entries, &folder, unfinished.machine_folder())?;
        let notes = warnings.into_iter().chain(notes).collect();
        Ok(Made { machine: name.clone(), folder: folder.clone(), ready, notes })
    })();
    unfinished.conclude(context, &folder, made)
}

/// Returns the entries that get the snapshot: the machine's, and others with the same files.
///
/// # Errors
/// A machine needs the present files, and would not get the new ones all at once.
fn entries_of(context: &Context<'_>, name: &str, files: &[PathBuf], folder: &Path) -> Result<Vec<String>> {
    let dependents = dependents_of(context.cwd, name, &[folder.to_owned()])?;
    let (same, others): (Vec<_>, Vec<_>) = dependents.into_iter().partition(|entry| entry.files() == files);
    refuse(name, others.iter())?;
    Ok([name.to_owned()].into_iter().chain(same.into_iter().map(|entry| entry.name)).collect())
}

/// Expects that the machine's folder has no folder, which cannot be in two places at once.
fn expect_no_folders(folder: &Path) -> Result<()> {
    match contents(folder)?.into_iter().find(|(path, _)| path.symlink_metadata().is_ok_and(|it| it.is_dir()))
    {
        None => Ok(()),
        Some((inner, _)) => {
            Err(Error::configuration(format!("the command has not made the folder {}", inner.display()))
                .advice("Move it to another place"))
        }
    }
}

/// Returns the paths of all that is in a folder, and their names.
fn contents(folder: &Path) -> Result<Vec<(PathBuf, OsString)>> {
    let failed = |error| Error::io("look into", folder, &error);
    let entries = fs::read_dir(folder).map_err(failed)?.collect::<std::io::Result<Vec<_>>>();
    Ok(entries.map_err(failed)?.iter().map(|entry| (entry.path(), entry.file_name())).collect())
}

/// Gives the new disk and snapshot to the machine and to a running host. Returns what the operator has to know.
fn publish(context: &Context<'_>, entries: &[String], folder: &Path, new: &Path) -> Result<Vec<String>> {
    let _absent = host::keep_out(context.cwd)?;
    // A host that has started meanwhile may have the machine for a task of an earlier one.
    host::wait_until_unused(context.cwd, context.machinery, entries, context.step)?;
    carry_over(folder, new)?;
    sync(new)?;
    exchange(folder, new)?;
    let mut notes: Vec<String> = host::reload(context.cwd).into_iter().collect();
    // The machine is finished by now: an old file that remains is no failure.
    notes.extend(remove_folder(new).err().map(|error| error.to_string()));
    Ok(notes)
}

/// Links the operator's files into the new folder, so that they are in both until the old one is removed.
fn carry_over(folder: &Path, new: &Path) -> Result<()> {
    for (path, name) in contents(folder)? {
        let to = new.join(name);
        if to.symlink_metadata().is_err() {
            fs::hard_link(&path, &to).map_err(|error| Error::io("keep", &path, &error))?;
        }
    }
    Ok(())
}

/// Exchanges both folders. The mark of an unfinished machine goes with the old one.
fn exchange(folder: &Path, new: &Path) -> Result<()> {
    set_mark(folder)?;
    renameat_with(CWD, new, CWD, folder, RenameFlags::EXCHANGE)
        .map_err(|error| Error::io("replace the machine in", folder, &error.into()))?;
    sync_name(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::machine::folder::MARK;
    use crate::commands::machine::info::DISK;

    #[test]
    fn exchange_keeps_the_operators_files_and_replaces_those_of_the_machine() {
        let root = tempfile::tempdir().unwrap();
        let (folder, new) = (root.path().join("m"), root.path().join(".m.new"));
        for (at, content) in [(&folder, "old"), (&new, "new")] {
            fs::create_dir(at).unwrap();
            fs::write(at.join(DISK), content).unwrap();
        }
        fs::write(new.join(MARK), "").unwrap();
        for name in ["notes.log", ".hidden", "m_disposable.txt"] {
            fs::write(folder.join(name), "the operator's").unwrap();
        }
        std::os::unix::fs::symlink("/none", folder.join("link")).unwrap();
        expect_no_folders(&folder).unwrap();
        carry_over(&folder, &new).unwrap();
        exchange(&folder, &new).unwrap();
        remove_folder(&new).unwrap();
        assert_eq!(fs::read_to_string(folder.join(DISK)).unwrap(), "new");
        for name in ["notes.log", ".hidden", "m_disposable.txt"] {
            assert_eq!(fs::read_to_string(folder.join(name)).unwrap(), "the operator's");
        }
        assert_eq!(fs::read_link(folder.join("link")).unwrap(), Path::new("/none"));
        fs::create_dir(folder.join("inner")).unwrap();
        assert!(expect_no_folders(&folder).unwrap_err().to_string().contains("inner"));
    }
}
