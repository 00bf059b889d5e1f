//! The disposable disk of a run. It represents everything that a run has on this computer (an overlay, a socket, a
//! process) and that must be removed with the run.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};

/// An existing disk. Dropping it removes the file, so that a failed start cannot leave it behind.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
}

impl Disk {
    /// Creates an empty disk, and replaces an existing one.
    pub fn create(path: &Path) -> Result<Disk> {
        fs::write(path, "").map_err(|error| Error::io("create the disposable disk", path, &error))?;
        Ok(Disk { path: path.to_owned() })
    }

    /// Creates the folder of the disk, and removes the disk of a host that was killed.
    pub fn remove_leftover(path: &Path) -> Result<()> {
        let created = path.parent().map_or(Ok(()), fs::create_dir_all);
        created.map_err(|error| Error::io("create the folder of the disposable disk", path, &error))?;
        match fs::remove_file(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io("remove the disposable disk", path, &error)),
            Ok(()) => {
                tracing::info!(disk = %path.display(), "removed the disposable disk of an earlier host");
                Ok(())
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(disk = %self.path.display(), %error, "cannot remove a disposable disk");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_is_removed_when_it_is_dropped_or_when_the_next_host_loads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disks/m");
        Disk::remove_leftover(&path).unwrap();
        drop(Disk::create(&path).unwrap());
        assert!(!path.exists());
        // A killed host drops no value.
        std::mem::forget(Disk::create(&path).unwrap());
        assert!(path.exists());
        Disk::remove_leftover(&path).unwrap();
        assert!(!path.exists());
    }
}
