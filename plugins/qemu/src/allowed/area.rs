//! The places of a machine: the files that its arguments may name.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// QEMU's data, such as firmware and boot ROMs, which every program may read.
const SYSTEM: &str = "/usr";

/// The ends of names that a written file or socket may have. A run therefore cannot overwrite a disk, a snapshot or
/// a description of a machine.
const WRITTEN: [&str; 8] = ["log", "txt", "out", "pcap", "pid", "sock", "socket", "console"];

/// The places of a machine.
#[derive(Debug, Clone)]
pub struct Area {
    /// The folder in which QEMU runs, where relative paths start.
    folder: PathBuf,
    /// The folder of the machine's disk.
    disks: PathBuf,
}

impl Area {
    /// Creates the area of a machine whose QEMU runs in `folder`, and whose disk is at that path.
    pub fn new(folder: &Path, disk: &Path) -> Area {
        Area { folder: folder.to_owned(), disks: disk.parent().unwrap_or(folder).to_owned() }
    }

    /// Returns the folders whose files the guest may read as they are.
    pub fn readable(&self) -> Vec<PathBuf> {
        let folders = [&self.folder, &self.disks].map(|folder| folder.canonicalize().ok());
        // The root is no machine's folder.
        let own = folders.into_iter().flatten().filter(|folder| folder.parent().is_some());
        own.chain([PathBuf::from(SYSTEM)]).collect()
    }

    /// Reports whether the guest may read the file as it is. Symbolic links are followed.
    pub fn may_read(&self, path: &Path) -> bool {
        let real = real(&self.folder.join(path));
        real.is_some_and(|real| self.readable().iter().any(|folder| real.starts_with(folder)))
    }

    /// Reports whether QEMU may write the file, or listen on a socket there.
    pub fn may_write(&self, path: &str) -> bool {
        let path = self.folder.join(path);
        if path == Path::new("/dev/null") {
            return true;
        }
        let (Some(real), Ok(folder)) = (real(&path), self.folder.canonicalize()) else { return false };
        let has_end = |path: &Path| WRITTEN.iter().any(|end| path.extension().is_some_and(|own| own == *end));
        let kind = fs::metadata(&real).map(|metadata| metadata.file_type());
        let is_file = kind.map_or(true, |kind| kind.is_file() || kind.is_socket());
        folder.parent().is_some() && real.starts_with(&folder) && has_end(&path) && has_end(&real) && is_file
    }
}

/// Returns the path without symbolic links, also of a file that does not exist yet; none where that is unclear.
fn real(path: &Path) -> Option<PathBuf> {
    if let Ok(real) = path.canonicalize() {
        return Some(real);
    }
    // A link to a missing file: QEMU would create that file.
    if path.symlink_metadata().is_ok() {
        return None;
    }
    Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn area_ends_at_the_machines_folders_and_follows_links() {
        let (own, disks, other) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let area = Area::new(own.path(), &disks.path().join("disk.qcow2"));
        let secret = other.path().join("secret");
        fs::write(&secret, "secret").unwrap();
        fs::write(own.path().join("x.iso"), "iso").unwrap();
        symlink(&secret, own.path().join("link.log")).unwrap();
        symlink(other.path().join("missing"), own.path().join("dangling.log")).unwrap();
        symlink(own.path().join("x.iso"), own.path().join("inner.log")).unwrap();
        for (path, is_readable) in [
            ("x.iso", true),
            ("./x.iso", true),
            ("missing.iso", true),
            ("/usr/share/qemu/bios.bin", true),
            ("link.log", false),
            ("dangling.log", false),
            ("../secret", false),
            ("/etc/shadow", false),
            ("", true),
        ] {
            assert_eq!(area.may_read(Path::new(path)), is_readable, "{path}");
        }
        assert!(area.may_read(&disks.path().join("base.raw")) && !area.may_read(&secret));
        for (path, is_writable) in [
            ("serial.log", true),
            ("./a.pcap", true),
            ("/dev/null", true),
            ("link.log", false),
            ("dangling.log", false),
            ("inner.log", false),
            ("machineinfo.json", false),
            ("snapshot", false),
            ("none/x.log", false),
            ("../x.log", false),
            ("/usr/x.log", false),
        ] {
            assert_eq!(area.may_write(path), is_writable, "{path}");
        }
        assert!(!Area::new(Path::new("/"), Path::new("/disk")).may_read(Path::new("/etc/shadow")));
    }
}
