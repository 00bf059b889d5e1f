//! Leftovers of runs: processes, disks, sockets, unfinished files.

use std::fs;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

use crate::error::{Context, Error};
use crate::{Result, processes};

/// Returns all processes with the folder on their command line, except programs with these names.
pub fn processes_below(root: &Path, without: &[&str]) -> Result<Vec<(Pid, String)>> {
    let root = root.display().to_string();
    let is_known = |command: &str| {
        let program = command.split(' ').next().unwrap_or_default();
        without.iter().any(|name| Path::new(program).ends_with(name))
    };
    let ours = |(_, command): &(Pid, String)| command.contains(&root) && !is_known(command);
    Ok(processes::list()?.into_iter().filter(ours).collect())
}

/// Returns the only process with that disk on its command line for which `is_qemu` is true.
pub fn qemu_on(disk: &Path, is_qemu: impl Fn(&str) -> bool) -> Result<Pid> {
    let disk = disk.display().to_string();
    let of_it = |(_, command): &(Pid, String)| command.contains(&disk) && is_qemu(command);
    let found: Vec<_> = processes::list()?.into_iter().filter(of_it).collect();
    match found.as_slice() {
        [(qemu, _)] => Ok(*qemu),
        other => Err(Error::new(format!("{} processes run on {disk}, not one: {other:?}", other.len()))),
    }
}

/// Ends a lab: kills the processes that are left, and expects that there were no leftovers unless somebody has reported
/// them.
///
/// # Panics
/// As [`expect_none`].
pub fn end(left: Result<Vec<String>>, processes: &[(Pid, String)], are_reported: bool) {
    kill(processes);
    if !are_reported {
        expect_none(left);
    }
}

pub(super) fn kill(processes: &[(Pid, String)]) {
    for (process, _) in processes {
        // The process may have ended meanwhile.
        let _ = kill_process(*process, Signal::KILL);
    }
}

/// Expects that a lab has no leftovers, unless the test has failed anyway.
///
/// # Panics
/// There are leftovers.
fn expect_none(left: Result<Vec<String>>) {
    if !std::thread::panicking() {
        assert_eq!(left, Ok(Vec::new()), "leftovers of a run");
    }
}

/// Adds the files of runs below `folder` to `left`.
pub fn collect_files(folder: &Path, left: &mut Vec<String>) -> Result<()> {
    let what = || format!("looking through {}", folder.display());
    for entry in fs::read_dir(folder).context(what)? {
        let entry = entry.context(what)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_folder = entry.file_type().context(what)?.is_dir();
        if is_folder {
            collect_files(&entry.path(), left)?;
        }
        let is_disk = is_overlay(&name);
        let is_socket = name.starts_with("qemu_") && name.ends_with(".sock");
        let is_record = [".starting", ".standby", ".run"].iter().any(|kind| name.ends_with(kind));
        let is_socket = is_socket || is_record && folder.ends_with("machinery-host/qemu/state");
        if name.starts_with(".unfinished-") || !is_folder && (is_disk || is_socket) {
            left.push(entry.path().display().to_string());
        }
    }
    Ok(())
}

/// Reports whether this is an overlay's name: `m_disposable.qcow2`, or `m_disposable_2.qcow2` of another
/// image.
fn is_overlay(name: &str) -> bool {
    let number = name.strip_suffix(".qcow2").and_then(|name| name.rsplit_once("_disposable"));
    number.is_some_and(|(_, number)| number.chars().all(|c| c == '_' || c.is_ascii_digit()))
}
