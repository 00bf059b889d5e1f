//! The demo's host: one that serves, and its one-shot commands.
//!
//! The host reports that it is ready as it reports it to systemd. When the demo ends in any way, the host
//! gets SIGTERM, and stops its machines.

use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, Signal, kill_process};

use crate::leftovers::RunMarker;
use crate::process::{ends_within, handle, signal_at_our_end, wait};
use crate::run::{Context, Result, line};

const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// A host stops its machines at its end, each of which may take a minute.
const END_TIMEOUT: Duration = Duration::from_secs(90);
/// The number of lines of the host's log in an error.
const LAST_LINES: usize = 20;

/// The host's program, used on one CWD.
pub struct DemoHost<'a> {
    program: &'a Path,
    cwd: &'a Path,
    marker: &'a RunMarker,
    host: Option<Child>,
}

impl<'a> DemoHost<'a> {
    /// Uses `program` on `cwd`; all its processes get `marker`.
    pub fn new(program: &'a Path, cwd: &'a Path, marker: &'a RunMarker) -> Self {
        Self { program, cwd, marker, host: None }
    }

    /// Runs a one-shot command; its output is shown.
    pub fn run<'b>(&self, args: impl IntoIterator<Item = &'b str>) -> Result<()> {
        let mut command = Command::new(self.program);
        command.args(args);
        println!("  $ {}", line(&command));
        command.env("CUCKOO_CWD", self.cwd);
        self.marker.apply_to(&mut command);
        let status = command.status().context(|| format!("cannot run {}", self.program.display()))?;
        if status.success() {
            return Ok(());
        }
        Err(format!("`{}` failed with {status}{}", line(&command), self.log()).into())
    }

    /// Starts the host and waits until it is ready.
    pub fn serve(&mut self) -> Result<()> {
        let what = || "cannot start the host".to_owned();
        let address = self.cwd.join("ready.sock");
        let socket = UnixDatagram::bind(&address).context(what)?;
        let log = File::create(self.log_path()).context(what)?;
        let mut command = Command::new(self.program);
        command.arg("--cwd").arg(self.cwd).arg("serve").env("NOTIFY_SOCKET", &address);
        command.stdin(Stdio::null()).stdout(log.try_clone().context(what)?).stderr(log);
        self.marker.apply_to(&mut command);
        // Ctrl-C is for the demo; a host exits at once on a second signal.
        command.process_group(0);
        signal_at_our_end(&mut command, Signal::TERM);
        let host = self.host.insert(command.spawn().context(what)?);
        let pid = Pid::from_child(host);
        if wait_until_ready(&socket, pid)? {
            return Ok(());
        }
        Err(format!("the host did not become ready{}", self.log()).into())
    }

    /// Sends SIGTERM, as systemd does, and waits for the host's end.
    pub fn end(&mut self) -> Result<()> {
        let Some(mut host) = self.host.take() else { return Ok(()) };
        let pid = Pid::from_child(&host);
        let signalled = kill_process(pid, Signal::TERM).context(|| "cannot send the host SIGTERM".to_owned());
        let ended = signalled.and_then(|()| ends_within(pid, END_TIMEOUT));
        if !matches!(ended, Ok(true)) {
            // The host may have ended meanwhile.
            let _ = host.kill();
        }
        let status = host.wait().context(|| "cannot wait for the host".to_owned())?;
        if !ended? {
            return Err(
                format!("the host did not end in {END_TIMEOUT:?}, and was killed{}", self.log()).into()
            );
        }
        if status.success() {
            return Ok(());
        }
        Err(format!("the host ended with {status}{}", self.log()).into())
    }

    fn log_path(&self) -> PathBuf {
        self.cwd.join("host.log")
    }

    /// Returns the end of the host's log, as a suffix of an error.
    fn log(&self) -> String {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
        if last.is_empty() { String::new() } else { format!("; the host's log:\n  {}", last.join("\n  ")) }
    }
}

impl Drop for DemoHost<'_> {
    fn drop(&mut self) {
        if let Err(failure) = self.end() {
            failure.report();
        }
    }
}

/// Reports whether the host gets ready, before it ends and before the timeout. It sends other messages while it loads.
fn wait_until_ready(socket: &UnixDatagram, host: Pid) -> Result<bool> {
    let Some(end) = handle(host)? else { return Ok(false) };
    socket.set_nonblocking(true).context(|| "cannot hear from the host".to_owned())?;
    let timeout = Instant::now() + READY_TIMEOUT;
    loop {
        let mut events = [PollFd::new(socket, PollFlags::IN), PollFd::new(&end, PollFlags::IN)];
        if !wait(&mut events, timeout.saturating_duration_since(Instant::now()))? {
            return Ok(false);
        }
        let has_ended = !events[1].revents().is_empty();
        if says_ready(socket) || has_ended {
            return Ok(!has_ended);
        }
    }
}

/// Reads the messages that are there; reports whether one says that the host is ready.
fn says_ready(socket: &UnixDatagram) -> bool {
    let mut message = [0; 4096];
    while let Ok(length) = socket.recv(&mut message) {
        if String::from_utf8_lossy(&message[..length]).lines().any(|line| line == "READY=1") {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_is_ready_when_it_says_so_after_other_messages() {
        let folder = tempfile::tempdir().unwrap();
        let address = folder.path().join("ready.sock");
        let socket = UnixDatagram::bind(&address).unwrap();
        let host =
            |script: &str| Command::new("sh").args(["-c", script]).stdin(Stdio::piped()).spawn().unwrap();
        let mut loads = host("read -r _");
        let send = |message: &str| socket.send_to(message.as_bytes(), &address).unwrap();
        send("EXTEND_TIMEOUT_USEC=90000000\nWATCHDOG=1\n");
        send("READY=1\n");
        assert!(wait_until_ready(&socket, Pid::from_child(&loads)).unwrap());
        loads.kill().unwrap();
        loads.wait().unwrap();
        let mut ended = host("exit 1");
        send("EXTEND_TIMEOUT_USEC=90000000\n");
        assert!(!wait_until_ready(&socket, Pid::from_child(&ended)).unwrap());
        ended.wait().unwrap();
    }
}
