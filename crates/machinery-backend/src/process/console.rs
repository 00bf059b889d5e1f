//! The console of a process: its stderr, and its stdout on request. Its lines are logged, and the last ones are kept as
//! the reason of a failure.
//!
//! A hypervisor's own messages are mixed with lines of libraries: on a host without a sound card, a machine with one
//! prints 50 such lines at each start. The [`LineKind`] that the author gives to each line keeps them apart.
//!
//! A guest may make its hypervisor print as much as it likes, and code in the hypervisor does so, too. A line is
//! therefore cut, few lines are kept, and the log gets few lines: 20 at once, and then one a second.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{ioctl_fionbio, retry_on_intr};

use crate::rate::LogLimit;
use crate::sync::lock;

/// The maximum size of a line, in bytes. The rest of a longer line is dropped.
const MAX_LINE: usize = 4096;
/// The mark of a line that was cut.
const CUT: &str = " …";
/// The number of last lines that are kept, and the maximum size of each, in bytes.
const MAX_LINES: usize = 6;
const MAX_KEPT_LINE: usize = 300;
/// The number of lines of a step of which somebody may expect one.
const MAX_STEP_LINES: usize = 400;
/// The time after which an unfinished line is a prompt.
const PROMPT_DELAY: Duration = Duration::from_millis(10);
/// The capacity of a pipe, in bytes. Source: pipe(7).
const PIPE: usize = 64 * 1024;

/// The kind of a line of the console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineKind {
    /// A message of the program about a failure. It comes first in a reason, and is logged as a warning.
    Failure,
    /// A warning of the program. It is logged as a warning.
    Warning,
    /// Anything else. It is logged at debug.
    Other,
}

/// The console of a process.
#[derive(Debug, Clone)]
pub struct Console(Arc<Mutex<Reader>>);

impl Console {
    /// Follows the pipe to its end. `kind_of` classifies each line.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn follow(pipe: OwnedFd, machine: &str, kind_of: fn(&str) -> LineKind) -> io::Result<Console> {
        ioctl_fionbio(&pipe, true)?;
        let readable = pipe.try_clone()?;
        let reader = Reader {
            pipe: pipe.into(),
            machine: machine.to_owned(),
            kind_of,
            unfinished: Vec::new(),
            is_cut: false,
            failures_logged: LogLimit::default(),
            others_logged: LogLimit::default(),
            last_read: Instant::now(),
            lines: LastLines::default(),
            awaited: None,
        };
        let console = Console(Arc::new(Mutex::new(reader)));
        let thread = console.clone();
        std::thread::Builder::new().name("console".to_owned()).spawn(move || {
            while is_readable(&readable) && thread.lock().read() {}
            thread.lock().end();
        })?;
        Ok(console)
    }

    /// Drops the lines so far: a failure from now on has another cause.
    pub fn begin_step(&self) {
        let mut reader = self.lock();
        reader.read_all();
        reader.lines = LastLines::default();
    }

    /// Drops the prompt that the process has printed, as well as the lines so far: the next one answers a command.
    pub fn begin_answer(&self) {
        let mut reader = self.lock();
        reader.read_all();
        reader.end_line();
        reader.lines = LastLines::default();
    }

    /// Waits from now on for a line with that text. A line of the current step counts too.
    pub fn expect(&self, text: &str) {
        self.lock().expect(text);
    }

    /// Returns the line that [`expect`](Console::expect) waits for, if it has come. A prompt counts before its line ends.
    pub fn expected_line(&self) -> Option<String> {
        let mut reader = self.lock();
        reader.read_all();
        reader.expected_line()
    }

    /// Returns the lines since the step began, on one line; only the program's own messages if there are any.
    /// The text is empty if there are no lines.
    pub fn output(&self) -> String {
        let mut reader = self.lock();
        reader.read_all();
        reader.end_line();
        reader.lines.to_string()
    }

    fn lock(&self) -> MutexGuard<'_, Reader> {
        lock(&self.0)
    }
}

/// Waits until there is output or the end.
fn is_readable(pipe: &OwnedFd) -> bool {
    retry_on_intr(|| poll(&mut [PollFd::new(pipe, PollFlags::IN)], None)).is_ok()
}

/// Reads the pipe, and splits the output into lines.
#[derive(Debug)]
struct Reader {
    pipe: File,
    machine: String,
    kind_of: fn(&str) -> LineKind,
    unfinished: Vec<u8>,
    /// True if the unfinished line is longer than what is kept of it.
    is_cut: bool,
    failures_logged: LogLimit,
    others_logged: LogLimit,
    last_read: Instant,
    lines: LastLines,
    awaited: Option<Awaited>,
}

/// A line that somebody waits for.
#[derive(Debug)]
struct Awaited {
    text: String,
    line: Option<String>,
}

impl Reader {
    /// Reads the available output; returns `false` at the end.
    fn read(&mut self) -> bool {
        let mut bytes = [0; 4096];
        match self.pipe.read(&mut bytes) {
            Ok(0) => false,
            Ok(length) => {
                // A progress display overwrites its line.
                let ends_line = |byte: &u8| matches!(byte, b'\n' | b'\r');
                bytes[..length].split_inclusive(ends_line).for_each(|part| match part.split_last() {
                    Some((last, rest)) if ends_line(last) => {
                        self.take(rest);
                        self.end_line();
                    }
                    _ => self.take(part),
                });
                self.last_read = Instant::now();
                true
            }
            Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
    }

    /// Reads all output written until now, and perhaps more.
    fn read_all(&mut self) {
        for _ in 0..PIPE.div_ceil(4096) {
            if !self.read() {
                return;
            }
        }
    }

    /// Adds a part of a line. The rest of a line that is too long is dropped.
    fn take(&mut self, part: &[u8]) {
        let kept = part.len().min(MAX_LINE - self.unfinished.len());
        self.unfinished.extend_from_slice(&part[..kept]);
        self.is_cut |= kept < part.len();
    }

    fn end_line(&mut self) {
        let text = String::from_utf8_lossy(&std::mem::take(&mut self.unfinished)).trim().to_owned();
        let is_cut = std::mem::take(&mut self.is_cut);
        if text.is_empty() {
            return;
        }
        let kind = (self.kind_of)(&text);
        self.log(&text, if is_cut { CUT } else { "" }, kind);
        let text = shortened(text, is_cut);
        if let Some(awaited) = &mut self.awaited
            && awaited.line.is_none()
            && text.contains(&awaited.text)
        {
            awaited.line = Some(text.clone());
        }
        self.lines.add(text, kind);
    }

    fn log(&mut self, text: &str, cut: &str, kind: LineKind) {
        let machine = &self.machine;
        if kind == LineKind::Other {
            // Lines that are not logged take nothing from those that are.
            if tracing::enabled!(tracing::Level::DEBUG)
                && let Some(suppressed) = self.others_logged.admit()
            {
                log_suppressed(machine, suppressed);
                tracing::debug!(machine, text = format!("{text}{cut}"), "the process reports");
            }
        } else if let Some(suppressed) = self.failures_logged.admit() {
            log_suppressed(machine, suppressed);
            tracing::warn!(machine, text = format!("{text}{cut}"), "the process reports");
        }
    }

    /// Logs at the end how many lines are not in the log.
    fn end(&mut self) {
        self.end_line();
        for limit in [&mut self.failures_logged, &mut self.others_logged] {
            log_suppressed(&self.machine, limit.take_suppressed());
        }
    }

    fn expect(&mut self, text: &str) {
        let line = self.lines.all.iter().find(|line| line.contains(text)).cloned();
        self.awaited = Some(Awaited { text: text.to_owned(), line });
    }

    fn expected_line(&self) -> Option<String> {
        let awaited = self.awaited.as_ref()?;
        let prompt = || {
            let prompt = String::from_utf8_lossy(&self.unfinished);
            // The rest of a line may be on its way.
            let is_prompt = self.last_read.elapsed() >= PROMPT_DELAY && prompt.contains(&awaited.text);
            is_prompt.then(|| prompt.trim().to_owned())
        };
        awaited.line.clone().or_else(prompt)
    }
}

fn log_suppressed(machine: &str, lines: u64) {
    if lines > 0 {
        tracing::warn!(machine, "… {lines} lines suppressed: the process reports more than a line a second");
    }
}

/// Returns the part of a line that is kept.
fn shortened(mut line: String, is_cut: bool) -> String {
    if is_cut || line.len() > MAX_KEPT_LINE {
        line.truncate(line.floor_char_boundary(MAX_KEPT_LINE));
        line.push_str(CUT);
    }
    line
}

/// The last lines of a step.
#[derive(Debug, Default)]
struct LastLines {
    failures: VecDeque<String>,
    others: VecDeque<String>,
    /// All lines, of which somebody may expect one.
    all: VecDeque<String>,
}

impl LastLines {
    fn add(&mut self, line: String, kind: LineKind) {
        let lines = if kind == LineKind::Failure { &mut self.failures } else { &mut self.others };
        push(lines, line.clone(), MAX_LINES);
        push(&mut self.all, line, MAX_STEP_LINES);
    }
}

fn push(lines: &mut VecDeque<String>, line: String, max: usize) {
    if lines.len() == max {
        lines.pop_front();
    }
    lines.push_back(line);
}

impl std::fmt::Display for LastLines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lines = if self.failures.is_empty() { &self.others } else { &self.failures };
        f.write_str(&Vec::from_iter(lines.iter().map(String::as_str)).join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn kind_of(line: &str) -> LineKind {
        if line.starts_with("hypervisor: ") { LineKind::Failure } else { LineKind::Other }
    }

    fn output<'a>(lines: impl IntoIterator<Item = &'a str>) -> String {
        let mut last = LastLines::default();
        lines.into_iter().for_each(|line| last.add(line.to_owned(), kind_of(line)));
        last.to_string()
    }

    #[test]
    fn reason_has_only_the_programs_failures_when_libraries_print_other_lines() {
        let lines = ["alsa: no", "hypervisor: no memory", "alsa: and no", "hypervisor: cannot load"];
        assert_eq!(output(lines), "hypervisor: no memory; hypervisor: cannot load");
        assert_eq!(output(["alsa: no", "and no"]), "alsa: no; and no");
    }

    #[test]
    fn reason_keeps_the_last_lines_when_there_are_many() {
        let many: Vec<String> = (0..10_000).map(|number| format!("línea {number}")).collect();
        let text = output(many.iter().map(String::as_str));
        assert!(text.starts_with("línea 9994; ") && text.ends_with("línea 9999"), "{text}");
    }

    /// Follows a pipe that the test writes to.
    fn console() -> (Console, std::io::PipeWriter) {
        let (reader, writer) = io::pipe().unwrap();
        (Console::follow(reader.into(), "m", kind_of).unwrap(), writer)
    }

    #[test]
    fn line_is_cut_and_marked_when_it_does_not_end() {
        let (console, mut process) = console();
        // More than the pipe holds, so that the console has read most of it afterwards.
        process.write_all(&b"x".repeat(10 * PIPE)).unwrap();
        assert!(console.lock().unfinished.capacity() <= 2 * MAX_LINE);
        process.write_all("\nhypervisor: ".as_bytes()).unwrap();
        process.write_all("ü".repeat(3000).as_bytes()).unwrap();
        drop(process);
        let text = console.output();
        assert!(text.starts_with("hypervisor: ü") && text.ends_with("ü …"), "{text}");
        assert!(text.len() < MAX_KEPT_LINE + 10, "{text}");
        let others: usize = console.lock().lines.others.iter().map(String::len).sum();
        assert!(others < MAX_KEPT_LINE + 10, "{others}");
    }

    #[test]
    fn last_lines_are_kept_when_the_log_leaves_them_out() {
        let (console, mut process) = console();
        for number in 0..10_000 {
            writeln!(process, "hypervisor: {number}").unwrap();
        }
        let text = console.output();
        assert!(text.ends_with("hypervisor: 9998; hypervisor: 9999"), "{text}");
        assert!(console.lock().failures_logged.take_suppressed() > 9_000);
    }
}
