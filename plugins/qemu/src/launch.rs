//! From arguments to a QEMU process whose monitor is connected.
//!
//! QEMU connects its monitor to a socket that we listen on: so nobody has to look again and again
//! whether the socket is there, and it works with every QEMU back to the oldest.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery::{Deadline, Error, ErrorKind, Result, SocketPath};
use rustix::net::SocketFlags;

use crate::disk::{self, Overlays};
use crate::options::escaped;
use crate::process::{End, Handle, Process};
use crate::steps::Steps;
use crate::version::Version;

/// How long a QEMU that fails by itself may take to end.
const ENDING: Duration = Duration::from_secs(2);

/// What a run is started with.
pub struct Start<'a> {
    pub machine: &'a str,
    pub program: &'a Path,
    /// The folder in which QEMU runs, where relative paths in its arguments start.
    pub folder: &'a Path,
    pub version: Version,
    /// The machine's own arguments, with the overlays in place of its images.
    pub args: Vec<String>,
    pub overlays: Overlays,
    pub socket: &'a Path,
    /// The guest's RAM, if it is a file of ours.
    pub memory: Option<Memory>,
    /// Whether something will be loaded before the guest runs.
    pub incoming: bool,
}

/// A file that is the guest's RAM.
pub struct Memory {
    pub file: PathBuf,
    /// In bytes.
    pub size: u64,
    /// QEMU's name for the machine's RAM block: the snapshot's RAM is loaded into a block of that name.
    pub block: String,
    pub sharing: Sharing,
}

/// What becomes of what the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// It is written to the file.
    Written,
    /// The guest keeps it for itself.
    Mapped,
}

impl Memory {
    fn args(&self, version: Version) -> Vec<String> {
        let file = escaped(&self.file.display().to_string());
        let sharing = match self.sharing {
            Sharing::Written => "share=on",
            Sharing::Mapped if version.maps_readonly_files() => "share=off,readonly=on,rom=off",
            Sharing::Mapped => "share=off",
        };
        let (block, size) = (&self.block, self.size);
        let object = format!("memory-backend-file,id={block},mem-path={file},size={size},{sharing}");
        vec!["-object".to_owned(), object, "-machine".to_owned(), format!("memory-backend={block}")]
    }
}

/// Starts QEMU and waits until it has connected its monitor.
pub fn connect(
    start: &Start<'_>,
    steps: &mut Steps<'_>,
    deadline: Deadline,
) -> Result<(Process, UnixStream)> {
    let failed = |error: io::Error| Error::io("make the monitor's socket", start.socket, &error);
    disk::remove(start.socket)?;
    let socket = SocketPath::new(start.socket).map_err(failed)?;
    let listener = UnixListener::bind(socket.address()).map_err(failed)?;
    let connected = launch(start, &socket, listener, steps, deadline);
    if connected.is_err() {
        // The error at hand is the one to tell.
        let _ = disk::remove(start.socket);
    }
    connected
}

fn launch(
    start: &Start<'_>,
    socket: &SocketPath,
    listener: UnixListener,
    steps: &mut Steps<'_>,
    deadline: Deadline,
) -> Result<(Process, UnixStream)> {
    let memory = start.memory.iter().flat_map(|memory| memory.args(start.version));
    let args = start.args.iter().cloned().chain(our_args(socket, start.incoming)).chain(memory);
    let process = Process::start(start.program, args, start.folder, start.machine)?;
    steps.done("spawn");
    match accept(&listener.into(), process.handle(), deadline) {
        Ok(stream) => {
            steps.done("monitor");
            Ok((process, stream))
        }
        Err(error) => {
            let grace = if error.kind() == ErrorKind::Failed { ENDING } else { Duration::ZERO };
            let end = process.end(grace);
            Err(with_words(error, &end))
        }
    }
}

/// What is added to the machine's own arguments.
fn our_args(socket: &SocketPath, incoming: bool) -> Vec<String> {
    let address = escaped(&socket.address().display().to_string());
    let chardev = format!("socket,id=cuckoo-monitor,path={address}");
    let mut args = vec!["-chardev", &chardev, "-mon", "chardev=cuckoo-monitor,mode=control"];
    // Paused until all is ready, on a cold boot too.
    args.extend(["-monitor", "none", "-S"]);
    if incoming {
        args.extend(["-incoming", "defer"]);
    }
    args.into_iter().map(str::to_owned).collect()
}

/// Waits for that process to connect; others who find the socket are turned away.
fn accept(listener: &OwnedFd, process: &Handle, deadline: Deadline) -> Result<UnixStream> {
    let failed = |error: io::Error| Error::environment(format!("cannot wait for QEMU's monitor: {error}"));
    loop {
        match process.ended_before(listener, deadline.remaining()).map_err(failed)? {
            None => return Err(deadline.timeout("QEMU to connect its monitor")),
            Some(true) => return Err(Error::failed("QEMU ended before its monitor was connected")),
            Some(false) => {}
        }
        let stream = UnixStream::from(
            rustix::net::accept_with(listener, SocketFlags::CLOEXEC).map_err(|e| failed(e.into()))?,
        );
        let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(|error| failed(error.into()))?;
        if peer.pid.as_raw_nonzero().get().cast_unsigned() == process.pid() {
            return Ok(stream);
        }
        tracing::warn!(
            pid = peer.pid.as_raw_nonzero().get(),
            "a stranger at the monitor's socket was turned away"
        );
    }
}

/// Adds what QEMU said at its end to the error of what was being done.
pub fn with_words(error: Error, end: &End) -> Error {
    let words = end.last_words();
    if words.is_empty() {
        return error;
    }
    error.detail(&words).default_advice(
        "Look at what QEMU says; start_args in the machine's machineinfo.json are given to it as they are",
    )
}
