//! A file that appears at its place only when it is whole.
//!
//! It is written in a folder of its own beside its target, under a name nobody can foresee, and moved
//! from there. The folder matters where a hypervisor opens the path by itself: one that comes late,
//! when nobody waits for the file any more, finds no folder to make it in.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use tempfile::TempDir;

const FILE: &str = "file";

/// A file on its way to its target. Dropped before [`finish`](Output::finish), it leaves nothing.
#[derive(Debug)]
pub struct Output {
    folder: TempDir,
    file: File,
    target: PathBuf,
}

impl Output {
    /// Begins a file that is to appear at `target`. It is the caller's, for its owner alone.
    ///
    /// # Errors
    /// Something that is no file is there already; the folder of the target is missing or not
    /// writable.
    pub fn at(target: &Path) -> Result<Output> {
        let failed = |error| Error::io("write to", target, &error);
        let beside = target.parent().ok_or_else(|| failed(io::ErrorKind::IsADirectory.into()))?;
        match std::fs::symlink_metadata(target) {
            Ok(there) if !there.is_file() => Err(Error::environment(format!(
                "cannot write to {}: something is there that is no file",
                target.display()
            ))
            .advice("Name a file, or a path where nothing is")),
            _ => {
                let folder = tempfile::Builder::new().prefix(".unfinished-").tempdir_in(beside);
                let folder = folder.map_err(failed)?;
                let mut new = OpenOptions::new();
                new.read(true).write(true).create_new(true).mode(0o600);
                let file = new.open(folder.path().join(FILE)).map_err(failed)?;
                Ok(Output { folder, file, target: target.to_owned() })
            }
        }
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is until it is finished.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join(FILE)
    }

    /// Where it will be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Moves the file to its target, in the place of a file that was there.
    ///
    /// # Errors
    /// It cannot be moved.
    pub fn finish(self) -> Result<()> {
        std::fs::rename(self.path(), &self.target)
            .map_err(|error| Error::io("write to", &self.target, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn what_is_not_finished_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("shot.png");
        drop(Output::at(&target).unwrap());
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
        Output::at(&target).unwrap().finish().unwrap();
        assert!(target.is_file());
        assert_eq!(target.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_file_is_not_replaced_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let text = Output::at(folder.path()).unwrap_err().to_string();
        assert!(text.contains("no file"), "{text}");
        assert!(Output::at(Path::new("/none/x")).unwrap_err().to_string().contains("/none/x"));
    }

    #[test]
    fn who_comes_late_finds_no_folder_to_write_in() {
        let folder = tempfile::tempdir().unwrap();
        let output = Output::at(&folder.path().join("dump")).unwrap();
        let late = output.path();
        drop(output);
        assert!(File::create(late).is_err());
    }
}
