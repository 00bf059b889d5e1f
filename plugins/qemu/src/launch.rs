//! From arguments to a QEMU process whose monitor is connected.
//!
//! QEMU connects its monitor to a socket that we listen on: so nobody has to look again and again
//! whether the socket is there, and it works with every QEMU back to the oldest.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use machinery::{Deadline, Error, ErrorKind, Result, SocketPath};
use rustix::net::SocketFlags;

use crate::disk::{self, DisposableDisk};
use crate::process::{End, Handle, Process};
use crate::snapshot::Snapshot;
use crate::version::Version;

/// How long a QEMU that fails by itself may take to end.
const ENDING: Duration = Duration::from_secs(2);

/// What a run is started with.
pub struct Start<'a> {
    pub machine: &'a str,
    pub program: &'a Path,
    pub version: Version,
    /// The machine's own arguments, with the disposable disk in its place.
    pub args: Vec<String>,
    pub disk: DisposableDisk,
    pub socket: &'a Path,
    /// Loaded before the guest runs; none is a cold boot.
    pub snapshot: Option<Snapshot>,
}

/// Starts QEMU and waits until it has connected its monitor.
pub fn connect(start: &Start<'_>, deadline: Deadline) -> Result<(Process, UnixStream)> {
    let failed = |error: io::Error| Error::io("make the monitor's socket", start.socket, &error);
    disk::remove(start.socket)?;
    let socket = SocketPath::new(start.socket).map_err(failed)?;
    let listener = UnixListener::bind(socket.address()).map_err(failed)?;
    let connected = launch(start, &socket, listener, deadline);
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
    deadline: Deadline,
) -> Result<(Process, UnixStream)> {
    let args = start.args.iter().cloned().chain(our_args(socket, start.snapshot.is_some()));
    let process = Process::start(start.program, args, start.machine)?;
    match accept(&listener.into(), process.handle(), deadline) {
        Ok(stream) => Ok((process, stream)),
        Err(error) => {
            let grace = if error.kind() == ErrorKind::Failed { ENDING } else { Duration::ZERO };
            let end = process.end(grace);
            Err(with_words(error, &end))
        }
    }
}

/// What is added to the machine's own arguments.
fn our_args(socket: &SocketPath, incoming: bool) -> Vec<String> {
    // A comma would end the value; QEMU reads two as one.
    let address = socket.address().display().to_string().replace(',', ",,");
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
    match end.last_words() {
        Some(words) => error
            .detail(&words)
            .advice("Look at what QEMU says; start_args in the machine's machineinfo.json are given to it as they are"),
        None => error,
    }
}
