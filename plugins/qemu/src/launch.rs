//! Launches QEMU: from arguments to a process whose monitor is connected.
//!
//! QEMU connects its monitor to a socket on which the plugin listens. This needs no polling for a socket of
//! QEMU's, and works with every supported version.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery::{Deadline, Error, ErrorKind, Result, SocketPath};
use machinery_backend::process::{End, Handle, Process};
use machinery_backend::{Overlays, Steps, files};
use rustix::net::SocketFlags;

use crate::console::kind_of;
use crate::options::{self, escaped};
use crate::version::Version;

/// The grace of a QEMU that fails by itself, before it is killed.
const FAILURE_GRACE: Duration = Duration::from_secs(2);

/// The name of the program in reasons.
pub const QEMU: &str = "QEMU";

/// The parameters of a new run.
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
    /// The guest's RAM, if it is a file of the plugin.
    pub memory: Option<Memory>,
    /// True if memory will be loaded before the guest runs.
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

/// The destination of the guest's writes to its RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Writes go to the file.
    Written,
    /// Writes stay private to the process: the file is mapped copy-on-write.
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

/// Starts QEMU, and waits until it has connected its monitor.
///
/// # Errors
/// QEMU does not start, ends, or does not connect in time. Nothing of it remains then.
pub fn connect(start: &Start<'_>, steps: &mut Steps, deadline: Deadline) -> Result<(Process, UnixStream)> {
    let failed = |error: io::Error| Error::io("make the monitor's socket", start.socket, &error);
    files::remove(start.socket)?;
    let socket = SocketPath::new(start.socket).map_err(failed)?;
    let listener = UnixListener::bind(socket.address()).map_err(failed)?;
    let connected = launch(start, &socket, listener, steps, deadline);
    if connected.is_err() {
        // The first error is the one to report.
        let _ = files::remove(start.socket);
    }
    connected
}

fn launch(
    start: &Start<'_>,
    socket: &SocketPath,
    listener: UnixListener,
    steps: &mut Steps,
    deadline: Deadline,
) -> Result<(Process, UnixStream)> {
    let memory = start.memory.iter().flat_map(|memory| memory.args(start.version));
    let args = start.args.iter().cloned().chain(plugin_args(socket, start.incoming));
    let args = args.chain(sound_args(start.version, &start.args)).chain(memory);
    let mut command = machinery::command(start.program);
    command.args(args).current_dir(start.folder);
    let process = Process::start(command, start.machine, kind_of)?;
    steps.done("spawn");
    match accept(&listener.into(), process.handle(), deadline) {
        Ok(stream) => {
            steps.done("monitor");
            Ok((process, stream))
        }
        Err(error) => {
            let grace = if error.kind() == ErrorKind::Failed { FAILURE_GRACE } else { Duration::ZERO };
            Err(with_output(error, &process.end(grace).named(QEMU)))
        }
    }
}

/// Returns the arguments that the plugin adds to the machine's own.
fn plugin_args(socket: &SocketPath, incoming: bool) -> Vec<String> {
    let address = escaped(&socket.address().display().to_string());
    let chardev = format!("socket,id=cuckoo-monitor,path={address}");
    let mut args = vec!["-chardev", &chardev, "-mon", "chardev=cuckoo-monitor,mode=control"];
    // The guest stays paused until it is resumed, on a cold boot too.
    args.extend(["-monitor", "none", "-S"]);
    if incoming {
        args.extend(["-incoming", "defer"]);
    }
    args.into_iter().map(str::to_owned).collect()
}

/// Returns the arguments that give the guest's sound card a silent backend, unless the machine's own arguments name a
/// backend. A QEMU without a default backend refuses a sound card, as Debian 13's does where no module for sound is
/// installed. VMCloak's arguments name none. Source: `audio_define_default` in QEMU's audio/audio.c.
fn sound_args(version: Version, args: &[String]) -> Vec<String> {
    let names_backend = |(_, name, _): (usize, &str, &str)| matches!(name, "audio" | "audiodev");
    if !version.has_default_audio() || options::walk(args).any(names_backend) {
        return Vec::new();
    }
    ["-audio", "none"].map(str::to_owned).to_vec()
}

/// Waits for that process to connect. Other processes that connect are rejected.
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
            "rejected a connection of another process to the monitor's socket"
        );
    }
}

/// Adds QEMU's output and its exit status to the error of a failed start.
pub fn with_output(error: Error, end: &End) -> Error {
    let failure = end.failure();
    if failure.is_empty() {
        return error;
    }
    error.detail(&failure).default_advice(
        "Look at QEMU's message; QEMU gets the start_args in the machine's machineinfo.json unchanged",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sound_card_gets_a_silent_backend_when_the_arguments_name_none() {
        let args = |list: &[&str]| list.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
        let card = args(&["-device", "intel-hda", "-device", "hda-duplex"]);
        assert_eq!(sound_args(Version::new(10, 0, 8), &card), ["-audio", "none"]);
        assert!(sound_args(Version::new(7, 2, 22), &card).is_empty());
        let own = args(&["-audiodev", "pa,id=a", "-device", "hda-duplex,audiodev=a"]);
        assert!(sound_args(Version::new(10, 0, 8), &own).is_empty());
    }
}
