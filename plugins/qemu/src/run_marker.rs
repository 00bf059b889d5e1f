//! Removes leftovers of a host that died: QEMU processes, overlays, sockets.
//!
//! A QEMU of this plugin has its machine's monitor socket on its command line, and a CWD has only one host at
//! a time. A process with that socket is therefore a run that no host watches any more. A process that merely
//! uses the same overlay belongs to somebody else; it is reported and not touched.

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
const ENDING: Timespec = Timespec { tv_sec: 3, tv_nsec: 0 };
const AFTER_KILL: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Ends runs of the machine that no host watches, and removes their overlays (the first one is `overlays[0]`)
/// and their socket.
///
/// # Errors
/// Somebody else uses an overlay, a process does not end, or a file cannot be removed.
pub fn clear(overlays: &[PathBuf], socket: &Path, program: &Path, keep_overlays: bool) -> Result<()> {
    for process in processes() {
        if process.listens_on(socket) {
            process.end(socket)?;
        } else if process.runs(program)
            && let Some(overlay) = overlays.iter().find(|overlay| process.uses(overlay))
        {
            let reason = format!("process {} uses the overlay {}", process.number(), overlay.display());
            return Err(Error::environment(format!("{reason}, and is not of this CWD")).advice(
                "If it is left from another manager, end it; if another CWD has this machine too, give each its own files",
            ));
        }
    }
    disk::remove(socket)?;
    match overlays.first() {
        Some(first) if !keep_overlays => disk::remove_overlays(first),
        _ => Ok(()),
    }
}

/// A process, held so that its number cannot become another's.
struct Found {
    pid: Pid,
    handle: OwnedFd,
    program: Option<PathBuf>,
    args: Vec<Vec<u8>>,
}

fn processes() -> Vec<Found> {
    let Ok(entries) = Path::new("/proc").read_dir() else { return Vec::new() };
    let numbers = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter_map(|number| Found::at(Pid::from_raw(number)?)).collect()
}

impl Found {
    fn at(pid: Pid) -> Option<Found> {
        // Held first, looked at then.
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let folder = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
        let command = fs::read(folder.join("cmdline")).ok()?;
        let args = command.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
        Some(Found { pid, handle, program: fs::read_link(folder.join("exe")).ok(), args })
    }

    fn number(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Whether it is a QEMU: the one that is configured, or one behind a wrapper that is.
    fn runs(&self, program: &Path) -> bool {
        let Some(own) = &self.program else { return false };
        let name = own.file_name().map(|name| name.as_bytes().starts_with(b"qemu-system"));
        name == Some(true) || fs::canonicalize(program).is_ok_and(|program| program == *own)
    }

    fn uses(&self, path: &Path) -> bool {
        self.args.iter().any(|arg| holds(arg, path.as_os_str().as_bytes()))
    }

    /// Whether its monitor is that socket. Under a path too long for a socket address it is named
    /// through the host that started it, which then has to be dead.
    fn listens_on(&self, socket: &Path) -> bool {
        if self.uses(socket) {
            return true;
        }
        let Some(name) = socket.file_name() else { return false };
        self.args.iter().filter_map(|arg| std::str::from_utf8(arg).ok()).any(|arg| {
            let monitor = arg.strip_prefix("socket,id=cuckoo-monitor,path=/proc/");
            let Some((host, rest)) = monitor.and_then(|monitor| monitor.split_once('/')) else {
                return false;
            };
            let same_name = rest.rsplit('/').next().is_some_and(|last| last.as_bytes() == name.as_bytes());
            same_name && !Path::new("/proc").join(host).exists()
        })
    }

    /// Asks the process to end, so that its helpers end too, and kills it if it does not.
    fn end(&self, socket: &Path) -> Result<()> {
        tracing::warn!(pid = self.number(), socket = %socket.display(), "a QEMU of a host that died is ended");
        let leads_a_group = getpgid(Some(self.pid)) == Ok(self.pid);
        if !self.ends_by(Signal::TERM, ENDING)? && !self.ends_by(Signal::KILL, AFTER_KILL)? {
            return Err(self.stays("it does not end, not even by SIGKILL"));
        }
        if leads_a_group {
            group::end_rest(self.pid);
        }
        Ok(())
    }

    /// Sends the signal, and returns whether the process has ended within `patience`.
    fn ends_by(&self, signal: Signal, patience: Timespec) -> Result<bool> {
        let sent = match pidfd_send_signal(&self.handle, signal) {
            Err(Errno::SRCH) => return Ok(true),
            sent => sent,
        };
        let mut source = [PollFd::new(&self.handle, PollFlags::IN)];
        let ended = sent.and_then(|()| retry_on_intr(|| poll(&mut source, Some(&patience))));
        ended.map(|ready| ready > 0).map_err(|error| self.stays(&error.to_string()))
    }

    fn stays(&self, why: &str) -> Error {
        Error::environment(format!("the QEMU {} of a host that died cannot be ended: {why}", self.number()))
            .advice("End it as the user who started it")
    }
}

/// Whether the path stands in an argument as a whole.
fn holds(arg: &[u8], path: &[u8]) -> bool {
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
    fn a_path_is_found_whole() {
        let path = b"/d/m_disposable.qcow2";
        assert!(holds(b"file=/d/m_disposable.qcow2,format=qcow2", path));
        assert!(holds(b"/d/m_disposable.qcow2", path));
        assert!(!holds(b"file=/x/d/m_disposable.qcow2", path));
        assert!(!holds(b"file=/d/am_disposable.qcow2", path));
        assert!(!holds(b"file=/d/m_disposable.qcow2.bak", path));
    }

    fn with(arg: &str) -> Found {
        let own = rustix::process::getpid();
        let handle = pidfd_open(own, PidfdFlags::empty()).unwrap();
        Found { pid: own, handle, program: None, args: vec![b"qemu".to_vec(), arg.as_bytes().to_vec()] }
    }

    #[test]
    fn a_run_is_known_by_its_socket_also_under_a_long_path() {
        let socket = Path::new("/c/sockets/qemu_m.sock");
        assert!(with("socket,id=cuckoo-monitor,path=/c/sockets/qemu_m.sock").listens_on(socket));
        assert!(!with("socket,id=cuckoo-monitor,path=/other/sockets/qemu_m.sock").listens_on(socket));
        assert!(with("socket,id=cuckoo-monitor,path=/proc/999999999/fd/9/qemu_m.sock").listens_on(socket));
        let alive = format!("socket,id=cuckoo-monitor,path=/proc/{}/fd/9/qemu_m.sock", std::process::id());
        assert!(!with(&alive).listens_on(socket));
        assert!(!with("socket,id=cuckoo-monitor,path=/proc/999999999/fd/9/qemu_n.sock").listens_on(socket));
    }
}
