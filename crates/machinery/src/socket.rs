//! Unix sockets with paths of any length.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The path of a socket, and an equivalent path that fits into a socket address.
///
/// `sockaddr_un` holds 108 bytes with the final NUL (unix(7)), and the folder of a sandbox can have a longer path.
/// In that case this value keeps the folder open, and the address is a path in `/proc`. It is valid in every process
/// of the same user as long as this value exists.
#[derive(Debug)]
pub struct SocketPath {
    path: PathBuf,
    folder: Option<File>,
}

/// The maximum length of a path in a socket address.
const MAX_PATH: usize = 107;

/// The maximum length of a file name that fits behind `/proc/PID/fd/N/`, with a 7-digit process and a 10-digit
/// descriptor.
const MAX_NAME: usize = MAX_PATH - "/proc/1234567/fd/1234567890/".len();

/// Returns the path of a machine's own socket: `<machinery>_<machine>.sock`. If a machine's name is too long
/// for a socket address, its first part and a hash of the whole name are used. No machine's name contains
/// `~`.
pub fn machine_socket(folder: &Path, machinery: &str, machine: &str) -> PathBuf {
    let name = format!("{machinery}_{machine}.sock");
    if name.len() <= MAX_NAME {
        return folder.join(name);
    }
    let end = format!("~{:016x}.sock", hash(machine));
    let start = format!("{machinery}_{machine}");
    let start = &start[..start.floor_char_boundary(MAX_NAME.saturating_sub(end.len()))];
    folder.join(format!("{start}{end}"))
}

/// Computes FNV-1a with 64 bits: the same in every build, because a later host looks for the sockets of an
/// earlier one.
fn hash(text: &str) -> u64 {
    let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    text.as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, mix)
}

impl SocketPath {
    /// Creates the address of the socket at `path`. Its folder must exist.
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

    /// Returns the path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path to bind or connect to.
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

/// Reports whether the path is too long for a socket address.
fn is_too_long(path: &Path) -> bool {
    path.as_os_str().as_bytes().len() > MAX_PATH
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn socket_can_be_bound_and_reached_when_its_path_is_long() {
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
    fn machine_socket_can_be_bound_when_name_and_folder_are_long() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("x".repeat(150));
        std::fs::create_dir(&folder).unwrap();
        assert_eq!(machine_socket(&folder, "qemu", "win10_1"), folder.join("qemu_win10_1.sock"));
        let names = ["n".repeat(100), format!("{}m", "n".repeat(99)), "ж".repeat(50)];
        let paths = names.map(|name| machine_socket(&folder, "a-machinery", &name));
        for path in &paths {
            let socket = SocketPath::new(path).unwrap();
            UnixListener::bind(socket.address()).unwrap();
            let worst =
                format!("/proc/4194304/fd/1000000000/{}", path.file_name().unwrap().to_str().unwrap());
            assert!(worst.len() <= MAX_PATH, "{worst}");
        }
        assert!(paths[0] != paths[1], "names that differ at their end have sockets of their own");
    }

    #[test]
    fn socket_name_of_a_long_machine_name_never_changes() {
        let name = "n".repeat(100);
        let socket = machine_socket(Path::new("/s"), "qemu", &name);
        assert_eq!(hash("a"), 0xaf63_dc4c_8601_ec8c, "the published value of FNV-1a");
        let start = format!("/s/qemu_{}", "n".repeat(52));
        assert_eq!(socket, Path::new(&format!("{start}~{:016x}.sock", hash(&name))));
    }

    #[test]
    fn address_is_the_path_when_it_is_short() {
        let socket = SocketPath::new(Path::new("/run/x.sock")).unwrap();
        assert_eq!(socket.address(), Path::new("/run/x.sock"));
    }
}
