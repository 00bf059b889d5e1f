//! The files of a domain and of its snapshot: a check that they exist, and their identities.
//!
//! Only files on this computer can be checked. Files that this user may not access are not checked either:
//! libvirt may run QEMU as another user.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use machinery_images::{Chain, FileId, Header};

use crate::description::{Description, Disk};
use crate::snapshot::{Snapshot, advice_about_run};

/// Returns the problems of the domain's files that prevent a restore of its snapshot.
pub fn problems(domain: &Description, snapshot: Option<&Snapshot>) -> Vec<Error> {
    let then = snapshot.and_then(|snapshot| snapshot.description.domain.as_ref());
    let memory = snapshot.and_then(|snapshot| snapshot.description.memory_file.as_ref());
    let named = domain.files.iter().map(|file| (file, "the domain"));
    let in_snapshot = then.map(|then| &then.files[..]).unwrap_or_default().iter().chain(memory);
    let named = named.chain(in_snapshot.map(|file| (file, "its snapshot's description")));
    let mut missing = BTreeSet::new();
    let mut problems = Vec::new();
    for (file, by) in named {
        if is_missing(file) && missing.insert(file) {
            let what = format!("the file {}, which {by} names, does not exist", file.display());
            let overlay = snapshot.and_then(|snapshot| snapshot.description.overlay.as_ref());
            let advice = match overlay.filter(|overlay| *overlay == file) {
                Some(overlay) => advice_about_run(overlay),
                None => "Put it back, or correct the domain (`virsh edit`)".to_owned(),
            };
            problems.push(Error::environment(what).advice(advice));
        }
    }
    let disks: BTreeSet<_> = [Some(domain), then].into_iter().flatten().flat_map(chained).collect();
    let broken = disks.into_iter().filter_map(|(path, format)| Chain::of(path, format).err());
    // A file that libvirt itself names has been reported already.
    let is_new =
        |error: &Error| !missing.iter().any(|file| error.reason().contains(&*file.to_string_lossy()));
    problems.extend(broken.filter(is_new));
    if let Some(snapshot) = snapshot {
        problems.extend(lost_snapshots(then.unwrap_or(domain), snapshot));
    }
    problems
}

/// Returns the disks whose chain can be read, each with its format.
fn chained(domain: &Description) -> impl Iterator<Item = (&Path, Option<&str>)> {
    let disks = domain.disks.iter().filter_map(|disk| Some((disk.path.as_deref()?, disk)));
    let readable = disks.filter(|(path, _)| path.is_file() && File::open(path).is_ok());
    readable.map(|(path, disk)| (path, Some(disk.format.as_str()).filter(|format| !format.is_empty())))
}

/// Reports whether the file does not exist.
fn is_missing(file: &Path) -> bool {
    file.metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound)
}

/// Reports the disks that an internal snapshot should be in, but that do not contain it.
fn lost_snapshots(domain: &Description, snapshot: &Snapshot) -> Vec<Error> {
    let name = &snapshot.identity.name;
    let holders = &snapshot.description.internal_disks;
    let disks = domain.disks.iter().filter(|disk| holders.contains(&disk.target));
    let headers: Vec<(&Path, Header)> = disks.filter_map(header).collect();
    let lost = headers.iter().filter(|(_, header)| header.snapshot(name).is_none());
    let mut problems: Vec<Error> = lost
        .map(|(path, _)| {
            let what = format!(
                "libvirt has the snapshot '{name}', but the disk {}, which should contain it, does not",
                path.display()
            );
            snapshot_problem(what, name)
        })
        .collect();
    let has_memory =
        headers.iter().filter_map(|(_, header)| header.snapshot(name)).any(|entry| entry.memory > 0);
    let is_internal = !snapshot.description.external && snapshot.has_memory();
    if problems.is_empty()
        && is_internal
        && !headers.is_empty()
        && headers.len() == holders.len()
        && !has_memory
    {
        let what = format!("libvirt has the snapshot '{name}' with memory, but no disk contains that memory");
        problems.push(snapshot_problem(what, name));
    }
    problems
}

fn header(disk: &Disk) -> Option<(&Path, Header)> {
    let path = disk.path.as_deref()?;
    Some((path, Header::read(path).ok()??))
}

fn snapshot_problem(what: String, name: &str) -> Error {
    Error::environment(what).advice(format!(
        "Put the disk back, or delete the snapshot (virsh snapshot-delete --metadata DOMAIN {name}) and take it again"
    ))
}

/// The identities of the files that determine the domain's content, except those that its guest writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity(Vec<FileId>);

impl Identity {
    /// Identifies every file that the domain names and every file of a backing chain, as far as this user may
    /// access them. Disks that the guest can write to change by themselves, so only their bases are included.
    pub fn of(domain: &Description) -> Identity {
        let mut files: BTreeSet<PathBuf> = domain.files.iter().cloned().collect();
        files.extend(domain.arguments.iter().flat_map(|argument| named_in(argument)));
        let chains = chained(domain).filter_map(|(path, format)| Chain::of(path, format).ok());
        files.extend(chains.flat_map(|chain| chain.files));
        for disk in domain.writable_disks().filter_map(|disk| disk.path.as_ref()) {
            files.remove(disk);
        }
        // The guest writes the variables of the firmware.
        files.retain(|file| domain.firmware.nvram.as_ref() != Some(file));
        Identity(files.iter().filter_map(|file| FileId::of_content(file).ok()).collect())
    }

    /// Expects that no file has changed.
    ///
    /// # Errors
    /// A file has changed, or is gone.
    pub fn expect_unchanged(&self) -> Result<()> {
        let is_changed = |file: &&FileId| !FileId::of_content(file.path()).is_ok_and(|now| now == **file);
        match self.0.iter().find(is_changed) {
            None => Ok(()),
            Some(file) => Err(Error::unexpected_state(format!(
                "{} was changed or replaced since the machine was prepared",
                file.path().display()
            ))),
        }
    }

    /// Returns the identities as text, one line for each file.
    ///
    /// # Errors
    /// An identity cannot be written as text.
    pub fn to_text(&self) -> Result<String> {
        let line = |file| serde_json::to_string(file).map(|text| text + "\n");
        let lines: std::result::Result<String, _> = self.0.iter().map(line).collect();
        lines.map_err(|error| Error::failed(format!("cannot describe the domain's files: {error}")))
    }
}

/// Returns the paths in a QEMU argument: those parts between commas and equal signs that are paths.
fn named_in(argument: &str) -> impl Iterator<Item = PathBuf> {
    let parts = argument.split([',', '=']).filter(|part| part.starts_with('/')).map(PathBuf::from);
    parts.filter(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn domain(disk: &Path, iso: &Path) -> Description {
        let xml = format!(
            "<domain><devices><disk type='file' device='disk'><driver type='raw'/><source file='{}'/></disk>\
             <disk type='file' device='cdrom'><source file='{}'/></disk></devices></domain>",
            disk.display(),
            iso.display()
        );
        Description::read(&xml).unwrap()
    }

    #[test]
    fn problems_name_each_missing_file_once() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, iso) = (folder.path().join("disk"), folder.path().join("iso"));
        fs::write(&disk, "x").unwrap();
        let found = problems(&domain(&disk, &iso), None);
        let [problem] = &found[..] else { panic!("{found:?}") };
        assert!(problem.to_string().contains(iso.to_str().unwrap()), "{problem}");
        fs::write(&iso, "x").unwrap();
        assert_eq!(problems(&domain(&disk, &iso), None), []);
    }

    #[test]
    fn identity_changes_when_a_file_is_replaced_and_not_when_the_guest_writes() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, iso) = (folder.path().join("disk"), folder.path().join("iso"));
        fs::write(&disk, "x").unwrap();
        fs::write(&iso, "x").unwrap();
        let identity = Identity::of(&domain(&disk, &iso));
        fs::write(&disk, "written by the guest").unwrap();
        identity.expect_unchanged().unwrap();
        assert_eq!(Identity::of(&domain(&disk, &iso)), identity);
        fs::write(&iso, "another").unwrap();
        assert!(identity.expect_unchanged().unwrap_err().to_string().contains("iso"));
        assert_ne!(Identity::of(&domain(&disk, &iso)), identity);
    }
}
