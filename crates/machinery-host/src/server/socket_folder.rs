//! An open folder of sockets, in which another user may rename what the host makes.
//!
//! ```text
//! operational/sockets, opened ─▶ .new-…, opened ─▶ the socket, opened: its group and mode ─▶ renamed to its name
//!                           └─▶ console, opened: its group and mode
//! ```
//!
//! Cuckoo's user can own the folder while the host is root. A path in it could then lead to a file of somebody else, such as
//! by a link in the place of a folder. So the host opens what it has made, follows no link, and changes only what is open.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat, renameat};
use rustix::io::Errno;
use rustix::process::geteuid;
use tokio::net::UnixListener;

use super::peers::Peers;

/// A folder of sockets.
pub struct SocketFolder {
    path: PathBuf,
    folder: File,
}

impl SocketFolder {
    /// Opens the folder that a path is in, and returns it with the name in it.
    ///
    /// # Errors
    /// There is no such folder, or the path has no name.
    pub fn of(path: &Path) -> Result<(Self, &OsStr)> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::configuration(format!("{} is no place for a socket", path.display())));
        };
        let opened = openat(CWD, folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let opened = opened.map_err(|error| Error::io("open the folder", folder, &error.into()))?;
        Ok((SocketFolder { path: folder.to_owned(), folder: opened.into() }, name))
    }

    /// Opens the host's own folder of that name, which those peers alone can pass. A missing one is made.
    ///
    /// # Errors
    /// The folder cannot be made or opened, or belongs to another user.
    pub fn own_folder(&self, name: &OsStr, peers: &Peers) -> Result<Self> {
        let path = self.path.join(name);
        let made = match mkdirat(&self.folder, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => self.own(name),
            Err(error) => Err(error.into()),
        };
        let opened = made.and_then(|folder| {
            if peers.gid().is_some() {
                open_to(&folder, peers, 0o710)?;
            }
            Ok(folder)
        });
        let folder = opened.map_err(|error| Error::io("make the folder", &path, &error))?;
        Ok(SocketFolder { path, folder })
    }

    /// Opens a folder of the host's user.
    fn own(&self, name: &OsStr) -> io::Result<File> {
        let folder = self.opened(name, OFlags::DIRECTORY)?;
        let owner = folder.metadata()?.uid();
        match owner == geteuid().as_raw() {
            true => Ok(folder),
            false => Err(io::Error::other(format!("it belongs to user {owner}, and not to the host's"))),
        }
    }

    /// Opens what has that name, and not the target of a link.
    fn opened(&self, name: &OsStr, kind: OFlags) -> io::Result<File> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC | kind;
        Ok(openat(&self.folder, name, flags, Mode::empty())?.into())
    }

    /// Binds a socket for those peers alone. It listens before its name appears, and replaces another file of that name.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn bind(&self, name: &OsStr, peers: &Peers) -> Result<UnixListener> {
        let path = self.path.join(name);
        let failed = |error: io::Error| Error::io("make the socket", &path, &error);
        // A new folder is accessible to this user alone, so nobody can connect before the mode is set.
        let new =
            tempfile::Builder::new().prefix(".new-").tempdir_in(inside(&self.folder)).map_err(failed)?;
        let folder = self.own(new.path().file_name().unwrap_or_default()).map_err(failed)?;
        let private = SocketFolder { path: new.path().to_owned(), folder };
        let socket = OsStr::new("sock");
        let listener = UnixListener::bind(inside(&private.folder).join(socket)).map_err(failed)?;
        private.open_socket_to(socket, peers).map_err(|error| {
            failed(error).advice("The host's user has to be a member of the socket's group, or root")
        })?;
        renameat(&private.folder, socket, &self.folder, name).map_err(|error| failed(error.into()))?;
        Ok(listener)
    }

    /// Gives those peers alone the right to connect to a socket.
    ///
    /// # Errors
    /// No socket has that name, or its group or mode cannot be set.
    pub fn open_socket_to(&self, name: &OsStr, peers: &Peers) -> io::Result<()> {
        let socket = self.opened(name, OFlags::empty())?;
        if !socket.metadata()?.file_type().is_socket() {
            return Err(Errno::NOTSOCK.into());
        }
        open_to(&socket, peers, if peers.gid().is_some() { 0o660 } else { 0o600 })
    }

    /// Removes a socket. A missing one is no error.
    pub fn remove(&self, name: &OsStr) {
        self.expect_removed(name, fs::remove_file(inside(&self.folder).join(name)));
    }

    /// Removes a folder with all that is in it. A missing one is no error.
    pub fn remove_folder(&self, name: &OsStr) {
        self.expect_removed(name, fs::remove_dir_all(inside(&self.folder).join(name)));
    }

    fn expect_removed(&self, name: &OsStr, removed: io::Result<()>) {
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.join(name).display(), %error, "a socket or its folder cannot be removed");
        }
    }
}

/// Gives an open file the group of those peers, and that mode.
fn open_to(open: &File, peers: &Peers, mode: u32) -> io::Result<()> {
    chown(inside(open), None, peers.gid())?;
    fs::set_permissions(inside(open), Permissions::from_mode(mode))
}

/// Returns a path that leads to what is open, whatever happens to its name. It fits into the address of a socket.
fn inside(open: &File) -> PathBuf {
    format!("/proc/self/fd/{}", open.as_raw_fd()).into()
}
