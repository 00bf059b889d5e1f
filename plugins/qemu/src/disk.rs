//! The disposable disk: the overlay that one run writes to.
//!
//! `qemu-img` takes as long to make one as QEMU takes to start, and all that it makes on top of one disk
//! are the same. So it makes one, once, and every run gets a copy of that: of the few blocks in it that
//! are not zero.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use machinery::{Deadline, Error, Result};

use crate::process::Process;
use machinery_images::FileId;

/// Where a machine's disposable disk goes. Source: Cuckoo3's `machineries/modules/qemu.py`.
pub fn path_for(folder: &Path, machine: &str) -> PathBuf {
    folder.join(format!("{machine}_disposable.qcow2"))
}

/// A disposable disk that exists. It is deleted with the value, unless the operator keeps them.
#[derive(Debug)]
pub struct DisposableDisk {
    path: PathBuf,
    /// Whether it stays when the value goes.
    pub keep: bool,
}

impl DisposableDisk {
    /// Makes a fresh one on top of `disk`; one that is left from an earlier run is replaced.
    ///
    /// # Errors
    /// `qemu-img` cannot make it in time; its own words are in the error.
    pub fn create(
        qemu_img: &Path,
        machine: &str,
        disk: &Path,
        path: &Path,
        deadline: Deadline,
    ) -> Result<DisposableDisk> {
        remove(path)?;
        // Dropped on failure, so half a file does not stay.
        let new = DisposableDisk { path: path.to_owned(), keep: false };
        let options =
            ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-o", "lazy_refcounts=on,cluster_size=2M", "-b"];
        let files = [disk, path].map(|path| path.display().to_string());
        let args = options.into_iter().map(str::to_owned).chain(files);
        let end = Process::start(qemu_img, args, machine)?.end(deadline.remaining());
        if end.was_clean() {
            return Ok(new);
        }
        deadline.check("qemu-img to make the disposable disk")?;
        let (program, path) = (qemu_img.display(), path.display());
        Err(Error::failed(format!("{program} cannot make the disposable disk {path}: {}", end.words()))
            .advice(
                "Check the space and permissions of its folder, and that the machine's disk is a qcow2 file",
            ))
    }
}

/// Of the size of the smallest cluster a file system is likely to have.
const BLOCK: usize = 4096;

/// A disposable disk to which nothing was written yet, kept in memory.
#[derive(Debug)]
pub struct Blank {
    /// The disk it is on top of.
    of: FileId,
    length: u64,
    /// What is not zero, and where.
    blocks: Vec<(u64, Vec<u8>)>,
}

impl Blank {
    /// Has `qemu-img` make one at `path`, and takes it in; `of` is the disk.
    ///
    /// # Errors
    /// As [`DisposableDisk::create`]; it cannot be read.
    pub fn make(
        qemu_img: &Path,
        machine: &str,
        (disk, of): (&Path, FileId),
        path: &Path,
        deadline: Deadline,
    ) -> Result<Blank> {
        let made = DisposableDisk::create(qemu_img, machine, disk, path, deadline)?;
        let content = std::fs::read(&made.path).map_err(|error| Error::io("read", path, &error))?;
        let used = |(number, block): (usize, &[u8])| {
            let at = (number * BLOCK) as u64;
            block.iter().any(|byte| *byte != 0).then(|| (at, block.to_vec()))
        };
        let blocks = content.chunks(BLOCK).enumerate().filter_map(used).collect();
        Ok(Blank { of, length: content.len() as u64, blocks })
    }

    /// Whether it is on top of the disk as it is now.
    pub fn is_of(&self, disk: &FileId) -> bool {
        self.of == *disk
    }

    /// Makes a disposable disk at `path`; one that is left from an earlier run is replaced.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn copy_to(&self, path: &Path) -> Result<DisposableDisk> {
        remove(path)?;
        let failed = |error: io::Error| Error::io("make the disposable disk", path, &error);
        // Dropped on failure, so half a file does not stay.
        let new = DisposableDisk { path: path.to_owned(), keep: false };
        let file = File::options().write(true).create_new(true).open(path).map_err(failed)?;
        file.set_len(self.length).map_err(failed)?;
        self.blocks.iter().try_for_each(|(at, block)| file.write_all_at(block, *at)).map_err(failed)?;
        Ok(new)
    }
}

impl Drop for DisposableDisk {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = remove(&self.path) {
            tracing::warn!(%error, "a disposable disk stays behind");
        }
    }
}

/// Removes a file; that there is none is as good.
///
/// # Errors
/// It is there and stays.
pub fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path, &error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::time::Duration;

    /// A `qemu-img` that makes a file of mostly nothing.
    fn image_maker(folder: &Path) -> PathBuf {
        let path = folder.join("qemu-img");
        let script = "#!/bin/sh\nfor last; do :; done\nprintf QFI > \"$last\"\n\
                      printf end | dd of=\"$last\" bs=1 seek=3000000 conv=notrunc 2>/dev/null\n";
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn every_copy_of_a_blank_is_the_same_and_sparse() {
        let folder = tempfile::tempdir().unwrap();
        let (disk, path) = (folder.path().join("disk"), folder.path().join("overlay"));
        std::fs::write(&disk, "a disk").unwrap();
        let of = FileId::of(&disk).unwrap();
        let soon = Deadline::after(Duration::from_secs(10));
        let blank = Blank::make(&image_maker(folder.path()), "m", (&disk, of.clone()), &path, soon).unwrap();
        assert!(!path.exists());
        for _ in 0..2 {
            let copy = blank.copy_to(&path).unwrap();
            let content = std::fs::read(&path).unwrap();
            assert_eq!(
                (content.len(), &content[..3], &content[3_000_000..]),
                (3_000_003, &b"QFI"[..], &b"end"[..])
            );
            assert!(content[3..3_000_000].iter().all(|byte| *byte == 0));
            assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 100_000);
            std::fs::write(&path, "written to").unwrap();
            drop(copy);
            assert!(!path.exists());
        }
        assert!(blank.is_of(&of));
        std::fs::write(&disk, "another").unwrap();
        assert!(!blank.is_of(&FileId::of(&disk).unwrap()));
    }

    #[test]
    fn a_copy_that_cannot_be_written_leaves_nothing() {
        let blank = Blank { of: FileId::of(Path::new("/")).unwrap(), length: 1, blocks: Vec::new() };
        let text = blank.copy_to(Path::new("/none/overlay")).unwrap_err().to_string();
        assert!(text.contains("/none/overlay"), "{text}");
    }
}
