//! The owners of the files that a run uses.
//!
//! libvirt gives the files of a domain that is started to QEMU's user, if `dynamic_ownership` is set. When the domain ends, it
//! gives the disks back, but neither the images below them nor read-only ones. Code that has escaped into a QEMU could then
//! write to a base of other domains. So the [marker](crate::leftovers) of a run has the owners from before its start, and a
//! host that is root gives the files back after the run.
//!
//! Several runs may use a file. The first one records its owner, the others take that record, and the last one gives the
//! file back. Source: libvirt's src/security/security_dac.c.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use machinery_images::Chain;
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid, chownat};
use serde::{Deserialize, Serialize};

use crate::description::Description;

/// The bits of a mode that are the kind of the file.
const KIND: u32 = 0o170_000;

/// The owner and the mode of a file, and which file that is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileOwner {
    /// Without symbolic links.
    path: PathBuf,
    device: u64,
    inode: u64,
    uid: u32,
    gid: u32,
    mode: u32,
}

impl FileOwner {
    /// Returns the present owner of the file.
    ///
    /// # Errors
    /// The file is missing.
    pub fn of(path: &Path) -> io::Result<FileOwner> {
        let path = fs::canonicalize(path)?;
        Ok(FileOwner::found(fs::symlink_metadata(&path)?, path))
    }

    fn found(about: Metadata, path: PathBuf) -> FileOwner {
        let (device, inode, mode) = (about.dev(), about.ino(), about.mode());
        FileOwner { path, device, inode, uid: about.uid(), gid: about.gid(), mode }
    }

    /// Reports whether both are of one file. A link may have got the number of a file that was removed.
    pub fn is_of_same_file(&self, other: &FileOwner) -> bool {
        (self.device, self.inode, self.mode & KIND) == (other.device, other.inode, other.mode & KIND)
    }

    /// Gives the file back to this owner, with its mode, if it has others by now. QEMU's user may own the folder, and put
    /// another file or a link into the place: that is left alone.
    ///
    /// # Errors
    /// Another file is in its place; this process is not root.
    pub fn give_back(&self) -> Result<()> {
        self.try_give_back().map_err(|error| Error::io("give back to its owner", &self.path, &error))
    }

    fn try_give_back(&self) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(&self.path, flags, Mode::empty())?);
        let now = FileOwner::found(file.metadata()?, self.path.clone());
        if !self.is_of_same_file(&now) {
            return Err(io::Error::other("another file is in its place"));
        }
        if now == *self {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        chownat(&file, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
        // A descriptor of this kind cannot change the mode, and the link leads to the same file.
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        fs::set_permissions(link, fs::Permissions::from_mode(self.mode))
    }
}

/// Returns all images of a domain, and those below them.
pub fn images_of(domain: &Description) -> Vec<PathBuf> {
    let disks =
        domain.disks.iter().filter_map(|disk| Some((disk.path.as_deref()?, Some(disk.format.as_str()))));
    let variables = domain.firmware.nvram.as_deref().map(|path| (path, None));
    // A missing or unreadable image fails at the start, with libvirt's reason.
    let chains =
        disks.chain(variables).filter_map(|(path, format)| Chain::as_far_as_it_exists(path, format).ok());
    chains.flat_map(|chain| chain.files).collect()
}

/// Returns the owners of these files, without those that are missing; `recorded` are those of other runs.
pub fn owners_of(files: &[PathBuf], recorded: &[FileOwner]) -> Vec<FileOwner> {
    let present = files.iter().filter_map(|file| FileOwner::of(file).ok());
    present
        .map(|owner| recorded.iter().find(|record| record.is_of_same_file(&owner)).cloned().unwrap_or(owner))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::geteuid;
    use std::os::unix::fs::{chown, symlink};

    #[test]
    fn file_is_given_back_with_its_mode_and_another_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let [disk, other] = ["disk", "other"].map(|name| folder.path().join(name));
        fs::write(&disk, "").unwrap();
        fs::write(&other, "").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        let set_mode =
            |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        set_mode(&disk, 0o600);
        set_mode(&other, 0o640);
        let owner = FileOwner::of(&disk).unwrap();
        owner.give_back().unwrap();
        set_mode(&disk, 0o666);
        owner.give_back().unwrap();
        assert_eq!(mode(&disk), 0o600);
        fs::remove_file(&disk).unwrap();
        symlink(&other, &disk).unwrap();
        let error = owner.give_back().unwrap_err().to_string();
        assert!(error.contains("another file is in its place"), "{error}");
        fs::remove_file(&disk).unwrap();
        fs::hard_link(&other, &disk).unwrap();
        assert!(owner.give_back().is_err());
        assert_eq!(mode(&other), 0o640);
    }

    #[test]
    fn owner_of_a_file_is_the_one_that_another_run_has_recorded() {
        if !geteuid().is_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let [disk, cd] = ["disk", "cd"].map(|name| folder.path().join(name));
        fs::write(&disk, "").unwrap();
        fs::write(&cd, "").unwrap();
        let disk_xml = |kind: &str, path: &Path| {
            format!(
                "<disk type='file' device='{kind}'><driver type='raw'/><source file='{}'/></disk>",
                path.display()
            )
        };
        let missing = folder.path().join("none");
        let disks = [disk_xml("disk", &disk), disk_xml("cdrom", &cd), disk_xml("disk", &missing)].concat();
        let domain = Description::read(&format!("<domain><devices>{disks}</devices></domain>")).unwrap();
        let images = images_of(&domain);
        let first = owners_of(&images, &[]);
        assert_eq!(first, [FileOwner::of(&disk).unwrap(), FileOwner::of(&cd).unwrap()]);
        chown(&disk, Some(1), Some(1)).unwrap();
        assert_eq!(owners_of(&images, &first), first);
        assert_ne!(owners_of(&images, &first[1..]), first);
    }
}
