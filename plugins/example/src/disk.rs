//! A disposable disk: what one run writes to. It stands for all that a run has on this host (an overlay,
//! a socket, a process) and that has to be gone when the run is.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};

/// A disk that is there. It goes with its owner, on whatever way the owner goes: so no start that fails,
/// at whatever line, can leave it behind.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
}

impl Disk {
    /// Makes an empty one, in the place of any other.
    pub fn make(path: &Path) -> Result<Disk> {
        fs::write(path, "").map_err(|error| Error::io("make the disposable disk", path, &error))?;
        Ok(Disk { path: path.to_owned() })
    }

    /// Makes the folder for it, and removes what a host that was killed has left there.
    pub fn clear_place(path: &Path) -> Result<()> {
        let made = path.parent().map_or(Ok(()), fs::create_dir_all);
        made.map_err(|error| Error::io("make the folder of the disposable disk", path, &error))?;
        match fs::remove_file(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io("remove the disposable disk", path, &error)),
            Ok(()) => {
                tracing::info!(disk = %path.display(), "removed what a host before this one has left");
                Ok(())
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(disk = %self.path.display(), %error, "a disposable disk cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_goes_with_its_owner_and_a_leftover_with_the_next_host() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disks/m");
        Disk::clear_place(&path).unwrap();
        drop(Disk::make(&path).unwrap());
        assert!(!path.exists());
        // A host that is killed drops nothing.
        std::mem::forget(Disk::make(&path).unwrap());
        assert!(path.exists());
        Disk::clear_place(&path).unwrap();
        assert!(!path.exists());
    }
}
