//! The processes that a killed host has left.
//!
//! A process outlives a host that was killed, and the next host ends it before it starts a machine. The machinery
//! recognizes its own processes by a path on their command line, such as that of a socket, or by their environment, as a
//! [run folder](crate::RunFolder) does.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Pid, PidfdFlags, Signal, getpgid, pidfd_open, pidfd_send_signal};

use super::group;

/// The time that a process has to end after a request to end, and after SIGKILL.
const EXIT_GRACE: Duration = Duration::from_secs(3);
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// A process of this computer. The handle keeps its number from being given to another process.
#[derive(Debug)]
pub struct RunningProcess {
    pid: Pid,
    handle: OwnedFd,
    program: Option<PathBuf>,
    args: Vec<Vec<u8>>,
}

/// Returns all processes of which this user may read the command line.
pub fn leftovers() -> impl Iterator<Item = RunningProcess> {
    group::pids().filter_map(RunningProcess::at)
}

impl RunningProcess {
    fn at(pid: Pid) -> Option<RunningProcess> {
        // The handle is opened first, so that the files are about this process and no later one.
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let proc = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
        let command = fs::read(proc.join("cmdline")).ok()?;
        let args = command.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
        let program = fs::read_link(proc.join("exe")).ok();
        Some(RunningProcess { pid, handle, program, args })
    }

    /// Returns the number of the process.
    pub fn number(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Returns the program that the process runs, if this user may see it.
    pub fn program(&self) -> Option<&Path> {
        self.program.as_deref()
    }

    /// Returns the arguments of the process.
    pub fn args(&self) -> impl Iterator<Item = &[u8]> {
        self.args.iter().map(Vec::as_slice)
    }

    /// Reports whether an argument contains the path.
    pub fn uses(&self, path: &Path) -> bool {
        self.args().any(|arg| contains_path(arg, path.as_os_str().as_bytes()))
    }

    /// Reports whether the process was started with that variable in its environment. That of another user's process
    /// cannot be read, and counts as without.
    pub fn has_variable(&self, name: &str, value: &OsStr) -> bool {
        let environment = fs::read(format!("/proc/{}/environ", self.number())).unwrap_or_default();
        let wanted = [name.as_bytes(), b"=", value.as_bytes()].concat();
        environment.split(|byte| *byte == 0).any(|entry| entry == wanted)
    }

    /// Returns the number of the user of the process; none after its end. Source: `Uid` in proc_pid_status(5).
    pub fn user(&self) -> Option<u32> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.number())).ok()?;
        let numbers = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        numbers.split_whitespace().next()?.parse().ok()
    }

    /// Reports whether a signal or a debugger has stopped the process.
    pub fn is_stopped(&self) -> bool {
        group::is_stopped(self.number().cast_unsigned())
    }

    /// Asks the process to end, so that its helpers end too, and kills it if it does not.
    ///
    /// # Errors
    /// The process belongs to another user, or does not end.
    pub fn end(&self) -> Result<()> {
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
    fn ends_by(&self, signal: Signal, timeout: Duration) -> Result<bool> {
        let sent = match pidfd_send_signal(&self.handle, signal) {
            Err(Errno::SRCH) => return Ok(true),
            sent => sent,
        };
        let mut source = [PollFd::new(&self.handle, PollFlags::IN)];
        let timeout = Timespec::try_from(timeout).ok();
        let ended = sent.and_then(|()| retry_on_intr(|| poll(&mut source, timeout.as_ref())));
        ended.map(|ready| ready > 0).map_err(|error| self.cannot_end(&error.to_string()))
    }

    fn cannot_end(&self, why: &str) -> Error {
        Error::environment(format!("process {} of a host that died cannot be ended: {why}", self.number()))
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
    use crate::process::{LineKind, Process};

    #[test]
    fn path_is_found_only_as_a_whole() {
        let path = b"/d/m_disposable.qcow2";
        assert!(contains_path(b"file=/d/m_disposable.qcow2,format=qcow2", path));
        assert!(contains_path(b"/d/m_disposable.qcow2", path));
        assert!(!contains_path(b"file=/x/d/m_disposable.qcow2", path));
        assert!(!contains_path(b"file=/d/am_disposable.qcow2", path));
        assert!(!contains_path(b"file=/d/m_disposable.qcow2.bak", path));
    }

    #[test]
    fn process_is_found_by_its_environment_and_ended_with_its_group() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = machinery::command(Path::new("/bin/sh"));
        // The first process ignores the request to end.
        command.args(["-c", "trap '' TERM; sleep 600 & echo ready; wait"]).env("MARK", folder.path());
        let process = Process::start_with_stdout(command, "m", |_| LineKind::Other).unwrap();
        let handle = process.handle();
        let ready = || Ok((handle.last_lines() == "ready").then_some(()));
        let deadline = machinery::Deadline::after(Duration::from_secs(60));
        handle.wait_until(deadline, "the shell to be ready", ready).unwrap();
        let found = || {
            leftovers()
                .filter(|process| process.has_variable("MARK", folder.path().as_os_str()))
                .collect::<Vec<_>>()
        };
        let leader = found().into_iter().find(|found| found.number() == handle.pid().cast_signed()).unwrap();
        let end = std::thread::spawn(move || leader.end());
        assert_eq!(process.end(Duration::from_secs(60)).describe(), "sh was killed by signal 9: ready");
        end.join().unwrap().unwrap();
        assert!(found().is_empty(), "{:?}", found());
    }
}
