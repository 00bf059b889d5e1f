//! The disks of a domain, and the overlays that a run writes to instead.
//!
//! A save image contains memory only. It fits the disks in the state of the snapshot, in which its creation has left
//! them. A run from the image writes to overlays, and the disks below them stay as they are.
//!
//! Somebody else may write to a disk between two runs. Then `qemu-img snapshot -a` reverts it to its internal snapshot,
//! as libvirt does for a domain that is off. Code that has escaped into a QEMU may have rewritten the disk's header. So
//! the disk is read by memory-safe code only, and `qemu-img` gets it with all the nodes that it may open: this file as
//! qcow2, and no backing file. A revert needs none. A header that names another file than before makes the save image
//! outdated.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use machinery::{Deadline, Error, Result};
use machinery_backend::{
    ImageFile, ImageFiles, OverlayTemplates, QemuImg, expect_overlay_folder, overlay_path,
};
use machinery_images::{Chain, FileId, Header};
use serde_json::json;

use super::overlaid::Overlaid;
use crate::description::{Description, Disk};

/// The time that `qemu-img` has to revert a disk. A revert that is killed leaves a disk that is reverted in part, until
/// the next revert. So this is far longer than a revert takes, and the restore that waits for it may time out before.
const REVERT_TIMEOUT: Duration = Duration::from_secs(600);

/// The time that `qemu-img` has to make the first overlay of each disk.
const OVERLAY_TIMEOUT: Duration = Duration::from_secs(60);

/// The disks of a domain that its guest can write to, and the variables of its firmware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disks(Vec<PathBuf>);

/// The format of a disk that can have internal snapshots.
const QCOW2: &str = "qcow2";

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
        let nvram = &domain.firmware.nvram;
        let others = [
            (
                nvram.is_some() && !domain.firmware.nvram_is_qcow2,
                "variables of its firmware in a file that is no qcow2",
            ),
            (domain.has_outer_tpm, "a TPM that is not emulated"),
            (domain.has_nvdimm, "a memory device with a file"),
            (domain.has_shared_folder, "a folder of the host"),
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
        let mut disks: Vec<PathBuf> = domain.writable_disks().map(file_of).collect::<Result<_, _>>()?;
        if disks.is_empty() {
            return Err("the domain has no disk to write to".to_owned());
        }
        disks.extend(nvram.clone());
        Ok(Disks(disks))
    }

    /// Describes the disks as text: the path of each, its own entry of the snapshot of that name, and the files that
    /// its header names. A disk that was replaced has another entry.
    ///
    /// # Errors
    /// A disk cannot be read, or has no such snapshot; the text is for people.
    pub fn described(&self, snapshot: &str) -> Result<String, String> {
        let one = |path: &PathBuf| {
            let entry = entry(path, snapshot)?;
            Ok(format!("{}\n{entry}\n", path.display()))
        };
        self.0.iter().map(one).collect()
    }

    /// Identifies the content of the disks as text. A disk that was written to has another identity.
    ///
    /// # Errors
    /// A disk is missing.
    pub fn identity(&self) -> Result<String> {
        let one = |path: &PathBuf| {
            let id = FileId::of_content(path).map_err(|error| Error::io("look at the disk", path, &error))?;
            Ok(format!("{id:?}\n"))
        };
        self.0.iter().map(one).collect()
    }

    /// Returns the disks with their overlays; `overlay` is the path of the first one. A bare name lies beside the first
    /// disk: libvirt and QEMU reach it there.
    ///
    /// # Errors
    /// This process may not make files there, or other users could replace them; the text is for people.
    pub fn overlays(&self, overlay: &Path) -> Result<Vec<Overlaid>, String> {
        let beside = self.0.first().and_then(|disk| disk.parent()).unwrap_or(Path::new("/"));
        let first = beside.join(overlay);
        let folder = first.parent().unwrap_or(beside);
        expect_overlay_folder(folder).map_err(|error| error.to_string())?;
        Ok(self.0.iter().enumerate().map(|(n, disk)| (disk.clone(), overlay_path(&first, n))).collect())
    }

    /// Returns all files that QEMU only reads below the overlays.
    ///
    /// # Errors
    /// A file is missing or unreadable.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        let chains = self.0.iter().map(|disk| Ok(Chain::of(disk, Some(QCOW2))?.files));
        chains.collect::<Result<Vec<_>>>().map(|files| files.concat())
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
        let revert = |disk: &PathBuf| revert(&qemu_img(), disk, snapshot, Deadline::after(REVERT_TIMEOUT));
        self.0.iter().try_for_each(revert)
    }
}

/// Makes these overlays, without anything that an earlier run has written to them.
///
/// # Errors
/// An overlay cannot be made. Then there is none.
pub fn make_overlays(templates: &OverlayTemplates, overlays: &[Overlaid]) -> Result<()> {
    let Some((_, first)) = overlays.first() else { return Ok(()) };
    let image = |(disk, _): &Overlaid| ImageFile { path: disk.clone(), format: Some(QCOW2.to_owned()) };
    let images: Vec<ImageFile> = overlays.iter().map(image).collect();
    let deadline = Deadline::after(OVERLAY_TIMEOUT);
    let mut made = templates.overlays(&qemu_img(), &images, first, deadline)?;
    overlays.iter().try_for_each(|(disk, overlay)| {
        share_like(disk, overlay).map_err(|error| Error::io("set the owner of the overlay", overlay, &error))
    })?;
    // The marker of the run has them.
    made.set_keep(true);
    Ok(())
}

/// Gives the overlay to those who have the disk. libvirt may be configured not to change owners, and QEMU can open the
/// disk.
fn share_like(disk: &Path, overlay: &Path) -> std::io::Result<()> {
    let (like, own) = (fs::metadata(disk)?, fs::metadata(overlay)?);
    if (like.uid(), like.gid()) != (own.uid(), own.gid())
        && let Err(error) = chown(overlay, Some(like.uid()), Some(like.gid()))
    {
        // Only root may do that. libvirt then does it, unless it is configured otherwise.
        tracing::debug!(%error, overlay = %overlay.display(), "the overlay has another owner than the disk");
    }
    fs::set_permissions(overlay, fs::Permissions::from_mode(like.mode() & 0o060 | 0o600))
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
    if !disk.is_bare {
        return Err(format!("the disk {} has settings of its own, such as a label", path.display()));
    }
    if disk.format != QCOW2 || !disk.is_plain {
        return Err(format!("the disk {} is no qcow2 file of this domain alone", path.display()));
    }
    Ok(path.clone())
}

fn qemu_img() -> QemuImg {
    QemuImg::new("qemu-img")
}

/// Returns the disk's own entry of the snapshot, with its time and the size of its memory, and the disk's backing file.
fn entry(disk: &Path, snapshot: &str) -> Result<String, String> {
    let header = Header::read(disk).map_err(|error| error.to_string())?;
    let header = header.ok_or_else(|| format!("the disk {} is no qcow2 file", disk.display()))?;
    if header.data_file.is_some() {
        return Err(format!("the disk {} has its content in another file", disk.display()));
    }
    let entry = header.snapshot(snapshot);
    let entry = entry.ok_or_else(|| format!("the disk {} has no snapshot '{snapshot}'", disk.display()))?;
    Ok(format!("{entry:?} {:?}", header.backing))
}

fn revert(qemu_img: &QemuImg, disk: &Path, snapshot: &str, deadline: Deadline) -> Result<()> {
    let what = format!("revert the disk {} to '{snapshot}'", disk.display());
    let nodes = json!({"driver": "qcow2", "file": {"driver": "file", "filename": disk.to_string_lossy()}, "backing": null});
    let args = ["snapshot", "-q", "-a", snapshot].map(str::to_owned);
    let files = ImageFiles { written: vec![disk.to_owned()], ..ImageFiles::default() };
    let qemu_img = qemu_img.clone().as_owner_of(disk)?;
    let reverted = qemu_img.run(&what, args.into_iter().chain([format!("json:{nodes}")]), files, deadline);
    let advice = "The domain must be off, and nothing else may use its disk";
    reverted.map(drop).map_err(|error| error.advice(advice))
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery_backend::jail::JailMode;
    use rustix::fs::{CWD, FileType, Mode, mknodat};

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
            (add("<tpm><backend type='passthrough'/></tpm>"), "a TPM that is not emulated"),
            (disk(&format!("{good}<transient/>")), "settings of its own"),
            (
                disk(&good.replace("'/a'/>", "'/a'><seclabel model='dac' relabel='no'/></source>")),
                "/a has settings of its own",
            ),
            (add("<filesystem type='mount'><source dir='/s'/></filesystem>"), "a folder of the host"),
            ("<domain/>".to_owned(), "no disk to write to"),
            (add("<memory model='nvdimm'><source><path>/n</path></source></memory>"), "memory device"),
            (argument("-drive"), "<qemu:commandline> has -drive"),
            (argument("--blockdev"), "<qemu:commandline> has --blockdev"),
            (argument("-pflash"), "<qemu:commandline> has -pflash"),
        ] {
            let why = disks_of(&xml).unwrap_err();
            assert!(why.contains(words), "no {words:?} in {why}");
        }
        assert!(disks_of(&argument("-netdev")).is_ok());
        let whole = "<os><nvram format='qcow2'>/n</nvram></os><tpm><backend type='emulator'/></tpm>";
        assert_eq!(disks_of(&add(whole)).unwrap(), Disks(vec!["/a".into(), "/n".into()]));
    }

    #[test]
    fn error_names_the_disk_when_it_does_not_exist() {
        let disks = Disks(vec!["/none/disk.qcow2".into()]);
        assert!(disks.ensure_writable().unwrap_err().contains("/none/disk.qcow2"));
        assert!(disks.revert_to("clean").unwrap_err().to_string().contains("/none/disk.qcow2"));
        assert!(disks.overlays(Path::new("o")).unwrap_err().contains("/none is not a folder"));
        assert!(disks.described("clean").unwrap_err().contains("/none/disk.qcow2"));
        assert!(disks.files().unwrap_err().to_string().contains("/none/disk.qcow2"));
    }

    /// Makes a disk over a base, with the snapshot `clean`, and returns its path and that of the base.
    fn disk_over_base(folder: &Path) -> (PathBuf, PathBuf) {
        let (base, disk) = (folder.join("base.qcow2"), folder.join("it's a \"disk\".qcow2"));
        let qemu_img = |args: &[&str]| {
            let ran = std::process::Command::new("qemu-img").args(args).output().unwrap();
            assert!(ran.status.success(), "{ran:?}");
        };
        let (base_text, disk_text) = (base.to_str().unwrap(), disk.to_str().unwrap());
        qemu_img(&["create", "-q", "-f", "qcow2", base_text, "1M"]);
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base_text, disk_text]);
        qemu_img(&["snapshot", "-c", "clean", disk_text]);
        (disk, base)
    }

    #[test]
    fn revert_opens_no_other_file_when_the_header_names_one() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, base) = disk_over_base(folder.path());
        fs::remove_file(&base).unwrap();
        // A process that opens a pipe waits for its other end.
        mknodat(CWD, &base, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        revert(&qemu_img(), &disk, "clean", Deadline::after(Duration::from_secs(20))).unwrap();
        assert!(revert(&qemu_img(), &disk, "other", Deadline::after(REVERT_TIMEOUT)).is_err());
    }

    #[test]
    fn description_changes_when_the_header_names_another_file() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, base) = disk_over_base(folder.path());
        let disks = Disks(vec![disk.clone()]);
        let before = disks.described("clean").unwrap();
        assert_eq!(disks.described("clean").unwrap(), before);
        assert!(disks.described("other").unwrap_err().contains("no snapshot 'other'"));
        let content = fs::read(&disk).unwrap();
        let at = content.windows(10).position(|part| part == b"base.qcow2").unwrap();
        let rewritten = [&content[..at], b"evil.qcow2", &content[at + 10..]].concat();
        fs::write(&disk, rewritten).unwrap();
        let after = disks.described("clean").unwrap();
        assert!(before.contains(base.to_str().unwrap()) && after.contains("evil.qcow2"), "{after}");
        fs::write(&disk, b"raw").unwrap();
        assert!(disks.described("clean").unwrap_err().contains("is no qcow2 file"));
    }

    #[test]
    fn overlays_lie_beside_the_first_disk_and_belong_to_its_users() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, base) = disk_over_base(folder.path());
        fs::set_permissions(&disk, fs::Permissions::from_mode(0o664)).unwrap();
        let disks = Disks(vec![disk.clone(), base.clone()]);
        assert_eq!(disks.files().unwrap(), [disk.clone(), base.clone(), base.clone()]);
        let overlays = disks.overlays(Path::new("m_disposable.qcow2")).unwrap();
        let paths: Vec<PathBuf> = overlays.iter().map(|(_, overlay)| overlay.clone()).collect();
        let path = |name: &str| folder.path().join(name);
        assert_eq!(paths, [path("m_disposable.qcow2"), path("m_disposable_2.qcow2")]);
        let templates = OverlayTemplates::of_unread_images();
        for _ in 0..2 {
            fs::write(&paths[0], "of an earlier run").unwrap();
            make_overlays(&templates, &overlays).unwrap();
            let header = Header::read(&paths[0]).unwrap().unwrap();
            assert_eq!(header.backing.unwrap().file, disk.to_str().unwrap());
            assert_eq!(fs::metadata(&paths[0]).unwrap().mode() & 0o777, 0o660);
        }
        let none = vec![(path("none"), path("o.qcow2"))];
        assert!(make_overlays(&templates, &none).is_err() && !path("o.qcow2").exists());
    }

    #[test]
    fn error_is_a_failure_when_qemu_img_hangs() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("qemu-img");
        fs::write(&program, "#!/bin/sh\nexec sleep 600\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        let hangs = QemuImg::new(&program).with_jail(JailMode::Off);
        let soon = || Deadline::after(Duration::from_millis(50));
        let (disk, _) = disk_over_base(folder.path());
        let why = revert(&hangs, &disk, "clean", soon()).unwrap_err().to_string();
        assert!(why.contains("does not end within 50ms") && why.contains("must be off"), "{why}");
    }

    #[test]
    fn identity_changes_when_the_disk_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, _) = disk_over_base(folder.path());
        let disks = Disks(vec![disk.clone()]);
        let before = disks.identity().unwrap();
        let file = File::options().write(true).open(&disk).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_ne!(disks.identity().unwrap(), before);
    }
}
