//! The stderr of QEMU's programs: logged, and kept as the reason of a failure.
//!
//! The program's own messages begin with its name. Source: `error_vreport` in QEMU's util/qemu-error.c. All
//! other lines come from libraries: on a host without a sound card, a machine with one prints 50 such lines
//! at each start. The program's own messages are logged as warnings and come first in a reason. Other lines
//! are logged at debug.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ChildStderr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{ioctl_fionbio, retry_on_intr};

/// The number of last lines that are kept, and the maximum size of each, in bytes.
const MAX_LINES: usize = 6;
const MAX_LINE: usize = 300;
/// The capacity of a pipe, in bytes. Source: pipe(7).
const PIPE: usize = 64 * 1024;

/// A process' stderr.
pub struct Stderr(Arc<Mutex<Reader>>);

impl Stderr {
    /// Follows the pipe to its end.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn follow(pipe: ChildStderr, machine: &str) -> io::Result<Stderr> {
        ioctl_fionbio(&pipe, true)?;
        let readable = pipe.as_fd().try_clone_to_owned()?;
        let reader =
            Reader { pipe, machine: machine.to_owned(), unfinished: Vec::new(), lines: LastLines::default() };
        let stderr = Stderr(Arc::new(Mutex::new(reader)));
        let thread = Stderr(Arc::clone(&stderr.0));
        std::thread::Builder::new()
            .name("qemu-stderr".to_owned())
            .spawn(move || while is_readable(&readable) && thread.lock().read() {})?;
        Ok(stderr)
    }

    /// Drops the lines so far: a failure from now on has another cause.
    pub fn begin_step(&self) {
        let mut reader = self.lock();
        reader.read_all();
        reader.lines = LastLines::default();
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
        // Each statement that holds the lock leaves the value whole, so poison means nothing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until there is output or the end.
fn is_readable(pipe: &OwnedFd) -> bool {
    retry_on_intr(|| poll(&mut [PollFd::new(pipe, PollFlags::IN)], None)).is_ok()
}

/// Reads the pipe, and splits the output into lines.
struct Reader {
    pipe: ChildStderr,
    machine: String,
    unfinished: Vec<u8>,
    lines: LastLines,
}

impl Reader {
    /// Reads the available output; returns `false` at the end.
    fn read(&mut self) -> bool {
        let mut bytes = [0; 4096];
        match self.pipe.read(&mut bytes) {
            Ok(0) => false,
            Ok(length) => {
                bytes[..length].iter().for_each(|byte| self.take(*byte));
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

    fn take(&mut self, byte: u8) {
        match byte {
            b'\n' => self.end_line(),
            // The rest of a line that is too long is dropped.
            _ if self.unfinished.len() >= MAX_LINE => {}
            _ => self.unfinished.push(byte),
        }
    }

    fn end_line(&mut self) {
        let text = String::from_utf8_lossy(&std::mem::take(&mut self.unfinished)).trim().to_owned();
        if text.is_empty() {
            return;
        }
        let machine = &self.machine;
        if is_own(&text) {
            tracing::warn!(machine, text, "QEMU's stderr");
        } else {
            tracing::debug!(machine, text, "QEMU's stderr");
        }
        self.lines.add(text);
    }
}

/// The last lines of a step.
#[derive(Default)]
struct LastLines {
    /// Messages of the program itself.
    own: VecDeque<String>,
    others: VecDeque<String>,
}

impl LastLines {
    fn add(&mut self, line: String) {
        let lines = if is_own(&line) && !is_warning(&line) { &mut self.own } else { &mut self.others };
        if lines.len() == MAX_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

impl std::fmt::Display for LastLines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lines = if self.own.is_empty() { &self.others } else { &self.own };
        f.write_str(&Vec::from_iter(lines.iter().map(String::as_str)).join("; "))
    }
}

/// Reports whether the line is a message of one of QEMU's programs. With `-msg timestamp=on` the time precedes
/// the name.
fn is_own(line: &str) -> bool {
    line.split(' ').take(2).any(|word| word.starts_with("qemu-") && word.ends_with(':'))
}

fn is_warning(line: &str) -> bool {
    line.contains(": warning: ") || line.contains(": info: ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output<'a>(lines: impl IntoIterator<Item = &'a str>) -> String {
        let mut last = LastLines::default();
        lines.into_iter().for_each(|line| last.add(line.to_owned()));
        last.to_string()
    }

    #[test]
    fn reason_begins_with_qemus_own_messages_when_libraries_print_others() {
        let text = output([
            "qemu: module audio-audio-pa not found, do you want to install qemu-system-gui package?",
            "ALSA lib pcm.c:2666:(snd_pcm_open_noupdate) Unknown PCM default",
            "qemu-system-x86_64: warning: nic rtl8139.0 has no peer",
            "qemu-system-x86_64: Size mismatch: pc.ram: 0x4000000 != 0x8000000: Invalid argument",
            "qemu-system-x86_64: load of migration failed: Invalid argument",
            "audio: Failed to create voice `adc'",
        ]);
        assert_eq!(
            text,
            "qemu-system-x86_64: Size mismatch: pc.ram: 0x4000000 != 0x8000000: Invalid argument; \
             qemu-system-x86_64: load of migration failed: Invalid argument"
        );
        assert_eq!(output(["alsa: no", "and no"]), "alsa: no; and no");
    }

    #[test]
    fn reason_keeps_the_last_lines_when_there_are_many() {
        let many: Vec<String> = (0..10_000).map(|number| format!("línea {number}")).collect();
        let text = output(many.iter().map(String::as_str));
        assert!(text.starts_with("línea 9994; ") && text.ends_with("línea 9999"), "{text}");
    }

    #[test]
    fn message_of_qemu_is_recognized_behind_a_timestamp() {
        assert!(is_own("2026-11-29T00:58:31.194578Z qemu-system-x86_64: no"));
        assert!(is_own("qemu-img: no") && !is_own("qemu: module audio-audio-pa not found"));
    }
}
