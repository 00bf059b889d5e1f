//! Detection of foreign work in a domain that is off: changes by somebody else. Automatic work never destroys
//! it.
//!
//! A revert discards changes of a disk that are in no snapshot, and makes a managed save worthless. That is
//! right for changes by the host's own runs, and for foreign work only on request. Before the host prepares a
//! machine automatically, each disk that the guest can write to must meet one of these conditions:
//!
//! - The disk has no changes that are in none of its snapshots, so nothing can be lost. This is true after a
//!   revert without later writes, and after a snapshot that somebody has just taken.
//! - The disk is the file at the end of the last own run, written at the same nanosecond: [`DiskRecord`].
//! - The disk is no file on this computer, such as a device, and libvirt has reported only own runs since the
//!   last own run ended.
//!
//! Any other disk may have foreign work.

use std::fs;
use std::path::{Path, PathBuf};

use machinery_backend::files;
use machinery_images::{FileId, has_unsaved_changes};
use virt::domain::Domain;

use crate::description::Description;
use crate::domain;
use crate::dsn::is_local;
use crate::errors::explain;

/// A record of one machine's disks at the end of the last own run.
#[derive(Debug, Clone)]
pub struct DiskRecord {
    path: PathBuf,
}

/// The file of a disk that the guest can write to; `None` if the disk has no file on this computer.
pub type DiskFile = Option<PathBuf>;

impl DiskRecord {
    /// Opens the record of that machine, in the machinery's state folder.
    pub fn of(machine: &str, state_dir: &Path) -> Self {
        DiskRecord { path: state_dir.join(format!("{machine}.disks")) }
    }

    /// Records these disks after an own run, which was the last to write to them. A failure is only logged:
    /// the host then does not prepare the machine automatically.
    pub fn save(&self, disks: &[DiskFile]) {
        let states: Vec<FileId> = disks.iter().flatten().filter_map(|disk| file_id(disk)).collect();
        if let Err(error) = files::replace_json(&self.path, &states) {
            tracing::warn!(%error, "the disks' state after the run is not recorded");
        }
    }

    /// Describes the foreign work that a revert would discard, for people. The domain is off.
    /// `only_ours` is true if libvirt has reported only own runs since the last own run ended.
    pub fn foreign_work(&self, domain: &Domain, only_own_runs: bool) -> Option<String> {
        if has_managed_save(domain) {
            return Some("it has a managed save, which a revert would make worthless".to_owned());
        }
        let disks = match disks_of(domain) {
            Ok(disks) => disks,
            Err(error) => return Some(error.to_string()),
        };
        let known = self.read();
        disks.iter().find_map(|disk| foreign_changes(disk.as_deref(), &known, only_own_runs))
    }

    fn read(&self) -> Vec<FileId> {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }
}

/// Returns the disks that the guest can write to, and the variables of its firmware if a snapshot holds them.
/// The disks of a libvirt on another computer have no files here.
///
/// # Errors
/// libvirt cannot describe the domain.
pub fn disks_of(domain: &Domain) -> machinery::Result<Vec<DiskFile>> {
    let failed = |error| explain("describe the domain", &error);
    let uri = domain.connect().and_then(|connect| connect.uri()).map_err(failed)?;
    let written = written_files(&domain::described(domain)?);
    Ok(written.into_iter().map(|file| file.filter(|_| is_local(&uri))).collect())
}

fn written_files(described: &Description) -> Vec<DiskFile> {
    let disks = described.writable_disks().map(|disk| disk.path.clone());
    let firmware = &described.firmware;
    let variables = firmware.nvram.clone().filter(|_| firmware.nvram_is_qcow2).map(Some);
    disks.chain(variables).collect()
}

/// Returns the reason why the disk may have foreign work, if it may.
fn foreign_changes(disk: Option<&Path>, known: &[FileId], only_own_runs: bool) -> Option<String> {
    let Some(disk) = disk else {
        return (!only_own_runs).then(|| {
            "a disk of its domain is no file on this computer, so the last writer is unknown".to_owned()
        });
    };
    let changes = has_unsaved_changes(disk);
    if changes == Ok(Some(false)) {
        return None;
    }
    match file_id(disk) {
        Some(state) if known.contains(&state) => None,
        Some(_) if changes == Ok(Some(true)) => Some(format!(
            "its disk {} has changes that are in no snapshot and that no run of this host has made",
            disk.display()
        )),
        Some(_) => Some(format!("its disk {} was changed after the last run of this host", disk.display())),
        None if only_own_runs => None,
        None => Some(format!("the last writer of its disk {} is unknown", disk.display())),
    }
}

/// Returns an identity that differs between states of the disk; `None` for a device, which has no such
/// identity.
fn file_id(disk: &Path) -> Option<FileId> {
    let is_file = fs::metadata(disk).is_ok_and(|file| file.is_file());
    if is_file { FileId::of_content(disk).ok() } else { None }
}

/// Reports whether libvirt has saved the domain's memory, from which the next start would resume.
pub fn has_managed_save(domain: &Domain) -> bool {
    domain.has_managed_save(0).unwrap_or_else(|error| {
        // Some drivers do not support managed saves.
        tracing::debug!(%error, "libvirt does not report managed saves");
        false
    })
}

/// Removes the domain's managed save, if there is one: its memory does not match the snapshot.
///
/// # Errors
/// libvirt cannot remove it.
pub fn remove_managed_save(domain: &Domain, machine: &str) -> machinery::Result<()> {
    if !has_managed_save(domain) {
        return Ok(());
    }
    tracing::warn!(
        machine,
        "the managed save of its domain is removed: the machine is reverted to its snapshot"
    );
    domain.managed_save_remove(0).map_err(|error| explain("remove the managed save", &error))
}

/// Returns the finding of `check` about the domain, which is off.
pub fn finding(machine: &str, domain: &Domain, state_dir: &Path) -> Option<String> {
    let work = DiskRecord::of(machine, state_dir).foreign_work(domain, true)?;
    Some(format!("machine '{machine}': {}", advice(machine, &work)))
}

/// Explains the consequences of the foreign work for the machine, for people.
pub fn advice(machine: &str, work: &str) -> String {
    format!(
        "it is not prepared automatically: {work}. Its next restore discards that, and so does \
         `cuckoo-machinery prepare {machine}`; take a snapshot of the domain to keep it"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_driver::TestDomain;
    use std::process::Command;

    fn run(program: &str, args: &[&str], image: &Path) {
        let ran = Command::new(program).args(args).arg(image).output().unwrap();
        assert!(ran.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&ran.stderr));
    }

    #[test]
    fn disk_is_foreign_when_it_changed_after_the_last_own_run() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.qcow2");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "size=1M"], &image);
        let write = |value: &str| run("qemu-io", &["-c", &format!("write -P {value} 0 512")], &image);
        write("1");
        run("qemu-img", &["snapshot", "-c", "clean"], &image);
        let record = DiskRecord::of("m", folder.path());
        let foreign = || foreign_changes(Some(&image), &record.read(), true);
        assert_eq!(foreign(), None, "the disk is unchanged since its snapshot");
        write("2");
        let why = foreign().unwrap();
        assert!(why.contains("disk.qcow2") && why.contains("in no snapshot"), "{why}");
        record.save(&[Some(image.clone()), None]);
        assert_eq!(foreign(), None, "the last changes are of an own run");
        write("3");
        assert!(foreign().is_some());
    }

    #[test]
    fn disk_without_snapshots_is_foreign_when_it_changed_after_the_last_own_run() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.raw");
        fs::write(&image, [0; 512]).unwrap();
        let why = foreign_changes(Some(&image), &[], true).unwrap();
        assert!(why.contains("after the last run of this host"), "{why}");
        let known = [file_id(&image).unwrap()];
        assert_eq!(foreign_changes(Some(&image), &known, true), None);
    }

    #[test]
    fn disk_without_a_file_is_foreign_until_an_own_run_has_ended() {
        for disk in [None, Some(Path::new("/none/disk")), Some(Path::new("/dev/null"))] {
            assert!(foreign_changes(disk, &[], false).is_some(), "{disk:?}");
            assert_eq!(foreign_changes(disk, &[], true), None, "{disk:?}");
        }
    }

    const DISKS: &str = "\
        <disk type='file' device='disk'><source file='/none/disk'/><target dev='vda'/></disk>\
        <disk type='file' device='disk'><source file='/none/data'/><target dev='vdb'/><readonly/></disk>\
        <disk type='file' device='cdrom'><source file='/none/iso'/><target dev='sda' bus='sata'/></disk>";

    #[test]
    fn disks_of_a_domain_are_those_that_its_guest_can_write_to() {
        let test = TestDomain::with_devices(DISKS, "foreign-disks");
        let disk = Some(PathBuf::from("/none/disk"));
        assert_eq!(disks_of(&test.domain).unwrap(), std::slice::from_ref(&disk));
        let written = |nvram: &str| {
            let firmware = format!("<os><nvram{nvram}>/none/vars</nvram></os>");
            let xml = format!("<domain>{firmware}<devices>{DISKS}</devices></domain>");
            written_files(&Description::read(&xml).unwrap())
        };
        assert_eq!(written(" format='qcow2'"), [disk.clone(), Some("/none/vars".into())]);
        assert_eq!(written(""), [disk], "no snapshot holds these variables");
    }

    #[test]
    fn domain_has_foreign_work_when_it_is_saved_or_a_disk_may_be_changed() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk.raw");
        fs::write(&disk, [0; 512]).unwrap();
        let devices = DISKS.replace("/none/disk", disk.to_str().unwrap());
        let test = TestDomain::with_devices(&devices, "foreign-work");
        let record = DiskRecord::of("m", folder.path());
        let found = finding("m", &test.domain, folder.path()).unwrap();
        assert!(found.starts_with("machine 'm': it is not prepared automatically: its disk "), "{found}");
        assert!(found.contains("`cuckoo-machinery prepare m`"), "{found}");
        record.save(&disks_of(&test.domain).unwrap());
        assert_eq!(record.foreign_work(&test.domain, true), None);
        assert_eq!(finding("m", &test.domain, folder.path()), None);
        test.start();
        test.domain.managed_save(0).unwrap();
        let saved = record.foreign_work(&test.domain, true).unwrap();
        assert!(saved.contains("a managed save"), "{saved}");
    }

    #[test]
    fn managed_save_is_removed_when_there_is_one() {
        let test = TestDomain::new("foreign-saved");
        assert!(!has_managed_save(&test.domain));
        remove_managed_save(&test.domain, "m").unwrap();
        test.start();
        test.domain.managed_save(0).unwrap();
        assert!(has_managed_save(&test.domain));
        remove_managed_save(&test.domain, "m").unwrap();
        assert!(!has_managed_save(&test.domain));
    }
}
