//! The file that a plugin writes, in a folder that only the host's user can enter.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use rustix::fs::{Mode, OFlags, open};
use tempfile::TempDir;

use super::folders::Folders;

/// The name of the file in its private folder.
const FILE: &str = "file";
/// The size of a screenshot, in bytes, at most.
pub(super) const MAX_PICTURE: u64 = 64 << 20;
/// The width and the height of a screenshot, in pixels, at most.
const MAX_SIDE: u32 = 1 << 15;
/// The size of a memory dump, in bytes, at most. The host does not know a machine's memory; its plugin does, and has
/// the narrower limit.
pub(super) const MAX_DUMP: u64 = 256 << 30;

/// The content that a file must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A memory dump.
    Dump,
    /// A PNG image.
    Picture,
}

/// The file of a plugin. Dropping it removes the file, unless that was moved.
#[derive(Debug)]
pub struct PrivateFile(TempDir);

impl PrivateFile {
    /// Makes the folder of a file in the CWD. This blocks.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn staged(folders: &Folders) -> Result<PrivateFile> {
        PrivateFile::in_folder(&folders.staging)
            .map_err(|error| Error::io("make a folder in", &folders.staging, &error))
    }

    /// Makes the folder of a file in another folder. This blocks.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn in_folder(parent: &Path) -> io::Result<PrivateFile> {
        // Its mode is 0700.
        tempfile::Builder::new().prefix(".unfinished-").tempdir_in(parent).map(PrivateFile)
    }

    /// Returns the path that the plugin writes to.
    pub fn path(&self) -> PathBuf {
        self.0.path().join(FILE)
    }

    /// Returns the private folder.
    pub fn folder(&self) -> &Path {
        self.0.path()
    }

    /// Expects a complete file of that content. This blocks.
    ///
    /// # Errors
    /// The plugin has written no file, the file is too large, or it is no PNG image.
    pub fn check(&self, content: Content) -> Result<()> {
        let file = self.open()?;
        let length = file.metadata().map_err(|error| unreadable(&error))?.len();
        let max = match content {
            Content::Dump => MAX_DUMP,
            Content::Picture => MAX_PICTURE,
        };
        if length > max {
            return Err(Error::failed(format!("the file has {length} bytes, and may have {max}")));
        }
        match content {
            Content::Dump => Ok(()),
            Content::Picture => expect_png(file),
        }
    }

    /// Returns the picture in the file. This blocks.
    ///
    /// # Errors
    /// As [`check`](PrivateFile::check).
    pub fn picture(&self) -> Result<Vec<u8>> {
        self.check(Content::Picture)?;
        let mut picture = Vec::new();
        // The plugin could append to its file meanwhile.
        self.open()?.take(MAX_PICTURE).read_to_end(&mut picture).map_err(|error| unreadable(&error))?;
        Ok(picture)
    }

    /// Opens the file that the plugin has written.
    ///
    /// # Errors
    /// There is none.
    pub fn open(&self) -> Result<File> {
        self.open_io().map_err(|error| unreadable(&error))
    }

    /// Opens the file as [`open`](PrivateFile::open) does.
    ///
    /// # Errors
    /// There is none.
    pub fn open_io(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(open(self.path(), flags, Mode::empty())?);
        if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::InvalidData.into()) }
    }
}

fn unreadable(error: &io::Error) -> Error {
    Error::failed(format!("the plugin has written no file: {error}"))
}

/// Expects a PNG image. The decoder reads the signature and the header, and checks that they are valid.
fn expect_png(file: File) -> Result<()> {
    let wrong = |why: String| Error::failed(format!("the machine's screenshot is no PNG image: {why}"));
    let mut decoder = png::Decoder::new(BufReader::new(file));
    let header = decoder.read_header_info().map_err(|error| wrong(error.to_string()))?;
    let (width, height) = (header.width, header.height);
    if width > MAX_SIDE || height > MAX_SIDE {
        return Err(wrong(format!("it has {width} × {height} pixels")));
    }
    Ok(())
}
