//! A process as other threads see it.

use std::io::{self, PipeWriter, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use machinery::{Deadline, Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

use super::console::Console;
use super::group;
use crate::sync::lock;

/// The pause between two probes of [`Handle::wait_until`].
const PROBE_INTERVAL: Duration = Duration::from_millis(5);
/// The pause between two interrupts of [`Handle::interrupt_until`].
const INTERRUPT_INTERVAL: Duration = Duration::from_millis(300);

/// A process as other threads see it: valid, and harmless, also after its end.
#[derive(Debug)]
pub struct Handle {
    pub(super) pid: u32,
    pub(super) pidfd: OwnedFd,
    /// True if this plugin has ended the process.
    pub(super) ended: AtomicBool,
    pub(super) program: String,
    pub(super) console: Console,
    /// The process's stdin, if it takes commands there.
    pub(super) commands: Option<Mutex<PipeWriter>>,
}

impl Handle {
    /// Returns the number of the process.
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

    /// Asks the process to end, with SIGTERM.
    pub fn terminate(&self) {
        self.end_by(Signal::TERM);
    }

    /// Interrupts the process, with SIGINT, as Ctrl-C in its console does.
    pub fn interrupt(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::INT);
    }

    /// Reports whether a signal or a debugger has stopped the process. Its guest does not run then.
    pub fn is_stopped(&self) -> bool {
        group::is_stopped(self.pid)
    }

    fn end_by(&self, signal: Signal) {
        self.ended.store(true, Ordering::SeqCst);
        // The process may have ended by itself.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Begins a step. If the step fails, its reason is the output from now on. A prompt that the process has printed
    /// before is no answer of this step.
    pub fn begin_step(&self) {
        match self.commands {
            Some(_) => self.console.begin_answer(),
            None => self.console.begin_step(),
        }
    }

    /// Waits until the process has ended or `other` can be read; returns whether it has ended, and none after
    /// the timeout.
    pub fn ended_before(&self, other: &OwnedFd, timeout: Duration) -> io::Result<Option<bool>> {
        let mut sources = [PollFd::new(&self.pidfd, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
        let ready = retry_on_intr(|| poll(&mut sources, Some(&timespec(timeout))))?;
        Ok((ready > 0).then(|| sources[1].revents().is_empty()))
    }

    /// Returns the lines of the console since the step began.
    pub fn last_lines(&self) -> String {
        self.console.output()
    }

    /// Waits until `probe` returns a value, for a hypervisor that reports nothing by itself. Between two probes it
    /// waits for the end of the process, so that a process that dies ends the wait at once.
    ///
    /// # Errors
    /// The process ends, with its last lines; the deadline passes; `probe` fails.
    pub fn wait_until<T>(
        &self,
        deadline: Deadline,
        waiting_for: &str,
        mut probe: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        loop {
            if let Some(value) = probe()? {
                return Ok(value);
            }
            deadline.check(waiting_for).map_err(|error| error.detail(&self.last_lines()))?;
            if self.wait(deadline.within(PROBE_INTERVAL).remaining()) {
                // It may have done its work just before its end.
                if let Some(value) = probe()? {
                    return Ok(value);
                }
                let reason =
                    format!("{} has ended while the machinery waited for {waiting_for}", self.program);
                return Err(Error::failed(reason).detail(&self.last_lines()));
            }
        }
    }

    /// Waits for a line of the console with that text since the step began, or for a prompt with it.
    ///
    /// # Errors
    /// As [`wait_until`](Handle::wait_until).
    pub fn wait_for_line(&self, text: &str, deadline: Deadline) -> Result<String> {
        self.console.expect(text);
        self.wait_for_expected(text, deadline)
    }

    fn wait_for_expected(&self, text: &str, deadline: Deadline) -> Result<String> {
        let waiting_for = format!("'{text}' on the console of {}", self.program);
        self.wait_until(deadline, &waiting_for, || Ok(self.console.expected_line()))
    }

    /// Begins a step, sends a command to the process's stdin, and waits for a line or a prompt with the text `answer`.
    /// One thread at a time may ask. The process was started by
    /// [`start_with_commands`](super::Process::start_with_commands).
    ///
    /// # Errors
    /// The process takes no commands. As [`wait_until`](Handle::wait_until).
    pub fn ask(&self, command: &str, answer: &str, deadline: Deadline) -> Result<String> {
        self.begin_step();
        // The answer may come, and be followed by many lines, before this thread goes on.
        self.console.expect(answer);
        self.send(command)?;
        self.wait_for_expected(answer, deadline)
    }

    /// Begins a step, interrupts the process, and waits for a line or a prompt with the text `answer`. A debugger loses an
    /// interrupt that comes while it begins to continue, so the interrupt is repeated.
    ///
    /// # Errors
    /// As [`wait_until`](Handle::wait_until).
    pub fn interrupt_until(&self, answer: &str, deadline: Deadline) -> Result<String> {
        self.begin_step();
        loop {
            self.interrupt();
            match self.wait_for_line(answer, deadline.within(INTERRUPT_INTERVAL)) {
                Err(error) if error.kind() == ErrorKind::Timeout && !deadline.passed() => {}
                answered => return answered,
            }
        }
    }

    /// Sends a command to the process's stdin, and waits for no answer.
    ///
    /// # Errors
    /// The process takes no commands, or has ended.
    pub fn send(&self, command: &str) -> Result<()> {
        let failed = |why: &dyn std::fmt::Display| {
            let reason = format!("cannot send '{command}' to {}: {why}", self.program);
            Error::failed(reason).detail(&self.last_lines())
        };
        let commands = self.commands.as_ref().ok_or_else(|| failed(&"it takes no commands"))?;
        lock(commands).write_all(format!("{command}\n").as_bytes()).map_err(|error| failed(&error))
    }

    /// Waits for the end of the process; returns false after the timeout.
    pub fn wait(&self, timeout: Duration) -> bool {
        let mut sources = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(retry_on_intr(|| poll(&mut sources, Some(&timespec(timeout)))), Ok(1..))
    }
}

impl Handle {
    /// Waits for the end of a process without a [`Child`](std::process::Child), and returns its exit status. Only the
    /// parent learns it: this process is that of a child from before it executed a newer host.
    pub(super) fn reap(&self) -> Option<ExitStatus> {
        while !self.wait(Duration::MAX) {}
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED).ok()??;
        // The layout of wait(2).
        let code = status.exit_status().map(|code| (code & 0xff) << 8);
        code.or(status.terminating_signal()).map(ExitStatus::from_raw)
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
