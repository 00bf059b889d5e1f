//! A file that appears at its path only when it is complete.
//!
//! The file is written to a folder of its own beside the target, with an unpredictable name, and then moved. The
//! folder is needed for a hypervisor that opens the path by itself. If it opens the path after the call was
//! abandoned, the folder no longer exists, and no file is created.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use machinery::{Deadline, Error, Result};
use tempfile::TempDir;

const FILE: &str = "file";

/// The number of bytes that are copied between two checks of the deadline.
const COPY_CHUNK: u64 = 16 << 20;

/// An unfinished file. Dropping it before [`finish`](Output::finish) removes it.
#[derive(Debug)]
pub struct Output {
    folder: TempDir,
    file: File,
    target: PathBuf,
}

impl Output {
    /// Creates an unfinished file for the path `target`. It belongs to the caller, and only the owner can read it.
    ///
    /// # Errors
    /// Something other than a file exists at the path; the folder of the target is missing or not writable.
    pub fn at(target: &Path) -> Result<Output> {
        let failed = |error| Error::io("write to", target, &error);
        let beside = target.parent().ok_or_else(|| failed(io::ErrorKind::IsADirectory.into()))?;
        match std::fs::symlink_metadata(target) {
            Ok(there) if !there.is_file() => Err(Error::environment(format!(
                "cannot write to {}: something exists there that is no file",
                target.display()
            ))
            .advice("Name a file, or a path that does not exist")),
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

    /// Returns the file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the path of the unfinished file.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join(FILE)
    }

    /// Returns the path of the finished file.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Copies a file that the hypervisor has written by itself. `progress` gets the part that is copied, from 0 to 1.
    ///
    /// # Errors
    /// The source cannot be read; the file cannot be written; the deadline passes.
    pub fn copy_from(&self, source: &Path, deadline: Deadline, mut progress: impl FnMut(f64)) -> Result<()> {
        let failed = |error| Error::io("copy", source, &error);
        let mut from = File::open(source).map_err(failed)?;
        let length = from.metadata().map_err(failed)?.len();
        let mut copied = 0;
        loop {
            progress(if length == 0 { 1.0 } else { (copied as f64 / length as f64).min(1.0) });
            let chunk = io::copy(&mut (&mut from).take(COPY_CHUNK), &mut &self.file).map_err(failed)?;
            if chunk == 0 {
                return Ok(());
            }
            copied += chunk;
            deadline.check("a file to be copied")?;
        }
    }

    /// Moves the file to its target, and replaces an existing file.
    ///
    /// # Errors
    /// The file cannot be moved.
    pub fn finish(self) -> Result<()> {
        std::fs::rename(self.path(), &self.target)
            .map_err(|error| Error::io("write to", &self.target, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::time::Duration;

    #[test]
    fn output_is_removed_when_it_is_not_finished() {
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
    fn file_is_copied_until_the_deadline() {
        let folder = tempfile::tempdir().unwrap();
        let (source, target) = (folder.path().join("source"), folder.path().join("dump"));
        std::fs::write(&source, "memory").unwrap();
        let output = Output::at(&target).unwrap();
        let mut parts = Vec::new();
        output.copy_from(&source, Deadline::after(Duration::from_secs(60)), |part| parts.push(part)).unwrap();
        output.finish().unwrap();
        assert_eq!((std::fs::read(&target).unwrap(), parts), (b"memory".to_vec(), vec![0.0, 1.0]));
        let output = Output::at(&target).unwrap();
        let late = output.copy_from(&source, Deadline::after(Duration::ZERO), |_| ()).unwrap_err();
        assert_eq!(late.kind(), machinery::ErrorKind::Timeout);
    }

    #[test]
    fn output_is_refused_when_the_target_is_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let text = Output::at(folder.path()).unwrap_err().to_string();
        assert!(text.contains("no file"), "{text}");
        assert!(Output::at(Path::new("/none/x")).unwrap_err().to_string().contains("/none/x"));
    }

    #[test]
    fn path_cannot_be_created_when_the_output_was_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let output = Output::at(&folder.path().join("dump")).unwrap();
        let late = output.path();
        drop(output);
        assert!(File::create(late).is_err());
    }
}
