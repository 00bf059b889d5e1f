//! The disposable disk: the overlay that one run writes to.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery::{Error, Result};

/// Where a machine's disposable disk goes. Source: Cuckoo3's `machineries/modules/qemu.py`.
pub fn path_for(folder: &Path, machine: &str) -> PathBuf {
    folder.join(format!("{machine}_disposable.qcow2"))
}

/// A disposable disk that exists. It is deleted with the value, unless the operator keeps them.
#[derive(Debug)]
pub struct DisposableDisk {
    path: PathBuf,
    keep: bool,
}

impl DisposableDisk {
    /// Makes a fresh one on top of `disk`; one that is left from an earlier run is replaced.
    ///
    /// # Errors
    /// `qemu-img` cannot make it; its own words are in the error.
    pub fn create(qemu_img: &Path, disk: &Path, path: &Path, keep: bool) -> Result<DisposableDisk> {
        remove(path)?;
        // Dropped on failure, so half a file does not stay.
        let mut new = DisposableDisk { path: path.to_owned(), keep: false };
        let output = Command::new(qemu_img)
            .args([
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-o",
                "lazy_refcounts=on,cluster_size=2M",
                "-b",
            ])
            .args([disk, path])
            .output()
            .map_err(|error| Error::io("run", qemu_img, &error))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let reason = format!(
                "{} cannot make the disposable disk {}: {}",
                qemu_img.display(),
                path.display(),
                said.trim()
            );
            return Err(Error::failed(reason).advice(
                "Check the space and permissions of its folder, and that the machine's disk is a qcow2 file",
            ));
        }
        new.keep = keep;
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
