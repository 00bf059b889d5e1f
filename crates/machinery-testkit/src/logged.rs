//! A command under way, whose log names its steps.

// These methods are assertions of tests: they panic instead of returning an error.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// A command under way.
///
/// # Panics
/// All methods panic if the command does not do what the test expects.
#[derive(Debug)]
pub struct LoggedCommand {
    process: Child,
    log: BufReader<ChildStderr>,
}

impl LoggedCommand {
    /// Starts the command, which writes its log to the standard error.
    #[must_use]
    pub fn start(mut command: Command) -> LoggedCommand {
        let mut process =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(process.stderr.take().unwrap());
        LoggedCommand { process, log }
    }

    /// Waits until the log has the step.
    #[track_caller]
    pub fn wait_for(&mut self, step: &str) {
        let (mut line, mut log) = (String::new(), String::new());
        while !line.contains(step) {
            line.clear();
            assert_ne!(self.log.read_line(&mut line).unwrap(), 0, "it ended before '{step}': {log}");
            log += &line;
        }
    }

    /// Sends the command a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// Waits for the end, and returns the exit code and the rest of the log. Only SIGKILL may end the process.
    #[must_use]
    pub fn end(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        while self.log.read_line(&mut rest).unwrap() > 0 {}
        let status = self.process.wait().unwrap();
        assert!(status.code().is_some() || status.signal() == Some(9), "{status:?}");
        (status.code(), rest)
    }
}
