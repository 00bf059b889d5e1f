//! Paths that clients have named.
//!
//! Root and the host's user may name any path. A path of another user is resolved by the kernel below `storage`, and no
//! component of it may be a symbolic link. So no link and no rename at any time leads the host to another folder.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use machinery::{Error, Result};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, fchown, fstat, ftruncate, open, openat2, statat,
};
use rustix::io::Errno;
use rustix::process::{Gid, Uid, geteuid};
use serde::{Deserialize, Serialize};

use super::folders::Folders;

/// A user who is neither root nor the host's user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The number of the user.
    pub uid: u32,
    /// The number of the user's group.
    pub gid: u32,
}

/// A path that a client has named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedFile {
    /// The path, which is absolute.
    pub path: PathBuf,
    /// The client's user, unless that is root or the host's user.
    pub owner: Option<Owner>,
}

/// The folder of a file, and its name there.
#[derive(Debug)]
pub struct Parent {
    folder: OwnedFd,
    name: OsString,
    owner: Owner,
    path: PathBuf,
}

impl Owner {
    /// Expects that this user may name that path. The files of `storage` are not read.
    ///
    /// # Errors
    /// The path leads out of `storage`.
    pub fn expect_below(self, path: &Path, storage: &Path) -> Result<()> {
        below(path, storage).map(drop).ok_or_else(|| {
            let (path, storage) = (path.display(), storage.display());
            Error::environment(format!("user {} may not have a file written to {path}", self.uid))
                .advice(format!("Pass an open descriptor with `fd`, or name a file below {storage}"))
        })
    }

    /// Makes this user the owner of the file. Only root can do that.
    pub fn give(self, file: impl AsFd) -> io::Result<()> {
        if !geteuid().is_root() {
            return Ok(());
        }
        Ok(fchown(file, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))?)
    }
}

/// Returns the rest of a path below `storage`, without `..`.
fn below<'a>(path: &'a Path, storage: &Path) -> Option<&'a Path> {
    let rest = path.strip_prefix(storage).ok()?;
    let is_plain = rest.components().all(|part| matches!(part, Component::Normal(_)));
    (is_plain && rest.file_name().is_some() && !path.as_os_str().as_encoded_bytes().ends_with(b"/"))
        .then_some(rest)
}

/// The content of a file that exists already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It is removed.
    Truncated,
    /// It stays, and can be read.
    Kept,
}

impl Existing {
    fn flags(self) -> OFlags {
        let access = if self == Existing::Kept { OFlags::RDWR } else { OFlags::WRONLY };
        access | OFlags::NOFOLLOW | OFlags::CLOEXEC
    }

    fn apply(self, file: impl AsFd) -> Result<(), Errno> {
        if self == Existing::Truncated { ftruncate(file, 0) } else { Ok(()) }
    }
}

/// The resolution of a client's path.
const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

impl NamedFile {
    /// Opens the folder of another user's path.
    ///
    /// # Errors
    /// The path leads out of `storage` or over a symbolic link, or the folder does not exist.
    pub fn parent(&self, owner: Owner, folders: &Folders) -> Result<Parent> {
        owner.expect_below(&self.path, &folders.storage)?;
        let failed = |error: Errno| refused(&self.path, error);
        let rest = below(&self.path, &folders.storage).unwrap_or(Path::new(""));
        let folder = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        let storage = open(&folders.storage, folder, Mode::empty()).map_err(failed)?;
        let beside = rest.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = openat2(&storage, beside, folder, Mode::empty(), BENEATH).map_err(failed)?;
        let name = rest.file_name().unwrap_or(OsStr::new("")).to_owned();
        Ok(Parent { folder, name, owner, path: self.path.clone() })
    }

    /// Opens the file for a capture. A missing file is created.
    ///
    /// # Errors
    /// The file cannot be created; something else than a regular file exists at the path; another user's file does, or
    /// one with other names.
    pub fn open(&self, folders: &Folders, content: Existing) -> Result<File> {
        match self.owner {
            None => open_any(&self.path, content),
            Some(owner) => self.parent(owner, folders)?.open(content),
        }
    }
}

impl Parent {
    /// Returns the folder.
    pub fn folder(&self) -> &OwnedFd {
        &self.folder
    }

    /// Returns the name of the file in the folder.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// Returns the future owner of the file.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// Returns the path that the client has named.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reports whether a file exists that may be replaced: a regular one of the owner, with no other name.
    ///
    /// # Errors
    /// Something else exists.
    pub fn has_own_file(&self) -> Result<bool> {
        match statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => self.expect_own(&found).map(|()| true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(refused(&self.path, error)),
        }
    }

    fn expect_own(&self, found: &Stat) -> Result<()> {
        expect_regular(found, &self.path)?;
        if found.st_uid == self.owner.uid {
            return Ok(());
        }
        let (path, uid) = (self.path.display(), self.owner.uid);
        Err(Error::environment(format!(
            "cannot write to {path}: it exists and does not belong to user {uid}"
        ))
        .advice("Name a path that does not exist, or pass an open descriptor with `fd`"))
    }

    fn open(&self, content: Existing) -> Result<File> {
        let failed = |error: Errno| refused(&self.path, error);
        let flags = content.flags();
        let new = flags | OFlags::CREATE | OFlags::EXCL;
        match openat2(&self.folder, &self.name, new, Mode::from_raw_mode(0o600), BENEATH) {
            Ok(file) => {
                self.owner.give(&file).map_err(|error| cannot_write(&self.path, &error))?;
                Ok(File::from(file))
            }
            Err(Errno::EXIST) => {
                // Not blocked by a pipe without a reader.
                let there = flags | OFlags::NONBLOCK;
                let file =
                    openat2(&self.folder, &self.name, there, Mode::empty(), BENEATH).map_err(failed)?;
                self.expect_own(&fstat(&file).map_err(failed)?)?;
                content.apply(&file).map_err(failed)?;
                Ok(File::from(file))
            }
            Err(error) => Err(failed(error)),
        }
    }
}

/// Opens a file that root or the host's user has named.
fn open_any(path: &Path, content: Existing) -> Result<File> {
    let failed = |error: Errno| refused(path, error);
    let flags = content.flags() | OFlags::NONBLOCK;
    let file = match open(path, flags | OFlags::CREATE | OFlags::EXCL, Mode::from_raw_mode(0o644)) {
        Err(Errno::EXIST) => open(path, flags, Mode::empty()),
        opened => opened,
    };
    let file = file.map_err(failed)?;
    expect_regular(&fstat(&file).map_err(failed)?, path)?;
    content.apply(&file).map_err(failed)?;
    Ok(File::from(file))
}

/// Expects that nothing exists at the path, or a regular file.
///
/// # Errors
/// Something else exists.
pub fn expect_replaceable(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => Err(no_file(path)),
        _ => Ok(()),
    }
}

fn expect_regular(found: &Stat, path: &Path) -> Result<()> {
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        return Err(no_file(path));
    }
    if found.st_nlink > 1 {
        let error = format!("cannot write to {}: the file has another name, too", path.display());
        return Err(Error::environment(error).advice("Name a path that does not exist"));
    }
    Ok(())
}

fn no_file(path: &Path) -> Error {
    Error::environment(format!("cannot write to {}: something exists there that is no file", path.display()))
        .advice("Name a file, or a path that does not exist")
}

fn refused(path: &Path, error: Errno) -> Error {
    let failed = cannot_write(path, &error.into());
    match error {
        Errno::LOOP => failed.advice("Name the path without symbolic links"),
        Errno::XDEV => failed.advice("Name the path without `..`"),
        Errno::NOSYS => failed.advice("The kernel has no openat2(2): pass an open descriptor with `fd`"),
        Errno::NXIO | Errno::ISDIR => no_file(path),
        _ => failed,
    }
}

/// The error of a file that cannot be written.
pub fn cannot_write(path: &Path, error: &io::Error) -> Error {
    Error::io("write to", path, error)
}

/// Removes a name in a folder. After a failure, a file is left that only its owner can read.
pub fn remove(folder: &OwnedFd, name: &OsStr) {
    let _ = rustix::fs::unlinkat(folder, name, AtFlags::empty());
}
