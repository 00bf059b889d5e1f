//! The marker of a run: the monitor's socket of its machine, on QEMU's command line.
//!
//! A QEMU outlives a host that was killed. The next host ends it, and removes its overlays and its socket. A
//! CWD has only one host at a time, so a process with the marker is a run that no host watches any more. A
//! process that merely uses the same overlay belongs to somebody else: it is reported and not touched.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Pid, PidfdFlags, Signal, getpgid, pidfd_open, pidfd_send_signal};

use crate::disk;
use crate::group;

/// The time that a process has to end after a request to end, and after SIGKILL.
const EXIT_GRACE: Timespec = Timespec { tv_sec: 3, tv_nsec: 0 };
const KILL_TIMEOUT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// The marker of one machine's runs.
pub struct RunMarker<'a> {
    /// The monitor's socket.
    socket: &'a Path,
}

impl RunMarker<'_> {
    pub fn new(socket: &Path) -> RunMarker<'_> {
        RunMarker { socket }
    }

    /// Ends runs of the machine that no host watches, and removes their overlays (the first one is
    /// `overlays[0]`) and their socket.
    ///
    /// # Errors
    /// Somebody else uses an overlay, a process does not end, or a file cannot be removed.
    pub fn clear_leftovers(&self, overlays: &[PathBuf], program: &Path, keep_overlays: bool) -> Result<()> {
        for process in processes() {
            if self.marks(&process) {
                tracing::warn!(pid = process.number(), socket = %self.socket.display(), "ending a QEMU of a host that died");
                process.end()?;
            } else if process.runs(program)
                && let Some(overlay) = overlays.iter().find(|overlay| process.uses(overlay))
            {
                let reason = format!("process {} uses the overlay {}", process.number(), overlay.display());
                return Err(Error::environment(format!("{reason}, and is not of this CWD")).advice(
                    "If another manager has left it, end it; if another CWD has this machine too, give each its own files",
                ));
            }
        }
        disk::remove(self.socket)?;
        match overlays.first() {
            Some(first) if !keep_overlays => disk::remove_overlays(first),
            _ => Ok(()),
        }
    }

    /// Reports whether the process has this marker. A socket whose path is too long for an address is named
    /// through `/proc` of the host that started the process; that host must be dead.
    fn marks(&self, process: &RunningProcess) -> bool {
        if process.uses(self.socket) {
            return true;
        }
        let Some(name) = self.socket.file_name() else { return false };
        process.args.iter().filter_map(|arg| std::str::from_utf8(arg).ok()).any(|arg| {
            let monitor = arg.strip_prefix("socket,id=cuckoo-monitor,path=/proc/");
            let Some((host, rest)) = monitor.and_then(|monitor| monitor.split_once('/')) else {
                return false;
            };
            let same_name = rest.rsplit('/').next().is_some_and(|last| last.as_bytes() == name.as_bytes());
            same_name && !Path::new("/proc").join(host).exists()
        })
    }
}

/// A process. The handle keeps its number from being given to another process.
struct RunningProcess {
    pid: Pid,
    handle: OwnedFd,
    program: Option<PathBuf>,
    args: Vec<Vec<u8>>,
}

fn processes() -> Vec<RunningProcess> {
    let Ok(entries) = Path::new("/proc").read_dir() else { return Vec::new() };
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter_map(|number| RunningProcess::at(Pid::from_raw(number)?)).collect()
}

impl RunningProcess {
    fn at(pid: Pid) -> Option<RunningProcess> {
        // The handle is opened first, so that the files are about this process and no later one.
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let folder = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
        let command = fs::read(folder.join("cmdline")).ok()?;
        let args = command.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
        Some(RunningProcess { pid, handle, program: fs::read_link(folder.join("exe")).ok(), args })
    }

    fn number(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Reports whether the process is a QEMU: the configured one, or one that a wrapper has started.
    fn runs(&self, program: &Path) -> bool {
        let Some(own) = &self.program else { return false };
        let name = own.file_name().map(|name| name.as_bytes().starts_with(b"qemu-system"));
        name == Some(true) || fs::canonicalize(program).is_ok_and(|program| program == *own)
    }

    fn uses(&self, path: &Path) -> bool {
        self.args.iter().any(|arg| contains_path(arg, path.as_os_str().as_bytes()))
    }

    /// Asks the process to end, so that its helpers end too, and kills it if it does not.
    fn end(&self) -> Result<()> {
        let leads_a_group = getpgid(Some(self.pid)) == Ok(self.pid);
        if !self.ends_by(Signal::TERM, EXIT_GRACE)? && !self.ends_by(Signal::KILL, KILL_TIMEOUT)? {
            return Err(self.cannot_end("it does not end, not even by SIGKILL"));
        }
        if leads_a_group {
            group::end_rest(self.pid);
        }
        Ok(())
    }

    /// Sends the signal, and returns whether the process has ended within `timeout`.
    fn ends_by(&self, signal: Signal, timeout: Timespec) -> Result<bool> {
        let sent = match pidfd_send_signal(&self.handle, signal) {
            Err(Errno::SRCH) => return Ok(true),
            sent => sent,
        };
        let mut source = [PollFd::new(&self.handle, PollFlags::IN)];
        let ended = sent.and_then(|()| retry_on_intr(|| poll(&mut source, Some(&timeout))));
        ended.map(|ready| ready > 0).map_err(|error| self.cannot_end(&error.to_string()))
    }

    fn cannot_end(&self, why: &str) -> Error {
        Error::environment(format!("the QEMU {} of a host that died cannot be ended: {why}", self.number()))
            .advice("End it as the user who started it")
    }
}

/// Reports whether an argument contains the whole path.
fn contains_path(arg: &[u8], path: &[u8]) -> bool {
    arg.windows(path.len()).enumerate().any(|(at, part)| {
        let before = at.checked_sub(1).map(|before| arg[before]);
        let after = arg.get(at + path.len()).copied();
        part == path
            && matches!(before, None | Some(b'=' | b':' | b'"'))
            && matches!(after, None | Some(b',' | b'"'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_is_found_only_as_a_whole() {
        let path = b"/d/m_disposable.qcow2";
        assert!(contains_path(b"file=/d/m_disposable.qcow2,format=qcow2", path));
        assert!(contains_path(b"/d/m_disposable.qcow2", path));
        assert!(!contains_path(b"file=/x/d/m_disposable.qcow2", path));
        assert!(!contains_path(b"file=/d/am_disposable.qcow2", path));
        assert!(!contains_path(b"file=/d/m_disposable.qcow2.bak", path));
    }

    fn with(arg: &str) -> RunningProcess {
        let own = rustix::process::getpid();
        let handle = pidfd_open(own, PidfdFlags::empty()).unwrap();
        RunningProcess {
            pid: own,
            handle,
            program: None,
            args: vec![b"qemu".to_vec(), arg.as_bytes().to_vec()],
        }
    }

    #[test]
    fn run_is_recognized_by_its_socket_when_the_path_is_long() {
        let marker = RunMarker::new(Path::new("/c/sockets/qemu_m.sock"));
        assert!(marker.marks(&with("socket,id=cuckoo-monitor,path=/c/sockets/qemu_m.sock")));
        assert!(!marker.marks(&with("socket,id=cuckoo-monitor,path=/other/sockets/qemu_m.sock")));
        assert!(marker.marks(&with("socket,id=cuckoo-monitor,path=/proc/999999999/fd/9/qemu_m.sock")));
        let alive = format!("socket,id=cuckoo-monitor,path=/proc/{}/fd/9/qemu_m.sock", std::process::id());
        assert!(!marker.marks(&with(&alive)));
        assert!(!marker.marks(&with("socket,id=cuckoo-monitor,path=/proc/999999999/fd/9/qemu_n.sock")));
    }
}
