//! Launches QEMU: from arguments to a process whose monitor is connected.
//!
//! The plugin makes the monitor's socket, connects to it, and has QEMU inherit the socket that listens. This needs no
//! polling for a socket of QEMU's, works in a jail that cannot make sockets, and leaves the socket's path to a later
//! host, which can connect as well.
//!
//! | number in QEMU | descriptor |
//! | --- | --- |
//! | 3 | the monitor's socket, which listens |
//! | 4 | the guest's RAM, if it is a file of the plugin |
//! | 5 | the run's own [TPM](crate::tpm), if it has one |
//! | 6 … | taps and sockets of the machine's own arguments |

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, Error, ErrorKind, Result, SocketPath};
use machinery_backend::cell::Cell;
use machinery_backend::jail::Confinement;
use machinery_backend::process::{End, Handle, Process};
use machinery_backend::{Overlays, Steps, files};
use rustix::net::{RecvFlags, recv};

use crate::console::kind_of;
use crate::options;
use crate::passed::{Passed, pass};
use crate::tpm::{self, Tpm};
use crate::version::Version;

/// The grace of a QEMU that fails by itself, before it is killed.
const FAILURE_GRACE: Duration = Duration::from_secs(2);

/// The name of the program in reasons.
pub const QEMU: &str = "QEMU";

/// QEMU's own filter of system calls, beside the jail's. libvirt uses the same. Source: `-sandbox` in QEMU's
/// qemu-options.hx.
const SANDBOX: [&str; 2] =
    ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"];

/// The numbers of the descriptors in QEMU.
const MONITOR: i32 = 3;
const RAM: i32 = 4;
const TPM: i32 = 5;
const FIRST_PASSED: i32 = 6;

/// The parameters of a new run.
pub struct Start<'a> {
    pub machine: &'a str,
    pub program: &'a Path,
    /// The folder in which QEMU runs, where relative paths in its arguments start.
    pub folder: &'a Path,
    pub version: Version,
    /// The machine's own arguments, with the overlays in place of its images.
    pub args: Vec<String>,
    /// True if the run has a console.
    pub console: bool,
    pub overlays: Overlays,
    pub socket: &'a Path,
    /// The guest's RAM, if it is a file of the plugin.
    pub memory: Option<Memory>,
    /// True if memory will be loaded before the guest runs.
    pub incoming: bool,
    pub confinement: Confinement,
    /// The run's own TPM.
    pub tpm: Option<Tpm>,
    /// The network of an isolated run.
    pub cell: Option<Arc<Cell>>,
    /// The interface of that network on the host.
    pub interface: Option<&'a str>,
    /// The files that the run writes.
    pub writes: Vec<PathBuf>,
    /// The sockets that the plugin makes in QEMU's place.
    pub sockets: Vec<PathBuf>,
}

/// A file that is the guest's RAM.
pub struct Memory {
    pub file: File,
    /// In bytes.
    pub size: u64,
    /// QEMU's name for the machine's RAM block: the snapshot's RAM is loaded into a block of that name.
    pub block: String,
    pub sharing: Sharing,
}

/// The destination of the guest's writes to its RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Writes go to the file, which is in memory.
    Written,
    /// Writes stay private to the process: the file is mapped copy-on-write.
    Mapped,
    /// As `Mapped`. The file is in memory, and nobody can change it.
    Sealed,
}

/// The path under which QEMU opens its RAM. Error messages of QEMU have it, too.
pub const RAM_PATH: &str = "/proc/self/fd/4";

impl Memory {
    fn args(&self, version: Version) -> Vec<String> {
        let sharing = match self.sharing {
            Sharing::Written => "share=on",
            Sharing::Mapped if version.maps_readonly_files() => "share=off,readonly=on,rom=off",
            Sharing::Mapped | Sharing::Sealed => "share=off",
        };
        let (block, size) = (&self.block, self.size);
        let object = format!("memory-backend-file,id={block},mem-path={RAM_PATH},size={size},{sharing}");
        vec!["-object".to_owned(), object, "-machine".to_owned(), format!("memory-backend={block}")]
    }

    /// Has the jail allow that QEMU opens the file. Of a file in memory, the kernel allows it always.
    fn allow(&self, confinement: &mut Confinement, version: Version) {
        if self.sharing == Sharing::Mapped {
            confinement.allow_reopening(RAM, !version.maps_readonly_files());
        }
    }
}

/// Starts QEMU, and waits until its monitor answers.
///
/// # Errors
/// QEMU does not start, ends, or does not answer in time. Nothing of it remains then.
pub fn connect(
    start: &mut Start<'_>,
    steps: &mut Steps,
    deadline: Deadline,
) -> Result<(Process, UnixStream)> {
    let failed = |error: io::Error| Error::io("make the monitor's socket", start.socket, &error);
    files::remove(start.socket)?;
    // A jailed QEMU removes no socket of an earlier run.
    start.sockets.iter().try_for_each(|socket| files::remove_socket(socket))?;
    let socket = SocketPath::new(start.socket).map_err(failed)?;
    let listener = UnixListener::bind(socket.address()).map_err(failed)?;
    // QEMU serves one connection at a time. This one waits in the socket's queue before any other can.
    let stream = UnixStream::connect(socket.address()).map_err(failed)?;
    let connected = launch(start, listener, stream, steps, deadline);
    if connected.is_err() {
        // The first error is the one to report.
        let _ = files::remove(start.socket);
        start.sockets.iter().for_each(|socket| drop(files::remove_socket(socket)));
        end_cgroup(&start.confinement);
    }
    connected
}

/// Ends what a process has left in its cgroup, if it had one.
fn end_cgroup(confinement: &Confinement) {
    if let Some(cgroup) = confinement.cgroup() {
        cgroup.end();
    }
}

fn launch(
    start: &mut Start<'_>,
    listener: UnixListener,
    stream: UnixStream,
    steps: &mut Steps,
    deadline: Deadline,
) -> Result<(Process, UnixStream)> {
    let (command, tpm) = command(start, listener, deadline)?;
    let process = Process::start_with_helper(command, tpm, start.machine, kind_of)?;
    steps.done("spawn");
    match wait_for_greeting(
        &stream.as_fd().try_clone_to_owned().map_err(no_monitor)?,
        process.handle(),
        deadline,
    ) {
        Ok(()) => {
            steps.done("monitor");
            Ok((process, stream))
        }
        Err(error) => {
            let grace = if error.kind() == ErrorKind::Failed { FAILURE_GRACE } else { Duration::ZERO };
            Err(with_output(error, &process.end(grace).named(QEMU)))
        }
    }
}

/// Returns the command that runs QEMU in its jail, and that of its TPM.
fn command(
    start: &mut Start<'_>,
    listener: UnixListener,
    deadline: Deadline,
) -> Result<(Command, Option<Command>)> {
    let mut descriptors: Vec<(OwnedFd, i32)> = vec![(listener.into(), MONITOR)];
    let mut args = start.args.clone();
    let tpm = start.tpm.as_mut().map(|tpm| tpm::command(tpm, &mut args, TPM, !start.incoming)).transpose()?;
    let tpm = tpm.flatten().map(|(command, connection)| {
        descriptors.push((connection, TPM));
        command
    });
    if start.confinement.is_confined() {
        let passed = pass(args, FIRST_PASSED, start.folder, start.cell.as_deref(), deadline)?;
        let Passed { args: with_numbers, descriptors: opened } = passed;
        args = with_numbers;
        args.extend(SANDBOX.map(str::to_owned));
        if !start.version.has_default_audio() && !names_sound_backend(&start.args) {
            // An older QEMU tries one backend after the other, and one of them crashes where it can open no device. Source:
            // `audio_init` in QEMU's audio/audio.c, and audio/audio_legacy.c, before 8.2.
            start.confinement.set_variable("QEMU_AUDIO_DRV", "none");
        }
        descriptors.extend(opened);
    }
    args.extend(plugin_args(start.incoming));
    args.extend(sound_args(start.version, &start.args));
    if start.console {
        args.extend(console_args(&start.args));
    }
    if let Some(memory) = start.memory.take() {
        args.extend(memory.args(start.version));
        memory.allow(&mut start.confinement, start.version);
        descriptors.push((memory.file.into(), RAM));
    }
    if let Some(cell) = &start.cell {
        start.confinement.enter_network(cell.namespace())?;
    }
    let mut command = start.confinement.command(start.program, descriptors)?;
    command.args(args).current_dir(start.folder);
    Ok((command, tpm))
}

/// Returns the arguments that the plugin adds to the machine's own.
fn plugin_args(incoming: bool) -> Vec<String> {
    let chardev = format!("socket,id=cuckoo-monitor,fd={MONITOR},server=on,wait=off");
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
    if !version.has_default_audio() || names_sound_backend(args) {
        return Vec::new();
    }
    ["-audio", "none"].map(str::to_owned).to_vec()
}

fn names_sound_backend(args: &[String]) -> bool {
    options::walk(args).any(|(_, name, _)| matches!(name, "audio" | "audiodev"))
}

/// Returns the arguments that give a run its console: a VNC server that listens nowhere, unless the machine's own
/// arguments have a server. By default, a viewer that does not ask to share the screen disconnects all others.
fn console_args(args: &[String]) -> Vec<String> {
    let is_server = |name, value: &str| {
        name == "vnc" || (name == "display" && value.split([',', '=']).next() == Some("vnc"))
    };
    match options::walk(args).any(|(_, name, value)| is_server(name, value)) {
        true => Vec::new(),
        false => ["-vnc", "none,share=ignore"].map(str::to_owned).to_vec(),
    }
}

/// Connects to the monitor of a QEMU that an earlier host has started.
///
/// # Errors
/// QEMU has ended, or does not answer in time.
pub fn reconnect(socket: &Path, process: &Handle, deadline: Deadline) -> Result<UnixStream> {
    let failed = |error: io::Error| Error::io("connect to the monitor's socket", socket, &error);
    let address = SocketPath::new(socket).map_err(failed)?;
    let stream = UnixStream::connect(address.address()).map_err(failed)?;
    wait_for_greeting(&stream.as_fd().try_clone_to_owned().map_err(no_monitor)?, process, deadline)?;
    Ok(stream)
}

/// Waits for the first line of the monitor.
fn wait_for_greeting(stream: &OwnedFd, process: &Handle, deadline: Deadline) -> Result<()> {
    match process.ended_before(stream, deadline.remaining()).map_err(no_monitor)? {
        None => Err(deadline.timeout("QEMU to answer on its monitor")),
        Some(false) if has_data(stream) => Ok(()),
        // The end of QEMU closes its socket, which can be read then.
        Some(_) => Err(Error::failed("QEMU ended before its monitor answered")),
    }
}

fn has_data(stream: &OwnedFd) -> bool {
    let mut byte = [0_u8; 1];
    matches!(recv(stream, &mut byte, RecvFlags::PEEK), Ok((1.., _)))
}

fn no_monitor(error: io::Error) -> Error {
    Error::environment(format!("cannot wait for QEMU's monitor: {error}"))
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

    #[test]
    fn console_gets_a_server_unless_the_arguments_have_one() {
        let added = |list: &[&str]| console_args(&list.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>());
        for without in [&["-m", "32"][..], &["-display", "none"], &["-name", "-vnc"], &["-nographic"]] {
            assert_eq!(added(without), ["-vnc", "none,share=ignore"], "{without:?}");
        }
        for with in [["-vnc", "127.0.0.1:1"], ["--vnc", "none"], ["-display", "vnc=:3,share=ignore"]] {
            assert!(added(&with).is_empty(), "{with:?}");
        }
    }
}
