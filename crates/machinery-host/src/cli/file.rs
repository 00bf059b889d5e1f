//! The file of a dump or a screenshot. This program opens it with the rights of its caller and passes the descriptor, so
//! that the caller may name any file that is its own.

use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use tempfile::NamedTempFile;

/// A file that appears at its path only when it is complete. Dropping it removes it.
pub struct NewFile {
    file: NamedTempFile,
    path: PathBuf,
}

impl NewFile {
    /// Creates an unfinished file beside the path, which only its owner can read.
    ///
    /// # Errors
    /// Something other than a file exists at the path; the folder is missing or not writable.
    pub fn at(path: &Path) -> Result<Self> {
        if std::fs::symlink_metadata(path).is_ok_and(|found| !found.is_file()) {
            let reason =
                format!("cannot write to {}: something exists there that is no file", path.display());
            return Err(Error::environment(reason).advice("Name a file, or a path that does not exist"));
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = tempfile::Builder::new().prefix(".unfinished-").tempfile_in(folder);
        Ok(NewFile {
            // The error itself names the unfinished file.
            file: file.map_err(|error| Error::io("write to", path, &error.kind().into()))?,
            path: path.to_owned(),
        })
    }

    /// Returns the path at which the file appears.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the file.
    pub fn file(&self) -> &std::fs::File {
        self.file.as_file()
    }

    /// Moves the file to its path, and replaces an existing file.
    ///
    /// # Errors
    /// The file cannot be moved.
    pub fn finish(self) -> Result<()> {
        let moved = self.file.persist(&self.path);
        moved.map(drop).map_err(|failed| Error::io("write to", &self.path, &failed.error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_appears_when_it_is_finished() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dump");
        drop(NewFile::at(&path).unwrap());
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
        let new = NewFile::at(&path).unwrap();
        assert!(!path.exists() && new.file().metadata().unwrap().is_file());
        new.finish().unwrap();
        assert!(path.is_file());
        for refused in [folder.path(), &folder.path().join("none/dump")] {
            assert!(NewFile::at(refused).is_err());
        }
    }
}
