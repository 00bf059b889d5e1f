//! Detects that a file was changed or replaced.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The identity of a file. It differs from that of any other file, and from that of the same file before a change.
/// The kernel sets the time of the last change (ctime), and no program can set it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    path: PathBuf,
    size: u64,
    inode: u64,
    /// In nanoseconds since 1970.
    modified: i128,
    changed: i128,
}

impl FileId {
    /// Identifies the file at that path.
    ///
    /// # Errors
    /// The metadata of the file cannot be read.
    pub fn of(path: &Path) -> io::Result<FileId> {
        Ok(FileId::new(path, &fs::metadata(path)?))
    }

    /// Identifies the content of the file at `path`, and ignores its owner and its attributes. libvirt sets
    /// those at each start and end of a domain, which changes the file's ctime. Compare the result only with
    /// other results of this function.
    ///
    /// # Errors
    /// The metadata of the file cannot be read.
    pub fn of_content(path: &Path) -> io::Result<FileId> {
        Ok(FileId { changed: 0, ..FileId::of(path)? })
    }

    /// Identifies an open file, which is at that path.
    ///
    /// # Errors
    /// The metadata of the file cannot be read.
    pub fn of_open(path: &Path, file: &File) -> io::Result<FileId> {
        Ok(FileId::new(path, &file.metadata()?))
    }

    fn new(path: &Path, file: &fs::Metadata) -> FileId {
        let time =
            |seconds: i64, nanoseconds: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
        FileId {
            path: path.to_owned(),
            size: file.size(),
            inode: file.ino(),
            modified: time(file.mtime(), file.mtime_nsec()),
            changed: time(file.ctime(), file.ctime_nsec()),
        }
    }

    /// Reports whether the file at the path is still this one, and unchanged.
    pub fn is_unchanged(&self) -> bool {
        FileId::of(&self.path).is_ok_and(|now| now == *self)
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the size of the file, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_id_differs_when_the_file_was_changed_or_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        fs::write(&path, "one").unwrap();
        let before = FileId::of(&path).unwrap();
        assert_eq!(FileId::of(&path).unwrap(), before);
        let time = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, "two").unwrap();
        // The identity also differs if the time of modification is set back.
        File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        assert_ne!(FileId::of(&path).unwrap(), before);
        let other = folder.path().join("g");
        fs::write(&other, "one").unwrap();
        let before = FileId::of(&path).unwrap();
        fs::rename(&other, &path).unwrap();
        assert_ne!(FileId::of(&path).unwrap(), before);
    }
}
