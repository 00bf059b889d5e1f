//! Unix sockets under paths of any length.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A socket's path, and an address for it that fits into a socket address.
///
/// `sockaddr_un` holds 108 bytes with the final NUL (unix(7)), and the folder of a sandbox can be
/// deeper than that. Then the folder is held open and the address goes through `/proc`, which is
/// valid in every process of the same user for as long as this value lives.
#[derive(Debug)]
pub struct SocketPath {
    path: PathBuf,
    folder: Option<File>,
}

/// The longest path a socket address can hold.
const LONGEST: usize = 107;

impl SocketPath {
    /// The socket at `path`, whose folder exists.
    ///
    /// # Errors
    /// The path is too long and its folder cannot be opened.
    pub fn new(path: &Path) -> io::Result<Self> {
        let folder = match path.parent() {
            Some(folder) if is_too_long(path) => Some(File::open(folder)?),
            _ => None,
        };
        Ok(SocketPath { path: path.to_owned(), folder })
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What to bind or connect to.
    pub fn address(&self) -> PathBuf {
        match (&self.folder, self.path.file_name()) {
            (Some(folder), Some(name)) => {
                let folder = format!("/proc/{}/fd/{}", std::process::id(), folder.as_raw_fd());
                Path::new(&folder).join(name)
            }
            _ => self.path.clone(),
        }
    }
}

/// Whether a program that knows no way around the limit could not use this path.
fn is_too_long(path: &Path) -> bool {
    path.as_os_str().as_bytes().len() > LONGEST
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn a_long_path_can_be_bound_and_reached() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("x".repeat(150));
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("a.sock");
        assert!(UnixListener::bind(&path).is_err());
        let socket = SocketPath::new(&path).unwrap();
        let listener = UnixListener::bind(socket.address()).unwrap();
        assert!(path.exists());
        let _client = UnixStream::connect(SocketPath::new(&path).unwrap().address()).unwrap();
        listener.accept().unwrap();
    }

    #[test]
    fn a_short_path_is_its_own_address() {
        let socket = SocketPath::new(Path::new("/run/x.sock")).unwrap();
        assert_eq!(socket.address(), Path::new("/run/x.sock"));
    }
}
