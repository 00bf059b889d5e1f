//! A QEMU process: started, heard on its stderr, ended for sure.

use std::io::{self, BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use machinery::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How much of its stderr is kept: the end, where the reason stands.
const STDERR_KEPT: usize = 4096;

/// A process that is ours to end and to wait for.
pub struct Process {
    child: Child,
    handle: Arc<Handle>,
    stderr: Stderr,
}

/// What other threads may hold of it: valid, and harmless, also after its end.
pub struct Handle {
    pid: u32,
    pidfd: OwnedFd,
    killed: AtomicBool,
}

impl Handle {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it holds of this computer's memory, in bytes. Source: `Pss` in proc_pid_smaps(5), in KiB.
    pub fn memory(&self) -> Option<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid)).ok()?;
        bytes_of(&text, "Pss:")
    }

    /// Ends it at once.
    pub fn kill(&self) {
        self.killed.store(true, Ordering::SeqCst);
        // It may have ended by itself.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Waits until it has ended or `other` can be read; true if it has ended.
    pub fn ended_before(&self, other: &OwnedFd, timeout: Duration) -> io::Result<Option<bool>> {
        let mut sources = [PollFd::new(&self.pidfd, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
        let ready = retry_on_intr(|| poll(&mut sources, Some(&timespec(timeout))))?;
        Ok((ready > 0).then(|| sources[1].revents().is_empty()))
    }

    /// Waits until it has ended; false if it has not within the time.
    fn wait(&self, timeout: Duration) -> bool {
        let mut sources = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(retry_on_intr(|| poll(&mut sources, Some(&timespec(timeout)))), Ok(1..))
    }
}

/// What one of the kernel's tables says in KiB, in bytes.
pub fn bytes_of(table: &str, key: &str) -> Option<u64> {
    let value = table.lines().find_map(|line| line.strip_prefix(key))?;
    value.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

fn timespec(duration: Duration) -> Timespec {
    Timespec::try_from(duration).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
}

impl Process {
    /// Starts it, with nothing on its stdin.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(program: &Path, args: impl IntoIterator<Item = String>, machine: &str) -> Result<Process> {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A group of its own: a signal from the host's terminal is not for it, and what it starts,
            // should it be a wrapper around QEMU, can be ended with it.
            .process_group(0)
            .spawn()
            .map_err(|error| Error::io("run", program, &error))?;
        let pidfd = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(io::ErrorKind::InvalidInput.into())
            .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
        let stderr = child
            .stderr
            .take()
            .ok_or(io::ErrorKind::BrokenPipe.into())
            .and_then(|pipe| Stderr::follow(pipe, machine));
        match (pidfd, stderr) {
            (Ok(pidfd), Ok(stderr)) => {
                let handle = Arc::new(Handle { pid: child.id(), pidfd, killed: AtomicBool::new(false) });
                Ok(Process { child, handle, stderr })
            }
            (Err(error), _) | (_, Err(error)) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(Error::environment(format!("cannot watch the QEMU process: {error}")))
            }
        }
    }

    pub fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    /// Waits for its end, by force after `grace`, and tells how it was.
    pub fn end(mut self, grace: Duration) -> End {
        if !self.handle.wait(grace) {
            self.handle.kill();
        }
        self.end_what_it_started();
        let status = self.child.wait().ok();
        End { status, killed: self.handle.killed.load(Ordering::SeqCst), stderr: self.stderr.finish() }
    }

    /// While it has not been waited for, its number cannot be anybody else's.
    fn end_what_it_started(&self) {
        if let Some(group) = i32::try_from(self.handle.pid).ok().and_then(Pid::from_raw) {
            // Usually nothing but its own remains is in that group.
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone)]
pub struct End {
    status: Option<ExitStatus>,
    /// Whether it was us.
    killed: bool,
    stderr: String,
}

impl End {
    /// For people: how, and what it said.
    pub fn describe(&self) -> String {
        let how = match self.status {
            _ if self.killed => "QEMU was killed by this machinery".to_owned(),
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("QEMU exited with code {code}"),
                (None, Some(signal)) => format!("QEMU was killed by signal {signal}"),
                (None, None) => "QEMU ended".to_owned(),
            },
            None => "QEMU ended".to_owned(),
        };
        if self.stderr.is_empty() { how } else { format!("{how}: {}", self.stderr) }
    }

    /// What it said, in its own words.
    pub fn words(&self) -> &str {
        if self.stderr.is_empty() { "it says nothing" } else { &self.stderr }
    }

    /// For people: what is worth telling after a failure, if anything.
    pub fn last_words(&self) -> Option<String> {
        match (self.killed, self.stderr.is_empty()) {
            (true, true) => None,
            (true, false) => Some(format!("QEMU says: {}", self.stderr)),
            (false, _) => Some(self.describe()),
        }
    }

    /// Whether somebody killed it.
    pub fn by_signal(&self) -> bool {
        self.status.is_some_and(|status| status.signal().is_some())
    }

    pub fn was_clean(&self) -> bool {
        self.status.is_some_and(|status| status.success())
    }
}

/// Follows a process' stderr into the log, and keeps its end.
struct Stderr {
    kept: Arc<Mutex<String>>,
    /// Disconnected when the pipe is closed at its other end.
    closed: Receiver<()>,
}

/// A child of QEMU's can hold the pipe after QEMU's end; it is not waited for longer than this.
const LAST_WORDS: Duration = Duration::from_millis(200);

impl Stderr {
    fn follow(pipe: ChildStderr, machine: &str) -> io::Result<Stderr> {
        let kept = Arc::new(Mutex::new(String::new()));
        let (into, machine) = (Arc::clone(&kept), machine.to_owned());
        let (open, closed) = mpsc::channel::<()>();
        std::thread::Builder::new().name("qemu-stderr".to_owned()).spawn(move || {
            let _open = open;
            let mut lines = BufReader::new(pipe);
            let mut line = Vec::new();
            while matches!(lines.read_until(b'\n', &mut line), Ok(length) if length > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                tracing::warn!(machine, text, "QEMU says");
                keep(&mut into.lock().unwrap_or_else(PoisonError::into_inner), &text);
                line.clear();
            }
        })?;
        Ok(Stderr { kept, closed })
    }

    /// All of it, once the process has ended.
    fn finish(self) -> String {
        // Disconnected or late: either way it is what there is.
        let _ = self.closed.recv_timeout(LAST_WORDS);
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.trim().to_owned()
    }
}

fn keep(kept: &mut String, line: &str) {
    kept.push_str(line);
    kept.push('\n');
    if kept.len() > STDERR_KEPT {
        let from = (kept.len() - STDERR_KEPT..kept.len()).find(|at| kept.is_char_boundary(*at));
        kept.drain(..from.unwrap_or(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        Process::start(Path::new("/bin/sh"), ["-c".to_owned(), script.to_owned()], "m").unwrap()
    }

    #[test]
    fn an_end_is_told_with_its_stderr() {
        let end = shell("echo first >&2; echo last >&2; exit 3").end(Duration::from_secs(10));
        assert_eq!(end.describe(), "QEMU exited with code 3: first\nlast");
        assert!(!end.was_clean());
    }

    #[test]
    fn what_does_not_end_is_ended() {
        let end = shell("exec sleep 600").end(Duration::from_millis(20));
        assert_eq!(end.describe(), "QEMU was killed by this machinery");
    }

    #[test]
    fn a_kill_by_others_is_told() {
        let process = shell("kill -9 $$");
        assert_eq!(process.end(Duration::from_secs(10)).describe(), "QEMU was killed by signal 9");
    }

    #[test]
    fn only_the_end_of_a_long_stderr_is_kept() {
        let mut kept = String::new();
        for number in 0..10_000 {
            keep(&mut kept, &format!("línea {number}"));
        }
        assert!(kept.len() <= STDERR_KEPT && kept.ends_with("línea 9999\n"));
    }

    #[test]
    fn what_cannot_run_is_named() {
        let error = Process::start(Path::new("/none/qemu"), [], "m").err().unwrap();
        assert!(error.to_string().contains("/none/qemu"));
    }
}
