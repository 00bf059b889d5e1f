//! A QEMU process: started, heard on its stderr, ended for sure.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use machinery::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::group;
use crate::stderr::Stderr;

/// A process that is ours to end and to wait for.
pub struct Process {
    child: Child,
    handle: Arc<Handle>,
}

/// What other threads may hold of it: valid, and harmless, also after its end.
pub struct Handle {
    pid: u32,
    pidfd: OwnedFd,
    /// Whether this plugin has ended the process.
    ended: AtomicBool,
    stderr: Stderr,
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
        self.end_by(Signal::KILL);
    }

    /// Asks the process to shut down cleanly, as `quit` does, also if its monitor is not connected. Source:
    /// `qemu_system_killed` in QEMU's softmmu/runstate.c.
    pub fn terminate(&self) {
        self.end_by(Signal::TERM);
    }

    fn end_by(&self, signal: Signal) {
        self.ended.store(true, Ordering::SeqCst);
        // It may have ended by itself.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Begins a step: if the step fails, the reason is the output from now on.
    pub fn begin_step(&self) {
        self.stderr.begin_step();
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
    /// Starts the process in the folder `folder`, with nothing on its stdin.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start(
        program: &Path,
        args: impl IntoIterator<Item = String>,
        folder: &Path,
        machine: &str,
    ) -> Result<Process> {
        let mut child = machinery::command(program)
            .args(args)
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A group of its own: a signal from the host's terminal is not for it, and what it starts,
            // should it be a wrapper around QEMU, can be ended with it.
            .process_group(0)
            .spawn()
            .map_err(|error| {
                let failed = Error::io("run", program, &error);
                if folder.is_dir() {
                    failed
                } else {
                    failed.detail(&format!("there is no folder {}", folder.display()))
                }
            })?;
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
                let handle = Handle { pid: child.id(), pidfd, ended: AtomicBool::new(false), stderr };
                Ok(Process { child, handle: Arc::new(handle) })
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

    /// Waits for the end of the process and of its helpers, and returns how it ended. Kills it after `grace`.
    pub fn end(mut self, grace: Duration) -> End {
        if !self.handle.wait(grace) {
            self.handle.kill();
        }
        let status = self.child.wait().ok();
        if let Some(group) = i32::try_from(self.handle.pid).ok().and_then(Pid::from_raw) {
            group::end_rest(group);
        }
        End { status, by_us: self.handle.ended.load(Ordering::SeqCst), said: self.handle.stderr.said() }
    }
}

/// How a process ended.
#[derive(Debug, Clone)]
pub struct End {
    status: Option<ExitStatus>,
    /// Whether it was us.
    by_us: bool,
    /// The output of the last step.
    said: String,
}

impl End {
    /// For people: how, and what it said.
    pub fn describe(&self) -> String {
        let how = match self.status {
            _ if self.by_us => "QEMU was ended by this machinery".to_owned(),
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("QEMU exited with code {code}"),
                (None, Some(signal)) => format!("QEMU was killed by signal {signal}"),
                (None, None) => "QEMU ended".to_owned(),
            },
            None => "QEMU ended".to_owned(),
        };
        if self.said.is_empty() { how } else { format!("{how}: {}", self.said) }
    }

    /// Returns the output of the last step.
    pub fn words(&self) -> &str {
        &self.said
    }

    /// Describes a failure for people; empty if there is nothing useful to add.
    pub fn last_words(&self) -> String {
        match (self.by_us, self.said.is_empty()) {
            (true, true) => String::new(),
            (true, false) => format!("QEMU says: {}", self.said),
            (false, _) => self.describe(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{WaitId, WaitIdOptions, kill_process, waitid};

    fn shell(script: &str) -> Process {
        let args = ["-c".to_owned(), script.to_owned()];
        Process::start(Path::new("/bin/sh"), args, Path::new("/"), "m").unwrap()
    }

    #[test]
    fn an_end_is_told_with_its_stderr() {
        let end = shell("echo first >&2; echo last >&2; exit 3").end(Duration::from_secs(10));
        assert_eq!(end.describe(), "QEMU exited with code 3: first; last");
        assert!(!end.was_clean());
    }

    #[test]
    fn what_does_not_end_is_ended() {
        let end = shell("exec sleep 600").end(Duration::from_millis(20));
        assert_eq!(end.describe(), "QEMU was ended by this machinery");
    }

    #[test]
    fn a_kill_by_others_is_told() {
        let process = shell("kill -9 $$");
        assert_eq!(process.end(Duration::from_secs(10)).describe(), "QEMU was killed by signal 9");
    }

    /// Starts the script, and waits until its process has stopped itself.
    fn stopped(script: &str) -> (Process, Pid) {
        let process = shell(script);
        let pid = Pid::from_raw(process.handle().pid().cast_signed()).unwrap();
        waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED).unwrap();
        (process, pid)
    }

    #[test]
    fn an_end_is_told_with_the_words_of_its_last_step() {
        let script = "echo noise >&2; kill -STOP $$; echo qemu-img: why >&2; echo noise >&2; exit 3";
        let (process, pid) = stopped(script);
        process.handle().begin_step();
        kill_process(pid, Signal::CONT).unwrap();
        assert_eq!(process.end(Duration::from_secs(10)).describe(), "QEMU exited with code 3: qemu-img: why");
        let (process, _) = stopped("echo noise >&2; kill -STOP $$");
        process.handle().begin_step();
        process.handle().kill();
        assert_eq!(process.end(Duration::from_secs(10)).last_words(), "");
    }

    #[test]
    fn a_helper_ends_by_itself_when_its_process_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let script = "mkfifo p; { cat p; : > clean; } & exec 9>p; kill -STOP $$";
        let (process, _) = stopped(&format!("cd {}; {script}", folder.path().display()));
        process.end(Duration::ZERO);
        assert!(folder.path().join("clean").exists(), "the helper was killed");
    }

    #[test]
    fn a_helper_is_killed_when_it_does_not_end() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("helper");
        let end = shell(&format!("sleep 600 & echo $! > {}", file.display())).end(Duration::from_secs(10));
        assert!(end.was_clean());
        let helper = std::fs::read_to_string(file).unwrap();
        // The new parent of the helper may not have reaped it yet.
        let status = std::fs::read_to_string(format!("/proc/{}/status", helper.trim())).unwrap_or_default();
        assert!(status.is_empty() || status.contains("Z (zombie)"), "{status}");
    }

    #[test]
    fn what_cannot_run_is_named() {
        let error = Process::start(Path::new("/none/qemu"), [], Path::new("/"), "m").err().unwrap();
        assert!(error.to_string().contains("/none/qemu"));
    }
}
