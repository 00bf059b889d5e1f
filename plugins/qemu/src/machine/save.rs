//! Saves a run: its memory becomes a snapshot, and its disk's overlay a disk.
//!
//! ```text
//! pause ─▶ memory to a file ─▶ second name for the overlay ─▶ QEMU ends ─▶ the disk is the host's own
//! ```
//!
//! QEMU's end removes the overlay's first name. The disk depends on the machine's disk, as the overlay does.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::Path;
use std::sync::Arc;

use machinery::{Deadline, Error, Result};
use machinery_backend::{Operation, refuse};
use rustix::process::{getegid, geteuid};

use super::base::Machine;
use super::state::finish;
use crate::machineinfo::StartArgs;
use crate::memory;
use crate::options::Options;
use crate::run::Run;
use crate::save::save_memory;
use crate::tpm;

/// The mode of a disk: the machine's own user reads it.
const DISK_MODE: u32 = 0o644;

impl Machine {
    /// Saves the run, and ends it.
    ///
    /// # Errors
    /// A file exists: the run continues. The machine is off, or cannot be saved: the run has ended then, too.
    pub(super) fn save_run(&self, memory: &Path, disk: &Path, deadline: Deadline) -> Result<()> {
        // A failure removes both files.
        [memory, disk].into_iter().try_for_each(expect_new)?;
        let (saving, run) = self
            .work
            .begin(Operation::Stopping, deadline, |state| state.running().ok_or_else(refuse::off))?;
        let saved = self.write_run(&run, memory, disk, deadline);
        let ended = finish(&saving, run.end(deadline).map(|()| None));
        // The jail's user owns the overlay. QEMU has to be gone before the host trusts the file.
        let saved = saved.and(ended).and_then(|()| own(disk));
        if saved.is_err() {
            for file in [memory, disk] {
                // The first error is the one to report.
                let _ = fs::remove_file(file);
            }
        }
        saved
    }

    fn write_run(&self, run: &Arc<Run>, memory: &Path, disk: &Path, deadline: Deadline) -> Result<()> {
        let files = self.files();
        expect_one_disk(&files.start_args)?;
        self.shared.space.check(memory.parent().unwrap_or(memory))?;
        save_memory(run, memory, memory::max_dump(&files.start_args), deadline)?;
        if let Some((memory, state)) = run.tpm.as_ref().zip(files.start_args.tpm_state()) {
            tpm::save(memory, &disk.with_file_name(state))?;
        }
        fs::hard_link(&files.disposable, disk).map_err(|error| Error::io("make the disk", disk, &error))
    }
}

/// Expects that the disk is the only image whose changes are to be saved. The variables of the firmware are a part of the
/// guest's memory. Source: `pflash_post_load` in QEMU's hw/block/pflash_cfi01.c.
fn expect_one_disk(args: &StartArgs) -> Result<()> {
    let is_firmware = |(name, value): &(&str, &str)| {
        let options = Options::parse(value, "");
        let is_read_only = ["readonly", "read-only"].iter().any(|key| options.is_on(key));
        *name == "pflash" || *name == "drive" && options.get("if") == Some("pflash") && !is_read_only
    };
    if args.opened().images.len() <= args.options().filter(is_firmware).count() {
        return Ok(());
    }
    Err(Error::unsupported("saving a machine with a second disk")
        .advice("Make the second disk read-only (readonly=on), or remove it from the start_args"))
}

/// Expects that nothing exists at the path.
fn expect_new(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("look at", path, &error)),
        Ok(_) => Err(Error::environment(format!("cannot save to {}: it exists", path.display()))
            .advice("Name a path at which nothing exists")),
    }
}

/// Makes the file the host's own, which only the host may change.
fn own(disk: &Path) -> Result<()> {
    let taken = || -> io::Result<()> {
        let file = File::open(disk)?;
        fchown(&file, Some(geteuid().as_raw()), Some(getegid().as_raw()))?;
        file.set_permissions(Permissions::from_mode(DISK_MODE))?;
        file.sync_all()
    };
    taken().map_err(|error| Error::io("take the disk", disk, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_of_a_new_file_is_refused_when_something_exists_there() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("disk"), folder.path().join("link"));
        expect_new(&path).unwrap();
        std::os::unix::fs::symlink("/none/such", &link).unwrap();
        fs::write(&path, "of another machine").unwrap();
        assert!(expect_new(&path).is_err() && expect_new(&link).is_err());
    }

    #[test]
    fn second_disk_is_refused_and_firmware_is_not() {
        let firmware = ["-drive", "if=pflash,format=raw,unit=1,file=vars.fd"];
        let code = ["-drive", "if=pflash,format=raw,unit=0,readonly=on,file=/usr/share/OVMF/OVMF_CODE.fd"];
        let disk = ["-drive", "file=data.qcow2,if=virtio"];
        let expect = |args: &[[&str; 2]]| {
            let args = args.concat().into_iter().map(str::to_owned);
            expect_one_disk(&StartArgs::from_args(args)).is_ok()
        };
        assert!(expect(&[]) && expect(&[code, firmware]) && expect(&[["-pflash", "vars.fd"]]));
        assert!(!expect(&[disk]) && !expect(&[code, disk]) && !expect(&[code, firmware, disk]));
    }
}
