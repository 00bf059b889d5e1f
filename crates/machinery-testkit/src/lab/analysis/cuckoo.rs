//! A running Cuckoo3: its main process with its own node.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use super::timeline::{LogReader, Timeline};
use crate::Result;
use crate::error::{Context, Error};
use crate::file_content::{ContentWatch, Wait};
use crate::lab::leftovers;
use crate::process::{self, Process};

const START_TIMEOUT: Duration = Duration::from_secs(180);
/// Cuckoo3 waits for its tasks and workers, and the host stops its machines.
const END_TIMEOUT: Duration = Duration::from_secs(120);
/// The number of lines of a log in an error.
const LAST_LINES: usize = 60;

/// A running Cuckoo3. A dropped one ends.
pub struct Cuckoo {
    process: Process,
    log: LogReader,
    cwd: PathBuf,
    has_ended: bool,
}

impl Cuckoo {
    /// Starts it in its CWD by that command, and waits until it accepts submissions.
    pub(super) fn start(mut command: Command, cwd: &Path) -> Result<Self> {
        let log = cwd.join("log/cuckoo.log");
        let watch = ContentWatch::new(&log)?;
        let mut process = Process::spawn_in(&mut command, process::make_folder()?)?;
        process.end_with_this_process()?;
        let fd = process.fd().try_clone().context(|| "watching Cuckoo3".to_owned())?;
        let cuckoo =
            Cuckoo { process, log: LogReader::start(&log, fd)?, cwd: cwd.to_owned(), has_ended: false };
        let up = watch.wait_for(START_TIMEOUT, Some(cuckoo.fd()), || {
            let said = fs::read_to_string(&log).unwrap_or_default();
            // Cuckoo3 runs on without a worker.
            let failed = said.contains("Worker setup failed").then_some(false);
            Ok(failed.or(said.contains("Scheduler started").then_some(true)))
        })?;
        match up {
            Wait::Found(true) => Ok(cuckoo),
            Wait::Found(false) => {
                Err(Error::new(format!("a worker of Cuckoo3 does not start. {}", cuckoo.log())))
            }
            Wait::GaveUp(why) => Err(Error::new(format!("Cuckoo3 does not start: {why}. {}", cuckoo.log()))),
        }
    }

    /// Ends it by SIGTERM.
    pub fn end(mut self) -> Result<()> {
        self.process.signal(Signal::TERM)?;
        let status = self.process.wait(END_TIMEOUT)?;
        self.has_ended = true;
        self.log.join();
        match status.success() {
            true => Ok(()),
            false => Err(Error::new(format!("Cuckoo3 ended with {status}. {}", self.log()))),
        }
    }

    /// Returns the end of its logs.
    pub fn log(&self) -> String {
        let host = tail(&self.cwd.join("log/machinery-host.log"));
        let said = format!("{}{}", self.process.stdout(), self.process.stderr());
        format!("Cuckoo3 said:\n{}\nThe host said:\n{host}", last_lines(&said))
    }

    /// Returns the time line of the task with that analysis id.
    pub(super) fn timeline(&self, id: &str) -> Option<Timeline> {
        self.log.timeline(id)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.process.fd().as_fd()
    }
}

impl Drop for Cuckoo {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        // It may have ended already. The rest of a failed test is killed, also a host in its own session.
        let _ = self.process.signal(Signal::TERM);
        let _ = self.process.wait(END_TIMEOUT);
        self.log.join();
        leftovers::kill(&leftovers::processes_below(&self.cwd, &[]).unwrap_or_default());
    }
}

fn tail(path: &Path) -> String {
    last_lines(&fs::read_to_string(path).unwrap_or_default())
}

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}
