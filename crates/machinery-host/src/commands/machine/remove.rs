//! `machine remove`: removes a machine's entry, and its files.
//!
//! ```text
//! mark the folder ─▶ remove the entry ─▶ a running host gives the machine up ─▶ remove the folder
//! ```
//!
//! The mark has the next command finish a removal that was killed.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use machinery::{Error, Result, format_bytes};
use serde::Serialize;
use serde_json::{Value, json};
use serde_yaml::Mapping;

use super::context::{Context, KVM};
use super::dependents::expect_no_dependents;
use super::domain::Recorded;
use super::host;
use super::info::{Info, entries, files_of, machinery_of};
use super::kvm;
use super::section::{expect_no_section, lock_configuration, section_of};
use super::unfinished::Unfinished;
use crate::commands::import;
use crate::cwd::{Cwd, make_state_folder};

/// The machine to remove.
#[derive(Debug, Clone, Args)]
pub struct Remove {
    /// Name of the machine
    pub name: String,
    /// Remove the disk, the snapshot and the description of a machine that another tool has made
    #[arg(long)]
    pub files: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
}

/// A machine that was removed.
#[derive(Debug, Serialize)]
pub struct Removed {
    pub machine: String,
    /// The files, or the folder with all of them.
    pub removed: Vec<PathBuf>,
    /// Facts that the operator has to know.
    pub notes: Vec<String>,
}

impl Remove {
    /// Asks the operator whether the machine is to be removed.
    ///
    /// # Errors
    /// The operator refuses, or cannot be asked.
    pub fn confirm(&self, cwd: &Cwd) -> Result<()> {
        let paths = self.paths(cwd)?;
        if self.yes {
            return Ok(());
        }
        if !io::stdin().is_terminal() {
            return Err(Error::configuration("nobody can be asked whether the machine is to be removed")
                .machine(&self.name)
                .advice("Give --yes"));
        }
        let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        let size: u64 = paths.iter().map(|path| size_of(path)).sum();
        eprint!(
            "Remove the machine '{}' with {} in {}? [y/N] ",
            self.name,
            format_bytes(size),
            names.join(", ")
        );
        let mut answer = String::new();
        let asked = io::stderr().flush().and_then(|()| io::stdin().read_line(&mut answer));
        asked.map_err(|error| Error::environment(format!("cannot ask: {error}")))?;
        match answer.trim() {
            "y" | "Y" | "yes" => Ok(()),
            _ => Err(Error::failed("the machine was not removed").machine(&self.name)),
        }
    }

    /// Returns the paths to remove: the folder of a machine that this program has made, or else the machine's files.
    fn paths(&self, cwd: &Cwd) -> Result<Vec<PathBuf>> {
        if machinery_of(cwd, &self.name)? == KVM {
            let found = kvm::find(cwd, &self.name)?;
            expect_no_dependents(cwd, &self.name, std::slice::from_ref(&found.folder))?;
            return Ok(vec![found.folder]);
        }
        let files = files_of(cwd, &self.name)?;
        if let Some(folder) = own_folder(&files) {
            expect_no_dependents(cwd, &self.name, &[folder.to_owned()])?;
            return Ok(vec![folder.to_owned()]);
        }
        if self.files {
            expect_no_dependents(cwd, &self.name, &files)?;
            // Links, and not their targets.
            let entry = entries(cwd)?.into_iter().find(|entry| entry.name == self.name);
            return Ok(entry.map(|entry| entry.paths).unwrap_or_default());
        }
        Err(Error::configuration("`machine create` has not made this machine")
            .machine(&self.name)
            .advice("Remove its entry from qemu.yaml by hand, or give --files to remove its files, too"))
    }
}

/// Returns the folder of a machine that this program has made.
fn own_folder(files: &[PathBuf]) -> Option<&Path> {
    let folder = files.first()?.parent()?;
    let is_alone = files.iter().all(|file| file.parent() == Some(folder));
    (is_alone && Info::read(folder).is_ok()).then_some(folder)
}

/// Returns the bytes on disk of a file, or of the files in a folder.
fn size_of(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let blocks = |path: &Path| path.symlink_metadata().map_or(0, |found| found.blocks() * 512);
    let inner = fs::read_dir(path).into_iter().flatten().flatten();
    blocks(path) + inner.map(|entry| blocks(&entry.path())).sum::<u64>()
}

/// Removes the machine.
///
/// # Errors
/// A host uses the machine, another machine needs its files, or the configuration cannot be changed.
pub fn remove(context: &Context<'_>, remove: &Remove) -> Result<Removed> {
    let (cwd, name) = (context.cwd, &remove.name);
    let paths = remove.paths(cwd)?;
    let section = own_section(cwd, name, &paths)?;
    if section.is_none() {
        expect_no_section(context.config, context.machinery, name)?;
    }
    make_state_folder(cwd)?;
    let _absent = host::keep_out(cwd)?;
    let machines = host::machines_of(cwd, context.machinery, std::slice::from_ref(name))?;
    host::expect_unused(&machines)?;
    let mut mark = begin(context, name, &machines)?;
    if let Some((mark, keys)) = mark.as_mut().zip(section.as_ref()) {
        mark.record_section(keys)?;
    }
    let lock = lock_configuration(cwd)?;
    let given_up = remove_from_configuration(context, name, section.is_some(), &machines);
    drop(lock);
    if let Err(error) = given_up {
        mark.map_or(Ok(()), |mark| mark.finish(cwd, &paths[0]))?;
        return Err(error.machine(name));
    }
    // The machine is removed by now: files that remain are no failure, and the next command removes them.
    let removed = mark.map_or_else(|| remove_files(&paths), |mark| mark.clear(context));
    let notes = removed.err().map(|error| error.to_string());
    Ok(Removed { machine: name.clone(), removed: paths, notes: notes.into_iter().collect() })
}

/// Marks the folder of a machine that this program has made. `machines` are those of a running host.
fn begin(context: &Context<'_>, name: &str, machines: &[Value]) -> Result<Option<Unfinished>> {
    let cwd = context.cwd;
    if context.machinery == KVM {
        let found = kvm::find(cwd, name)?;
        // A host that runs knows the state of its machines, and ends a standby itself.
        if machines.is_empty() {
            kvm::expect_off(&found.domain).map_err(|error| error.machine(name))?;
        }
        let domain = Some(Recorded::whole(&found.domain));
        return Unfinished::begin_removal(cwd, name, &found.folder, domain).map(Some);
    }
    let folder = own_folder(&files_of(cwd, name)?).map(Path::to_owned);
    folder.map(|folder| Unfinished::begin_removal(cwd, name, &folder, None)).transpose()
}

/// Removes the machine's entry and its section, and has a running host give up these machines.
///
/// # Errors
/// A file cannot be changed, or the host uses a machine. The configuration is as it was then.
fn remove_from_configuration(
    context: &Context<'_>,
    name: &str,
    has_section: bool,
    machines: &[Value],
) -> Result<()> {
    let cwd = context.cwd;
    let (yaml, host_yaml) = (cwd.machinery_yaml(context.machinery), cwd.host_yaml());
    let entry = import::remove(&yaml, name)?;
    let section = has_section.then(|| section_of(name).remove(&host_yaml)).transpose();
    let (given_up, section) = match section {
        Ok(section) => (give_up(cwd, machines), section),
        Err(error) => (Err(error), None),
    };
    given_up.or_else(|error| {
        section.map_or(Ok(()), |section| import::restore(&host_yaml, &section))?;
        import::restore(&yaml, &entry)?;
        let _ = host::ask(cwd, json!({"action": "reload"}));
        Err(error)
    })
}

/// Returns the section of a machine for which `machine create` has written one. `paths` are the machine's folder, or its
/// files.
fn own_section(cwd: &Cwd, name: &str, paths: &[PathBuf]) -> Result<Option<Mapping>> {
    let is_written = |path: &PathBuf| Info::read(path).is_ok_and(|info| info.machine.guest_ip.is_some());
    match paths.iter().any(is_written) {
        true => section_of(name).content(&cwd.host_yaml()),
        false => Ok(None),
    }
}

/// Has a running host give up these machines.
fn give_up(cwd: &Cwd, machines: &[Value]) -> Result<()> {
    let failed = |why| Error::failed(format!("the running host has not reloaded its configuration: {why}"));
    let Some(answer) = host::act(cwd, json!({"action": "reload"})).map_err(failed)? else { return Ok(()) };
    let is_deferred = |machine: &&Value| {
        answer["deferred"].as_array().is_some_and(|deferred| deferred.contains(&machine["name"]))
    };
    match machines.iter().find(is_deferred) {
        None => Ok(()),
        Some(machine) => Err(Error::unexpected_state(format!(
            "the running host uses the machine '{}'",
            host::name(machine)
        ))
        .advice("Stop it first")),
    }
}

fn remove_files(files: &[PathBuf]) -> Result<()> {
    for file in files {
        match fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("remove", file, &error));
            }
            _ => {}
        }
    }
    // A folder with other files remains.
    files.iter().filter_map(|file| file.parent()).for_each(|folder| drop(fs::remove_dir(folder)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::machine::host::tests::{cwd, host};

    #[test]
    fn removal_is_refused_when_the_host_defers_that_of_a_clone() {
        let folder = tempfile::tempdir().unwrap();
        let cwd = cwd(folder.path());
        let machines = [json!({"name": "w-1", "clone_of": "w"}), json!({"name": "w-2", "clone_of": "w"})];
        let reloaded = |deferred: Value| json!({"success": true, "deferred": deferred});
        host(&cwd, vec![reloaded(json!(["w-2"])), reloaded(json!(["other"]))]);
        assert!(give_up(&cwd, &machines).unwrap_err().to_string().contains("'w-2'"));
        give_up(&cwd, &machines).unwrap();
    }

    #[test]
    fn link_of_a_machine_is_removed_and_its_target_stays() {
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("target"), folder.path().join("link"));
        fs::write(&target, "").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        remove_files(&[link.clone(), folder.path().join("none")]).unwrap();
        assert!(target.exists() && link.symlink_metadata().is_err());
    }
}
