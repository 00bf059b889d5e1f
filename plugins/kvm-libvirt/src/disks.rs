//! The disks of a domain, and their revert without libvirt.
//!
//! An internal snapshot is in each of the domain's disks. `qemu-img snapshot -a` reverts a disk to it, as
//! libvirt does for a domain that is off. A save image needs that: libvirt restores its memory only.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::SystemTime;

use machinery::{Error, Result};
use serde_json::Value;

use crate::description::{Description, Disk};

/// The disks of a domain that its guest can write to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disks(Vec<PathBuf>);

/// QEMU's options for an image or a folder that a guest may write to. Source: `qemu-system-x86_64 -help`.
const IMAGE_OPTIONS: [&str; 14] = [
    "blockdev", "drive", "fda", "fdb", "fsdev", "hda", "hdb", "hdc", "hdd", "mtdblock", "pflash", "sd",
    "tpmdev", "virtfs",
];

impl Disks {
    /// Returns the disks of a domain.
    ///
    /// # Errors
    /// A disk cannot be reverted by `qemu-img`, or the domain has other state that a guest can change.
    pub fn of(domain: &Description) -> Result<Disks, String> {
        let others = [
            (domain.firmware.nvram.is_some(), "variables of its firmware"),
            (domain.has_tpm, "a TPM"),
            (domain.has_nvdimm, "a memory device with a file"),
        ];
        if let Some((_, what)) = others.into_iter().find(|(has_it, _)| *has_it) {
            return Err(format!("the domain has {what}, which a save image does not contain"));
        }
        if let Some(option) = domain.arguments.iter().find(|argument| names_an_image(argument)) {
            return Err(format!(
                "the domain's <qemu:commandline> has {option}: libvirt does not know that image, \
                 and a restore from a save image would not revert it"
            ));
        }
        domain.writable_disks().map(file_of).collect::<Result<_, _>>().map(Disks)
    }

    /// Describes the disks as text: the path of each, and its own entry of the snapshot of that name. A disk
    /// that was replaced has another entry.
    ///
    /// # Errors
    /// A disk cannot be read, or has no such snapshot; the text is for people.
    pub fn described(&self, snapshot: &str) -> Result<String, String> {
        let one = |path: &PathBuf| Ok(format!("{}\n{}\n", path.display(), entry(path, snapshot)?));
        self.0.iter().map(one).collect()
    }

    /// Expects that this process may write to all disks.
    ///
    /// # Errors
    /// It may not; the text is for people.
    pub fn ensure_writable(&self) -> Result<(), String> {
        self.0.iter().try_for_each(|path| {
            let opened = File::options().read(true).write(true).open(path).map(drop);
            opened.map_err(|error| format!("the host may not write to the disk {}: {error}", path.display()))
        })
    }

    /// Returns the time of the last write to each disk.
    pub fn written(&self) -> Vec<Option<SystemTime>> {
        self.0.iter().map(|path| fs::metadata(path).and_then(|file| file.modified()).ok()).collect()
    }

    /// Reverts all disks to the snapshot of that name.
    ///
    /// # Errors
    /// qemu-img fails; the error contains its message.
    pub fn revert_to(&self, snapshot: &str) -> Result<()> {
        self.0.iter().try_for_each(|disk| revert(disk, snapshot))
    }
}

/// Reports whether the argument is one of [`IMAGE_OPTIONS`]; QEMU accepts one leading dash or two.
fn names_an_image(argument: &str) -> bool {
    let option = argument.strip_prefix("--").or(argument.strip_prefix('-'));
    option.is_some_and(|option| IMAGE_OPTIONS.contains(&option))
}

/// Returns the path of a disk that is a qcow2 file.
fn file_of(disk: &Disk) -> Result<PathBuf, String> {
    let Some(path) = &disk.path else {
        return Err(format!("the domain's disk {} is no file", disk.target));
    };
    if disk.format != "qcow2" || !disk.is_plain {
        return Err(format!("the disk {} is no qcow2 file of this domain alone", path.display()));
    }
    Ok(path.clone())
}

/// Returns the disk's own entry of the snapshot, with its time and the size of its memory, as JSON.
fn entry(disk: &Path, snapshot: &str) -> Result<String, String> {
    let failed = |why: &str| format!("qemu-img cannot list the snapshots of {}: {why}", disk.display());
    let mut qemu_img = machinery::command("qemu-img");
    qemu_img.args(["info", "-U", "--output=json"]).arg(disk).stdin(Stdio::null());
    let ran = qemu_img.output().map_err(|error| failed(&error.to_string()))?;
    let info: Value = serde_json::from_slice(&ran.stdout)
        .map_err(|_| failed(String::from_utf8_lossy(&ran.stderr).trim()))?;
    let entries = info["snapshots"].as_array().into_iter().flatten();
    let found = entries.into_iter().find(|entry| entry["name"] == snapshot);
    found
        .map(Value::to_string)
        .ok_or_else(|| format!("the disk {} has no snapshot '{snapshot}'", disk.display()))
}

fn revert(disk: &Path, snapshot: &str) -> Result<()> {
    let mut qemu_img = machinery::command("qemu-img");
    qemu_img.args(["snapshot", "-q", "-a", snapshot]).arg(disk).stdin(Stdio::null());
    let failed = |why: String| {
        let what = format!("qemu-img cannot revert the disk {} to '{snapshot}': {why}", disk.display());
        Err(Error::environment(what).advice("The domain must be off, and nothing else may use its disk"))
    };
    match qemu_img.output() {
        Ok(ran) if ran.status.success() => Ok(()),
        Ok(ran) => failed(String::from_utf8_lossy(&ran.stderr).trim().to_owned()),
        Err(error) => failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks_of(xml: &str) -> Result<Disks, String> {
        Disks::of(&Description::read(xml).unwrap())
    }

    fn disk(inside: &str) -> String {
        format!("<domain><devices><disk type='file' device='disk'>{inside}</disk></devices></domain>")
    }

    #[test]
    fn disks_are_those_that_the_guest_can_write_to() {
        let one = disk("<driver name='qemu' type='qcow2' cache='none'/><source file='/a/b&apos;s &amp; c'/>");
        assert_eq!(disks_of(&one).unwrap(), Disks(vec!["/a/b's & c".into()]));
        let two = one
            .replace("</devices>", "<disk type='file' device='cdrom'><driver type='raw'/></disk></devices>");
        assert_eq!(disks_of(&two), disks_of(&one));
    }

    #[test]
    fn domain_is_refused_when_it_has_state_that_cannot_be_reverted() {
        let good = "<driver name='qemu' type='qcow2'/><source file='/a'/>";
        let add = |inside: &str| disk(good).replace("<devices>", &format!("{inside}<devices>"));
        let argument = |argument: &str| {
            add(&format!(
                "<q:commandline xmlns:q='x'><q:arg value='{argument}'/><q:arg value='x'/></q:commandline>"
            ))
        };
        for (xml, words) in [
            (disk(&good.replace("qcow2", "raw")), "/a is no qcow2 file"),
            (
                disk("<driver name='qemu' type='qcow2'/><source protocol='nbd'/><target dev='vda'/>"),
                "vda is no file",
            ),
            (disk(&format!("{good}<shareable/>")), "of this domain alone"),
            (add("<os><nvram>/n</nvram></os>"), "firmware"),
            (add("<memory model='nvdimm'><source><path>/n</path></source></memory>"), "memory device"),
            (argument("-drive"), "<qemu:commandline> has -drive"),
            (argument("--blockdev"), "<qemu:commandline> has --blockdev"),
            (argument("-pflash"), "<qemu:commandline> has -pflash"),
        ] {
            let why = disks_of(&xml).unwrap_err();
            assert!(why.contains(words), "no {words:?} in {why}");
        }
        assert!(disks_of(&argument("-netdev")).is_ok());
    }

    #[test]
    fn error_names_the_disk_when_it_does_not_exist() {
        let disks = Disks(vec!["/none/disk.qcow2".into()]);
        assert!(disks.ensure_writable().unwrap_err().contains("/none/disk.qcow2"));
        assert!(disks.described("clean").unwrap_err().contains("/none/disk.qcow2"));
        assert!(disks.revert_to("clean").unwrap_err().to_string().contains("/none/disk.qcow2"));
    }
}
