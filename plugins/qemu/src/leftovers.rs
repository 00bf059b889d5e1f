//! What a host that died left behind: QEMU processes, disposable disks, sockets.
//!
//! A machine's disposable disk has a name of its own, and every QEMU of that machine has it on its
//! command line; so a process with that argument is a run that nobody watches any more.

use std::path::Path;

use machinery::Result;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::disk;

/// Ends processes that use this disposable disk, and removes the disk and the socket.
///
/// # Errors
/// A file stays.
pub fn clear(disposable: &Path, socket: &Path, keep_disk: bool) -> Result<()> {
    for pid in processes_with(disposable) {
        tracing::warn!(pid = pid.as_raw_nonzero().get(), disk = %disposable.display(), "a QEMU of a host that died is ended");
        end(pid);
    }
    disk::remove(socket)?;
    if keep_disk { Ok(()) } else { disk::remove(disposable) }
}

/// The processes that have the path within an argument.
pub fn processes_with(path: &Path) -> Vec<Pid> {
    let path = path.as_os_str().as_encoded_bytes();
    let Ok(processes) = Path::new("/proc").read_dir() else { return Vec::new() };
    processes
        .flatten()
        .filter_map(|process| {
            let pid = process.file_name().to_str()?.parse().ok().and_then(Pid::from_raw)?;
            let command = std::fs::read(process.path().join("cmdline")).ok()?;
            let mut args = command.split(|byte| *byte == 0);
            let program = args.next()?;
            let is_qemu = program.windows(4).any(|part| part == b"qemu");
            (is_qemu && args.any(|arg| holds(arg, path))).then_some(pid)
        })
        .collect()
}

fn holds(arg: &[u8], path: &[u8]) -> bool {
    arg.windows(path.len()).enumerate().any(|(at, part)| {
        // `/a/b.qcow2` is not in `/x/a/b.qcow2`.
        part == path && (at == 0 || arg[at - 1] == b'=' || arg[at - 1] == b':' || arg[at - 1] == b'"')
    })
}

fn end(pid: Pid) {
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    if pidfd_send_signal(&process, Signal::KILL).is_ok() {
        let mut source = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        // A process that does not die of SIGKILL hangs in the kernel; nothing more can be done here.
        let _ = rustix::event::poll(&mut source, Some(&limit));
    }
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
    }
}
