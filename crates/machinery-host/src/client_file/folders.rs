//! The folders in the CWD that the files of clients, and sockets for them, are in.

use std::path::PathBuf;

use machinery::{Error, Result};

use crate::cwd::{Cwd, make_folder};

/// The folders that the files of clients may be in, and that of sockets for them.
#[derive(Debug, Clone)]
pub struct Folders {
    /// The folder below which every user of the socket may name files.
    pub storage: PathBuf,
    /// The host's own folder for unfinished files.
    pub staging: PathBuf,
    /// The folder of the consoles' sockets.
    pub consoles: PathBuf,
}

impl Folders {
    /// Returns the folders of that CWD.
    pub fn of(cwd: &Cwd) -> Self {
        Folders { storage: cwd.storage(), staging: cwd.staging(), consoles: cwd.console_sockets() }
    }

    /// Makes the folder for unfinished files, and removes those of a host that was killed.
    ///
    /// # Errors
    /// The folder cannot be made or read.
    pub fn prepare(&self) -> Result<()> {
        make_folder(&self.staging)?;
        let failed = |error| Error::io("read the folder", &self.staging, &error);
        for entry in std::fs::read_dir(&self.staging).map_err(failed)?.flatten() {
            let path = entry.path();
            let removed = if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                std::fs::remove_dir_all(&path)
            } else {
                std::fs::remove_file(&path)
            };
            if let Err(error) = removed {
                tracing::warn!(path = %path.display(), %error, "cannot remove an unfinished file");
            }
        }
        Ok(())
    }
}
