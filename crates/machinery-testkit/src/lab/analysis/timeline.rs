//! The time line of a task, from Cuckoo3's log.
//!
//! The log has the time in seconds. [`LogReader`] therefore notes when each line arrives.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Result;
use crate::error::Context;
use crate::file_content::ContentWatch;

/// The words that begin a step in Cuckoo3's log, in the order of a task.
const STEPS: [(&str, &str); 9] = [
    ("Assigning startable task to node", "machine assigned"),
    ("Requesting machine start", "restore begins"),
    ("Waiting until agent is online", "machine runs"),
    ("Agent online", "agent answers"),
    ("Delivering and executing payload", "payload is delivered"),
    ("Running until timeout", "sample runs"),
    ("Requesting machine stop", "stop begins"),
    ("Asking resultserver to unmap", "machine is off"),
    ("Setting task to reported", "report"),
];

/// A log of this age is of another run.
const FOREVER: Duration = Duration::from_secs(86_400);

/// A step of a task.
#[derive(Debug, Clone)]
pub struct Step {
    /// Its name.
    pub name: &'static str,
    /// The time since the submission.
    pub at: Duration,
}

/// The steps of a task, in their order. The first one is the submission.
#[derive(Debug, Clone)]
pub struct Timeline {
    /// The moment of the submission.
    pub begun: Instant,
    /// The steps.
    pub steps: Vec<Step>,
}

impl Timeline {
    /// Returns the time between two steps, if the task had both.
    pub fn between(&self, from: &str, to: &str) -> Option<Duration> {
        self.at(to)?.checked_sub(self.at(from)?)
    }

    /// Returns the time of a step since the submission.
    pub fn at(&self, name: &str) -> Option<Duration> {
        self.steps.iter().find(|step| step.name == name).map(|step| step.at)
    }

    /// Returns the time line of the task with that analysis id.
    fn of(id: &str, lines: &[(Instant, String)]) -> Option<Self> {
        let ours = || lines.iter().filter(|(_, line)| line.contains(id));
        let (begun, _) = ours().next()?;
        let step = |(words, name): (&str, &'static str)| {
            let (at, _) = ours().find(|(_, line)| line.contains(words))?;
            Some(Step { name, at: at.duration_since(*begun) })
        };
        let first = Step { name: "submitted", at: Duration::ZERO };
        let steps = std::iter::once(first).chain(STEPS.into_iter().filter_map(step)).collect();
        Some(Timeline { begun: *begun, steps })
    }
}

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Step { name, at } in &self.steps {
            writeln!(f, "{:8.3} s  {name}", at.as_secs_f64())?;
        }
        Ok(())
    }
}

/// Reads a log while it is written.
pub struct LogReader {
    lines: Arc<Mutex<Vec<(Instant, String)>>>,
    thread: Option<JoinHandle<()>>,
}

impl LogReader {
    /// Reads the log until the process ends.
    pub fn start(path: &Path, process: OwnedFd) -> Result<Self> {
        let watch = ContentWatch::new(path)?;
        let log = File::options().create(true).append(true).read(true).open(path);
        let mut log = BufReader::new(log.context(|| format!("opening {}", path.display()))?);
        let lines = Arc::new(Mutex::new(Vec::new()));
        let written = Arc::clone(&lines);
        let thread = thread::spawn(move || {
            let mut unfinished = String::new();
            let look = || {
                while log.read_line(&mut unfinished).is_ok_and(|length| length > 0) {
                    if unfinished.ends_with('\n') {
                        let line = std::mem::take(&mut unfinished);
                        written.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), line));
                    }
                }
                Ok(None::<()>)
            };
            // A log that cannot be watched has no more lines.
            let _ = watch.wait_for(FOREVER, Some(process.as_fd()), look);
        });
        Ok(LogReader { lines, thread: Some(thread) })
    }

    /// Returns the time line of the task with that analysis id, if the log has it.
    pub fn timeline(&self, id: &str) -> Option<Timeline> {
        Timeline::of(id, &self.lines.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits for the end of the reader, which follows the end of the process.
    pub fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic has been printed.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeline_has_the_steps_of_its_task_alone() {
        let begun = Instant::now();
        let line = |ms, text: &str| (begun + Duration::from_millis(ms), text.to_owned());
        let lines = [
            line(0, "Starting work. analysis_id=A-1"),
            line(5, "Requesting machine start. task_id=B-1_1"),
            line(20, "Requesting machine start. task_id=A-1_1"),
            line(30, "Setting task to reported. task_id=A-1_1"),
        ];
        let timeline = Timeline::of("A-1", &lines).unwrap();
        assert_eq!(timeline.between("restore begins", "report"), Some(Duration::from_millis(10)));
        assert_eq!(timeline.at("restore begins"), Some(Duration::from_millis(20)));
        assert_eq!(timeline.at("stop begins"), None);
        assert!(Timeline::of("C-1", &lines).is_none());
    }
}
