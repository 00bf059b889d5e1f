//! Processes that a run has left running.
//!
//! Tests start hypervisors, and a machinery must end all of them. The processes of a run inherit a marker in
//! their environment, which distinguishes them from other processes of the user.

use std::fs;
use std::process::{self, Command};
use std::time::Duration;

use rustix::process::Pid;

use crate::process::ends_within;
use crate::run::{Context, Result};

const NAME: &str = "CUCKOO_XTASK_RUN";

/// The maximum time between SIGTERM and a process's end.
const GRACE: Duration = Duration::from_secs(2);

/// The marker of one run.
pub struct RunMarker {
    value: String,
}

impl RunMarker {
    /// Makes a marker that no other running task has.
    pub fn new() -> Self {
        Self { value: process::id().to_string() }
    }

    /// Marks the processes that `command` will start.
    pub fn apply_to(&self, command: &mut Command) {
        command.env(NAME, &self.value);
    }

    /// Fails if any process with the marker is left.
    pub fn check_none_left(&self) -> Result<()> {
        let mut left = Vec::new();
        for pid in self.marked_processes()? {
            if !ends_within(pid, GRACE)? {
                left.push(format!("  {pid}  {}", command_line(pid)));
            }
        }
        if left.is_empty() {
            return Ok(());
        }
        let left = left.join("\n");
        Err(format!("these processes were started and not ended; look at them, then `kill` them:\n{left}")
            .into())
    }

    fn marked_processes(&self) -> Result<Vec<Pid>> {
        let marker = format!("{NAME}={}", self.value);
        let entries = fs::read_dir("/proc").context(|| "cannot list processes in /proc".to_owned())?;
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        Ok(pids.filter_map(Pid::from_raw).filter(|pid| has_marker(*pid, &marker)).collect())
    }
}

/// Reports whether a process has the marker. Processes of other users, and those that are ending, cannot be
/// read; they do not have it.
fn has_marker(pid: Pid, marker: &str) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|byte| *byte == 0).any(|variable| variable == marker.as_bytes())
}

fn command_line(pid: Pid) -> String {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).replace('\0', " ").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Stdio};

    use super::*;
    use crate::run::Failure;

    /// Starts a marked process, and waits until its environment can be read. It ends with its standard input.
    fn marked(marker: &RunMarker) -> Child {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo started; read line"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        marker.apply_to(&mut shell);
        let mut child = shell.spawn().unwrap();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        child
    }

    #[test]
    fn leftover_process_is_reported_until_it_ends() {
        let marker = RunMarker { value: format!("test-{}", process::id()) };
        assert!(marker.check_none_left().is_ok());
        let mut left = marked(&marker);
        let Failure::Message(message) = marker.check_none_left().unwrap_err() else { panic!("no message") };
        assert!(message.contains("read line") && message.contains(&left.id().to_string()), "{message}");
        drop(left.stdin.take());
        left.wait().unwrap();
        assert!(marker.check_none_left().is_ok());
    }
}
