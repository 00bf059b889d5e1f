//! The tcpdumps of a host that was killed.
//!
//! They cannot be told by a file with their numbers, which would be a moment late. But their
//! arguments tell them: a filter as only the host makes it, and the file they write to, which is on
//! record or in the CWD.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{FILTER, HANDED_OVER};

/// How long one may take to end.
const ENDING: Duration = Duration::from_secs(5);

/// Ends every process that captures for a host into one of these files, or into that folder.
pub fn end_leftovers(pcaps: &[PathBuf], cwd: &Path) {
    let Ok(processes) = fs::read_dir("/proc") else { return };
    let names = processes.flatten().filter_map(|process| process.file_name().to_str()?.parse().ok());
    let left: Vec<_> = names.filter_map(Pid::from_raw).filter_map(|pid| leftover(pid, pcaps, cwd)).collect();
    if left.is_empty() {
        return;
    }
    tracing::warn!(count = left.len(), "the captures of a host that was killed are ended");
    // There is nobody left whom they could tell that they have read all.
    std::thread::sleep(HANDED_OVER);
    for process in left {
        end(&process);
    }
}

fn leftover(pid: Pid, pcaps: &[PathBuf], cwd: &Path) -> Option<OwnedFd> {
    // Opened first: what is read then is of this process and no later one of its number.
    let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    let arguments = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
    is_leftover(&arguments, pcaps, cwd).then_some(process)
}

fn end(process: &OwnedFd) {
    for signal in [Signal::TERM, Signal::KILL] {
        let sent = pidfd_send_signal(process, signal);
        let limit = Timespec::try_from(ENDING).ok();
        let mut ended = [PollFd::new(process, PollFlags::IN)];
        if sent.is_err() || retry_on_intr(|| poll(&mut ended, limit.as_ref())).is_ok_and(|count| count > 0) {
            return;
        }
    }
}

fn is_leftover(arguments: &[u8], pcaps: &[PathBuf], cwd: &Path) -> bool {
    let arguments: Vec<&OsStr> =
        arguments.split(|byte| *byte == 0).filter(|word| !word.is_empty()).map(OsStr::from_bytes).collect();
    let [begins, has] = FILTER;
    let filter = arguments.last().and_then(|last| last.to_str()).unwrap_or("");
    let is_ours = |path: &Path| path.starts_with(cwd) || pcaps.iter().any(|pcap| pcap == path);
    filter.starts_with(begins)
        && filter.contains(has)
        && arguments.windows(2).any(|pair| pair[0] == "-w" && is_ours(Path::new(pair[1])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_capture_into_such_a_file_is_a_leftover() {
        let (pcaps, cwd) = ([PathBuf::from("/data/a.pcap")], Path::new("/cwd"));
        let is_leftover = |arguments: &[u8]| is_leftover(arguments, &pcaps, cwd);
        let filter = b"host 1 and not (dst host 2 and dst port 3)\0";
        assert!(is_leftover(&[b"tcpdump\0-U\0-w\0/data/a.pcap\0".as_slice(), filter].concat()));
        assert!(is_leftover(&[b"tcpdump\0-U\0-w\0/cwd/storage/b.pcap\0".as_slice(), filter].concat()));
        assert!(!is_leftover(&[b"tcpdump\0-U\0-w\0/data/a.pcap2\0".as_slice(), filter].concat()));
        assert!(!is_leftover(b"tcpdump\0-U\0-w\0/cwd/a.pcap\0host 1\0"));
        assert!(!is_leftover(b"vim\0/data/a.pcap\0"));
    }
}
