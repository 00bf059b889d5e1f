//! A file in memory, for a hypervisor that writes a small file and needs more than a pipe, such as a screenshot.
//!
//! The hypervisor may keep its descriptor. So the file is emptied after it was read, and cannot grow again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};

use machinery::{Error, Result};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// A file in memory.
#[derive(Debug)]
pub struct MemoryFile {
    file: File,
}

impl MemoryFile {
    /// Creates an empty file.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn new() -> Result<MemoryFile> {
        let file = memfd_create("screenshot", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
        let file = file.map_err(|error| failed("make", &error.into()))?;
        Ok(MemoryFile { file: File::from(file) })
    }

    /// Returns the file, open for writing only.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn for_writing(&self) -> Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let file = OpenOptions::new().write(true).open(path);
        Ok(file.map_err(|error| failed("open", &error))?.into())
    }

    /// Returns the content. Nobody can write to the file from now on.
    ///
    /// # Errors
    /// The file has more than `limit` bytes, or cannot be read.
    pub fn take(mut self, limit: u64) -> Result<Vec<u8>> {
        let mut content = Vec::new();
        let read = self
            .file
            .seek(SeekFrom::Start(0))
            .and_then(|_| (&mut self.file).take(limit.saturating_add(1)).read_to_end(&mut content));
        // First the seal: nobody can write in between.
        let emptied = fcntl_add_seals(&self.file, SealFlags::GROW)
            .map_err(io::Error::from)
            .and_then(|()| self.file.set_len(0));
        read.and(emptied).map_err(|error| failed("read", &error))?;
        if content.len() as u64 > limit {
            return Err(Error::failed(format!("more than {limit} bytes were written")));
        }
        Ok(content)
    }
}

fn failed(what: &str, error: &io::Error) -> Error {
    Error::environment(format!("cannot {what} a file in memory: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn content_is_taken_once_and_nobody_writes_afterwards() {
        let memory = MemoryFile::new().unwrap();
        let mut writer = File::from(memory.for_writing().unwrap());
        writer.write_all(b"a picture").unwrap();
        assert_eq!(memory.take(9).unwrap(), b"a picture");
        assert_eq!(writer.metadata().unwrap().len(), 0);
        assert!(writer.write_all(b"more").is_err() && writer.set_len(1 << 40).is_err());
        writer.seek(SeekFrom::Start(0)).unwrap();
        assert!(writer.write_all(b"again").is_err());
        assert_eq!(writer.metadata().unwrap().len(), 0);
    }

    #[test]
    fn content_is_refused_when_it_is_too_long() {
        let memory = MemoryFile::new().unwrap();
        let writer = File::from(memory.for_writing().unwrap());
        writer.set_len(1 << 40).unwrap();
        let error = memory.take(64 << 10).unwrap_err().to_string();
        assert!(error.contains("more than 65536 bytes"), "{error}");
        assert_eq!(writer.metadata().unwrap().len(), 0);
    }
}
