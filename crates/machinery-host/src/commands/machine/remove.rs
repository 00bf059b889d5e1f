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
use serde_json::json;

use super::context::{Context, MACHINERY};
use super::info::{Info, files_of, others_in};
use super::publish::{ask, expect_unused, lock_configuration};
use super::unfinished::{Unfinished, remove_folder};
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
        let files = files_of(cwd, &self.name)?;
        if let Some(folder) = own_folder(&files) {
            let others = others_in(cwd, folder, &self.name)?;
            if !others.is_empty() {
                let reason =
                    format!("other machines have files in {}: {}", folder.display(), others.join(", "));
                return Err(Error::configuration(reason)
                    .machine(&self.name)
                    .advice("Remove these machines first"));
            }
            return Ok(vec![folder.to_owned()]);
        }
        if self.files {
            return Ok(files);
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
/// A host uses the machine, or a file cannot be removed.
pub fn remove(context: &Context<'_>, remove: &Remove) -> Result<Removed> {
    let (cwd, name) = (context.cwd, &remove.name);
    let paths = remove.paths(cwd)?;
    expect_unused(cwd, name)?;
    let folder = own_folder(&files_of(cwd, name)?).map(Path::to_owned);
    let mark = folder.as_ref().map(|folder| Unfinished::begin_removal(cwd, name, folder)).transpose()?;
    make_state_folder(cwd)?;
    let lock = lock_configuration(cwd)?;
    let yaml = cwd.machinery_yaml(MACHINERY);
    let given_up = import::remove(&yaml, name).and_then(|before| {
        give_up(cwd, name).or_else(|error| {
            import::restore(&yaml, &before)?;
            let _ = ask(cwd, json!({"action": "reload"}));
            Err(error)
        })
    });
    drop(lock);
    if let Err(error) = given_up {
        mark.map_or(Ok(()), |mark| mark.finish(cwd, folder.as_deref().unwrap_or(Path::new("/"))))?;
        return Err(error.machine(name));
    }
    match &folder {
        Some(folder) => remove_folder(folder)?,
        None => remove_files(&paths)?,
    }
    mark.map_or(Ok(()), |mark| mark.finish(cwd, folder.as_deref().unwrap_or(Path::new("/"))))?;
    Ok(Removed { machine: name.clone(), removed: paths })
}

/// Has a running host give the machine up.
fn give_up(cwd: &Cwd, name: &str) -> Result<()> {
    let Some(answer) = ask(cwd, json!({"action": "reload"})) else { return Ok(()) };
    let answer = answer?;
    if answer["success"] != json!(true) {
        let why = answer["reason"].as_str().unwrap_or_default();
        return Err(Error::failed(format!("the running host has not reloaded its configuration: {why}")));
    }
    let is_deferred = answer["deferred"].as_array().is_some_and(|machines| machines.contains(&json!(name)));
    if is_deferred {
        Err(Error::unexpected_state("the running host uses the machine").advice("Stop it first"))
    } else {
        Ok(())
    }
}

fn remove_files(files: &[PathBuf]) -> Result<()> {
    for file in files {
        fs::remove_file(file).map_err(|error| Error::io("remove", file, &error))?;
    }
    // A folder with other files remains.
    files.iter().filter_map(|file| file.parent()).for_each(|folder| drop(fs::remove_dir(folder)));
    Ok(())
}
