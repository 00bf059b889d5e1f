//! Ends the tcpdump processes of a host that was killed.
//!
//! A file with process ids could be out of date, because it is written after the start. So the processes are
//! found by their arguments: a filter that only the host makes, and a file that is recorded or is in the CWD.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::settings::{MARK, MAX_PACKET_DELAY, is_host_filter};

/// The time that a process has to end after a signal.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// Ends every process that captures for a host into one of these files or into the CWD.
pub fn end_leftovers(pcaps: &[PathBuf], cwd: &Path) {
    let Ok(processes) = fs::read_dir("/proc") else { return };
    let names = processes.flatten().filter_map(|process| process.file_name().to_str()?.parse().ok());
    let leftovers: Vec<_> =
        names.filter_map(Pid::from_raw).filter_map(|pid| leftover(pid, pcaps, cwd)).collect();
    if leftovers.is_empty() {
        return;
    }
    tracing::warn!(count = leftovers.len(), "ending the captures of a host that was killed");
    // Their counts cannot be read, so the wait is as long as a packet may take.
    std::thread::sleep(MAX_PACKET_DELAY);
    for process in leftovers {
        end(&process);
    }
}

fn leftover(pid: Pid, pcaps: &[PathBuf], cwd: &Path) -> Option<OwnedFd> {
    // Opened first, so that the arguments are not those of a later process with the same id.
    let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    let arguments = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
    is_leftover(&arguments, pcaps, cwd).then_some(process)
}

fn end(process: &OwnedFd) {
    for signal in [Signal::TERM, Signal::KILL] {
        let sent = pidfd_send_signal(process, signal);
        let limit = Timespec::try_from(EXIT_TIMEOUT).ok();
        let mut ended = [PollFd::new(process, PollFlags::IN)];
        if sent.is_err() || retry_on_intr(|| poll(&mut ended, limit.as_ref())).is_ok_and(|count| count > 0) {
            return;
        }
    }
}

fn is_leftover(arguments: &[u8], pcaps: &[PathBuf], cwd: &Path) -> bool {
    let arguments: Vec<&OsStr> =
        arguments.split(|byte| *byte == 0).filter(|word| !word.is_empty()).map(OsStr::from_bytes).collect();
    let filter = arguments.last().and_then(|last| last.to_str()).unwrap_or("");
    let is_ours = |path: &Path| path.starts_with(cwd) || pcaps.iter().any(|pcap| pcap == path);
    // An earlier host had tcpdump open the file.
    let is_mark = |option: &OsStr| option == MARK || option == "-w";
    is_host_filter(filter) && arguments.windows(2).any(|pair| is_mark(pair[0]) && is_ours(Path::new(pair[1])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftover_is_a_host_capture_into_a_recorded_file_or_the_cwd() {
        let (pcaps, cwd) = ([PathBuf::from("/data/a.pcap")], Path::new("/cwd"));
        let is_leftover = |arguments: &[u8]| is_leftover(arguments, &pcaps, cwd);
        let filter = b"host 1 and not (dst host 2 and dst port 3)\0";
        assert!(is_leftover(&[b"tcpdump\0-U\0-w\0/data/a.pcap\0".as_slice(), filter].concat()));
        assert!(is_leftover(&[b"tcpdump\0-z\0/data/a.pcap\0-w\0-\0".as_slice(), filter].concat()));
        assert!(!is_leftover(&[b"tcpdump\0-z\0/data/b.pcap\0-w\0-\0".as_slice(), filter].concat()));
        assert!(is_leftover(&[b"tcpdump\0-U\0-w\0/cwd/storage/b.pcap\0".as_slice(), filter].concat()));
        assert!(!is_leftover(&[b"tcpdump\0-U\0-w\0/data/a.pcap2\0".as_slice(), filter].concat()));
        assert!(!is_leftover(b"tcpdump\0-U\0-w\0/cwd/a.pcap\0host 1\0"));
        assert!(!is_leftover(b"vim\0/data/a.pcap\0"));
    }
}
