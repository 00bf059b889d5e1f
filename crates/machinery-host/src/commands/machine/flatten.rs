//! Flattens a machine's disk: `qemu-img` writes a disk with the content of all files on which the machine's own depends.
//!
//! The guest has written to the disk, so it may attack the program that reads it. The program is in the
//! [jail](crate::jail): it may read the files of the disk, as far as the plugin accepts them, and write the new one.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use machinery::trust::expect_trusted;
use machinery::{Error, Result};
use machinery_images::{ChainRules, TrustedChain};
use machinery_jail::{Limits, Policy};
use rustix::process::{Signal, geteuid, set_parent_process_death_signal};
use serde_json::Value;

use super::context::{Context, MACHINERY};
use super::folder::free_space;
use super::make::binaries;
use crate::config::Config;
use crate::jail;

/// The mode of the new disk.
const MODE: u32 = 0o600;

/// Returns the files that hold the content of a machine's disk. The rules are those by which the plugin restores it.
///
/// # Errors
/// A file is missing, or breaks a rule.
pub fn files_of_disk(disk: &Path) -> Result<Vec<PathBuf>> {
    let rules = ChainRules { owners: vec![0, geteuid().as_raw()], raw_folders: Vec::new() };
    TrustedChain::of(disk, Some("qcow2"), &rules).map(|chain| chain.files)
}

/// Returns the bytes of these files that are on disk.
pub fn used<'a>(files: impl IntoIterator<Item = &'a PathBuf>) -> u64 {
    files.into_iter().map(|file| file.metadata().map_or(0, |found| found.blocks() * 512)).sum()
}

/// Writes the content of the disk, which is in these files, into a new disk: the present one, or that of a snapshot.
///
/// # Errors
/// `qemu-img` cannot be run or confined, or fails.
pub fn flatten(context: &Context<'_>, files: Vec<PathBuf>, snapshot: Option<&str>, to: &Path) -> Result<()> {
    let program = binaries(context)?.qemu_img;
    let space = free_space(context.config, to.parent().unwrap_or(to))?;
    convert(&program, is_confined(context.config)?, files, snapshot, to, space)
}

/// Reports whether the jail of the machinery is on. Strict is about machines.
fn is_confined(config: &Config) -> Result<bool> {
    let Some(file) = &config.host_file else { return Ok(true) };
    Ok(file.parse::<Value>()?["machineries"][MACHINERY]["jail"] != "off")
}

/// Makes an overlay on a disk with these files, of this size.
///
/// # Errors
/// As [`flatten`].
pub fn overlay(context: &Context<'_>, files: Vec<PathBuf>, size: u64, to: &Path) -> Result<()> {
    let program = binaries(context)?.qemu_img;
    let space = free_space(context.config, to.parent().unwrap_or(to))?;
    let base = files.first().cloned().unwrap_or_default();
    let size = size.to_string();
    // The program does not open the disk.
    let args = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"].map(OsStr::new);
    let args = args.into_iter().chain([base.as_os_str(), to.as_os_str(), OsStr::new(&size)]);
    let made = write(&program, is_confined(context.config)?, files.clone(), to, space, args);
    made.map_err(|error| error.action(format!("making an overlay on {}", base.display())))
}

/// Runs `qemu-img`, which may write that many bytes.
fn convert(
    program: &Path,
    is_confined: bool,
    files: Vec<PathBuf>,
    snapshot: Option<&str>,
    to: &Path,
    space: u64,
) -> Result<()> {
    let from = files.first().cloned().unwrap_or_default();
    // A comma in a value is written twice.
    let named = snapshot.map(|name| format!("snapshot.name={}", name.replace(',', ",,")));
    // A machine's disk, of which each run has an overlay.
    let form = snapshot.map(|_| "lazy_refcounts=on,cluster_size=2M");
    let args = ["convert", "-q", "-f", "qcow2", "-O", "qcow2"].map(OsStr::new).into_iter();
    let args = args.chain(named.iter().flat_map(|name| [OsStr::new("-l"), OsStr::new(name)]));
    let args = args.chain(form.iter().flat_map(|form| [OsStr::new("-o"), OsStr::new(form)]));
    let args = args.chain([from.as_os_str(), to.as_os_str()]);
    let written = write(program, is_confined, files.clone(), to, space, args);
    written.map_err(|error| error.action(format!("flattening {}", from.display())))
}

/// Runs `qemu-img` with these arguments, which reads these files, and may write that many bytes into the new disk.
fn write<'a>(
    program: &Path,
    is_confined: bool,
    files: Vec<PathBuf>,
    to: &Path,
    space: u64,
    args: impl Iterator<Item = &'a OsStr>,
) -> Result<()> {
    let program = expect_trusted(program)?;
    let new = File::options().write(true).create_new(true).mode(MODE).open(to);
    new.map_err(|error| Error::io("write", to, &error))?;
    let mut command = if is_confined {
        let limits = Limits { file_size: Some(space), ..Limits::default() };
        let policy = Policy { read: files, write: vec![to.to_owned()], limits, ..Policy::default() };
        jail::command(&program, &policy, "jail: off")?
    } else {
        Command::new(&program)
    };
    command.args(args).stdin(Stdio::null());
    // SAFETY: the closure only makes a system call. An interrupted command executes another program, which ends this one.
    unsafe { command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?)) };
    let ran = command.output().map_err(|error| Error::io("run", &program, &error))?;
    if ran.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&ran.stderr).trim().to_owned();
    let why = if why.is_empty() { ran.status.to_string() } else { why };
    Err(Error::failed(format!("{} has failed: {why}", program.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    /// Creates a program that writes beside itself, where nothing permits it, and then into the new disk.
    fn program(folder: &Path) -> PathBuf {
        let path = folder.join("qemu-img");
        let script = "#!/bin/sh\necho > \"${0%/*}/ran\"\nfor last; do :; done\necho flat > \"$last\"\n";
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn program_writes_the_new_disk_and_nothing_else_when_it_is_confined() {
        let folder = tempfile::tempdir().unwrap();
        let (program, path) = (program(folder.path()), |name: &str| folder.path().join(name));
        fs::write(path("disk"), "").unwrap();
        for (is_confined, to) in [(true, "confined"), (false, "open")] {
            convert(&program, is_confined, vec![path("disk")], None, &path(to), 1 << 20).unwrap();
            assert_eq!(fs::read_to_string(path(to)).unwrap(), "flat\n");
            assert_eq!(path("ran").exists(), !is_confined);
        }
        // A disk that never ends does not fill the file system.
        let failed =
            convert(&program, true, vec![path("disk")], None, &path("large"), 2).unwrap_err().to_string();
        assert!(failed.contains("flattening"), "{failed}");
        assert!(fs::metadata(path("large")).unwrap().len() <= 2);
    }

    #[test]
    fn program_is_not_run_when_other_users_can_change_it() {
        let folder = tempfile::tempdir().unwrap();
        let program = program(folder.path());
        fs::set_permissions(&program, Permissions::from_mode(0o777)).unwrap();
        let refused =
            convert(&program, false, vec!["from".into()], None, &folder.path().join("to"), 9).unwrap_err();
        assert!(refused.to_string().contains("other users could modify it"), "{refused}");
        assert!(!folder.path().join("ran").exists());
    }

    #[test]
    fn disk_is_refused_when_its_header_names_a_file_that_its_guest_may_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk.qcow2");
        let mut make = Command::new("qemu-img");
        make.args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/hostname"])
            .arg(&disk)
            .arg("1M");
        assert!(make.status().unwrap().success());
        let refused = files_of_disk(&disk).unwrap_err().to_string();
        assert!(refused.contains("/etc/hostname") && refused.contains("outside"), "{refused}");
    }
}
