//! The tcpdumps of a host that was killed.
//!
//! They cannot be told by a file with their numbers, which would be a moment late. But the file
//! they write to is on record from before they were started, and stands in their arguments.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How long one may take to end.
const ENDING: Duration = Duration::from_secs(5);

/// Ends every process that captures into one of these files.
pub fn end_leftovers(pcaps: &[PathBuf]) {
    let Ok(processes) = fs::read_dir("/proc") else { return };
    for process in processes.flatten() {
        let pid = process.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            end_if_left(pid, pcaps);
        }
    }
}

fn end_if_left(pid: Pid, pcaps: &[PathBuf]) {
    // Opened first: what is read then is of this process and no later one of its number.
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    let Ok(arguments) = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())) else { return };
    if !writes_to_one_of(&arguments, pcaps) {
        return;
    }
    tracing::warn!(pid = pid.as_raw_nonzero(), "a tcpdump of a host that was killed is ended");
    for signal in [Signal::TERM, Signal::KILL] {
        let sent = pidfd_send_signal(&process, signal);
        let limit = Timespec::try_from(ENDING).ok();
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        if sent.is_err() || retry_on_intr(|| poll(&mut ended, limit.as_ref())).is_ok_and(|count| count > 0) {
            return;
        }
    }
}

fn writes_to_one_of(arguments: &[u8], pcaps: &[PathBuf]) -> bool {
    let arguments: Vec<&[u8]> = arguments.split(|byte| *byte == 0).collect();
    let is_pcap = |path: &[u8]| pcaps.iter().any(|pcap: &PathBuf| Path::as_os_str(pcap).as_bytes() == path);
    arguments.contains(&b"-U".as_slice())
        && arguments.windows(2).any(|pair| pair[0] == b"-w" && is_pcap(pair[1]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_capture_into_such_a_file_is_a_leftover() {
        let pcaps = [PathBuf::from("/cwd/a.pcap")];
        let ours = b"tcpdump\0-U\0-w\0/cwd/a.pcap\0host 1\0";
        assert!(writes_to_one_of(ours, &pcaps));
        assert!(!writes_to_one_of(ours, &[]));
        assert!(!writes_to_one_of(b"tcpdump\0-U\0-w\0/cwd/a.pcap2\0", &pcaps));
        assert!(!writes_to_one_of(b"vim\0/cwd/a.pcap\0", &pcaps));
    }
}
