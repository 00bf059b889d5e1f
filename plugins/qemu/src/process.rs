//! A process of QEMU's programs: its start, its stderr, and its end.
//!
//! [`Process`] belongs to one thread, which waits for the end. [`Handle`] is for all others: its pidfd cannot
//! reach another process, even after the end.

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

/// A process of this plugin, which has to be ended and waited for.
pub struct Process {
    child: Child,
    handle: Arc<Handle>,
}

/// A process as other threads see it: valid, and harmless, also after its end.
pub struct Handle {
    pid: u32,
    pidfd: OwnedFd,
    /// True if this plugin has ended the process.
    ended: AtomicBool,
    stderr: Stderr,
}

impl Handle {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns the memory that the process holds, in bytes. Source: `Pss` in proc_pid_smaps(5), in KiB.
    pub fn memory(&self) -> Option<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid)).ok()?;
        bytes_of(&text, "Pss:")
    }

    /// Kills the process.
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
        // The process may have ended by itself.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Begins a step. If the step fails, its reason is the output from now on.
    pub fn begin_step(&self) {
        self.stderr.begin_step();
    }

    /// Waits until the process has ended or `other` can be read; returns whether it has ended, and none after
    /// the timeout.
    pub fn ended_before(&self, other: &OwnedFd, timeout: Duration) -> io::Result<Option<bool>> {
        let mut sources = [PollFd::new(&self.pidfd, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
        let ready = retry_on_intr(|| poll(&mut sources, Some(&timespec(timeout))))?;
        Ok((ready > 0).then(|| sources[1].revents().is_empty()))
    }

    /// Waits for the end of the process; returns false after the timeout.
    fn wait(&self, timeout: Duration) -> bool {
        let mut sources = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(retry_on_intr(|| poll(&mut sources, Some(&timespec(timeout)))), Ok(1..))
    }
}

/// Returns a value of one of the kernel's tables, which has it in KiB, in bytes.
pub fn bytes_of(table: &str, key: &str) -> Option<u64> {
    let value = table.lines().find_map(|line| line.strip_prefix(key))?;
    value.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

fn timespec(duration: Duration) -> Timespec {
    Timespec::try_from(duration).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 })
}

impl Process {
    /// Starts the process in the folder `folder`, with an empty stdin.
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
            // In a group of its own, it gets no signal from the host's terminal, and its children can be ended
            // with it.
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
        let killed = self.handle.ended.load(Ordering::SeqCst);
        End { status, by_plugin: killed, output: self.handle.stderr.output() }
    }
}

/// The end of a process: its exit status and its output.
#[derive(Debug, Clone)]
pub struct End {
    status: Option<ExitStatus>,
    /// True if this plugin ended the process.
    by_plugin: bool,
    /// The output of the last step.
    output: String,
}

impl End {
    /// Describes the exit status and the output, for people.
    pub fn describe(&self) -> String {
        let status = match self.status {
            _ if self.by_plugin => "QEMU was ended by this machinery".to_owned(),
            Some(status) => match (status.code(), status.signal()) {
                (Some(code), _) => format!("QEMU exited with code {code}"),
                (None, Some(signal)) => format!("QEMU was killed by signal {signal}"),
                (None, None) => "QEMU ended".to_owned(),
            },
            None => "QEMU ended".to_owned(),
        };
        if self.output.is_empty() { status } else { format!("{status}: {}", self.output) }
    }

    /// Returns the output of the last step.
    pub fn output(&self) -> &str {
        &self.output
    }

    /// Describes a failure, for people; empty if there is nothing useful to report.
    pub fn failure(&self) -> String {
        match (self.by_plugin, self.output.is_empty()) {
            (true, true) => String::new(),
            (true, false) => format!("QEMU reports: {}", self.output),
            (false, _) => self.describe(),
        }
    }

    /// Reports whether the process was killed by a signal.
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
    fn end_is_described_with_its_stderr() {
        let end = shell("echo first >&2; echo last >&2; exit 3").end(Duration::from_secs(10));
        assert_eq!(end.describe(), "QEMU exited with code 3: first; last");
        assert!(!end.was_clean());
    }

    #[test]
    fn process_is_killed_when_it_does_not_end() {
        let end = shell("exec sleep 600").end(Duration::from_millis(20));
        assert_eq!(end.describe(), "QEMU was ended by this machinery");
    }

    #[test]
    fn end_names_the_signal_when_others_kill_the_process() {
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
    fn end_is_described_with_the_output_of_its_last_step() {
        let script = "echo noise >&2; kill -STOP $$; echo qemu-img: why >&2; echo noise >&2; exit 3";
        let (process, pid) = stopped(script);
        process.handle().begin_step();
        kill_process(pid, Signal::CONT).unwrap();
        assert_eq!(process.end(Duration::from_secs(10)).describe(), "QEMU exited with code 3: qemu-img: why");
        let (process, _) = stopped("echo noise >&2; kill -STOP $$");
        process.handle().begin_step();
        process.handle().kill();
        assert_eq!(process.end(Duration::from_secs(10)).failure(), "");
    }

    #[test]
    fn helper_ends_by_itself_when_its_process_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let script = "mkfifo p; { cat p; : > clean; } & exec 9>p; kill -STOP $$";
        let (process, _) = stopped(&format!("cd {}; {script}", folder.path().display()));
        process.end(Duration::ZERO);
        assert!(folder.path().join("clean").exists(), "the helper was killed");
    }

    #[test]
    fn helper_is_killed_when_it_does_not_end() {
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
    fn start_error_names_the_program_when_it_cannot_run() {
        let error = Process::start(Path::new("/none/qemu"), [], Path::new("/"), "m").err().unwrap();
        assert!(error.to_string().contains("/none/qemu"));
    }
}
