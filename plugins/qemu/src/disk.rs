//! The disposable disk: the overlay that one run writes to.

use std::io;
use std::path::{Path, PathBuf};

use machinery::{Deadline, Error, Result};

use crate::process::Process;

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
