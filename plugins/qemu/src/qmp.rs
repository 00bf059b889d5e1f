//! The QEMU monitor: commands, answers, events.
//!
//! ```text
//! any thread:  execute ─▶ line out … waits for the answer with its id
//! watcher:     read ─▶ answer ─▶ the thread that waits for that id
//!                   └▶ event  ─▶ the caller of `read`, then all listeners
//! ```
//!
//! Commands are the `qapi` crate's types. Answers and events are read as plain JSON, because a QEMU
//! newer than that crate's schema knows events and values that its types do not.
//!
//! Code in QEMU may be an attacker's, so everything that this plugin keeps of QEMU's output has a limit. A QEMU that
//! sends too long a line is killed.

mod events;
mod lines;

use std::collections::HashMap;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use machinery::{Deadline, Error, Result};
use machinery_backend::RateLimit;
use machinery_backend::sync::lock;
use qapi::qmp;
use qapi::{Command, Execute};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

use lines::Lines;

pub use events::{Event, wait, wait_with_progress};

/// The maximum time for QEMU to read a command.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// The maximum length of an event, in bytes. QEMU's own have some hundred.
const MAX_EVENT: usize = 16 << 10;
/// The number of events that wait for a listener. Later ones are lost to a listener that reads nothing.
const MAX_WAITING_EVENTS: usize = 128;

/// A connection to a monitor.
pub struct Qmp {
    stream: UnixStream,
    next_id: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// No more answers will come.
    closed: bool,
    /// The limit that QEMU has exceeded.
    violation: Option<String>,
    waiting: HashMap<u64, Sender<Value>>,
    listening: Vec<SyncSender<Event>>,
}

impl Qmp {
    /// Creates a monitor on that stream. One thread has to [`read`](Qmp::read) it.
    pub fn new(stream: UnixStream) -> Self {
        // A stopped QEMU reads nothing, so its socket fills up.
        if let Err(error) = stream.set_write_timeout(Some(SEND_TIMEOUT)) {
            tracing::debug!(%error, "cannot set the timeout for sending to QEMU");
        }
        Qmp { stream, next_id: AtomicU64::new(1), state: Mutex::default() }
    }

    /// Reads until QEMU closes the connection. Each event goes to `on_event` first, which returns the limit that QEMU
    /// exceeds with it.
    ///
    /// # Errors
    /// QEMU has exceeded a limit, so it is to be killed. The text is the reason.
    pub fn read(&self, mut on_event: impl FnMut(&Event) -> Result<(), String>) -> Result<(), String> {
        let read = self.stream.try_clone().map_or(Ok(()), |stream| self.read_lines(stream, &mut on_event));
        let mut state = self.lock();
        state.closed = true;
        state.violation = read.clone().err();
        state.waiting.clear();
        state.listening.clear();
        read
    }

    fn read_lines(
        &self,
        stream: UnixStream,
        on_event: &mut impl FnMut(&Event) -> Result<(), String>,
    ) -> Result<(), String> {
        let (mut lines, mut warnings) = (Lines::new(stream), RateLimit::default());
        while let Some(line) = lines.next()? {
            match serde_json::from_slice(line) {
                Ok(message) => self.dispatch(message, line.len(), on_event)?,
                Err(error) if warnings.admits() => {
                    tracing::warn!(%error, "QEMU's monitor sent a line that is not JSON");
                }
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn dispatch(
        &self,
        mut message: Value,
        length: usize,
        on_event: &mut impl FnMut(&Event) -> Result<(), String>,
    ) -> Result<(), String> {
        if let Some(name) = message["event"].as_str() {
            if length > MAX_EVENT {
                return Err(format!("its monitor sent an event of more than {} KiB", MAX_EVENT >> 10));
            }
            let event = Event { name: name.to_owned(), data: message["data"].take() };
            on_event(&event)?;
            let listens = |sent| !matches!(sent, Err(TrySendError::Disconnected(_)));
            self.lock().listening.retain(|listener| listens(listener.try_send(event.clone())));
        } else if let Some(id) = message["id"].as_u64() {
            let waiting = self.lock().waiting.remove(&id);
            // The caller may have timed out.
            let _ = waiting.map(|waiting| waiting.send(message));
        }
        Ok(())
    }

    /// Begins a batch of commands that are sent at once and run one after the other.
    pub fn batch(&self) -> Batch<'_> {
        Batch { qmp: self, lines: Vec::new(), answers: Vec::new() }
    }

    /// Runs a command and waits for its answer.
    ///
    /// # Errors
    /// QEMU refuses it, ends, or takes too long.
    pub fn execute<C: Command>(&self, command: &C, deadline: Deadline) -> Result<Value> {
        self.execute_with(command, None, deadline)
    }

    /// Passes an open file to QEMU, and returns its name in commands. `by_name` is false for a QEMU whose commands
    /// take only numbers.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute).
    pub fn pass(&self, file: BorrowedFd<'_>, by_name: bool, deadline: Deadline) -> Result<String> {
        if by_name {
            let name = format!("file{}", self.next_id.fetch_add(1, Ordering::Relaxed));
            self.execute_with(&qmp::getfd { fdname: name.clone() }, Some(file), deadline)?;
            return Ok(name);
        }
        let answer =
            self.execute_with(&qmp::add_fd { fdset_id: None, opaque: None }, Some(file), deadline)?;
        match answer["fd"].as_i64() {
            Some(number) => Ok(number.to_string()),
            None => {
                Err(Error::failed(format!("QEMU accepted a file but did not report its number: {answer}")))
            }
        }
    }

    /// Passes an open file to QEMU, which can open the file again by the path that `use_it` gets. QEMU closes
    /// the file afterwards.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute), or `use_it` fails.
    pub fn with_path<T>(
        &self,
        file: BorrowedFd<'_>,
        deadline: Deadline,
        use_it: impl FnOnce(String) -> Result<T>,
    ) -> Result<T> {
        let answer =
            self.execute_with(&qmp::add_fd { fdset_id: None, opaque: None }, Some(file), deadline)?;
        let Some(fdset_id) = answer["fdset-id"].as_i64() else {
            return Err(Error::failed(format!("QEMU accepted a file but did not report its set: {answer}")));
        };
        let used = use_it(format!("/dev/fdset/{fdset_id}"));
        let removed = self.execute(&qmp::remove_fd { fdset_id, fd: None }, deadline);
        used.and_then(|used| removed.map(|_| used))
    }

    fn execute_with<C: Command>(
        &self,
        command: &C,
        file: Option<BorrowedFd<'_>>,
        deadline: Deadline,
    ) -> Result<Value> {
        self.batch().with(command)?.run(file, deadline)
    }

    /// Returns the channel for the answer to the command with that id.
    fn expect_answer(&self, id: u64, command: &str) -> Result<Receiver<Value>> {
        let (sender, answer) = mpsc::channel();
        let mut state = self.lock();
        if state.closed {
            return Err(ended(command, state.violation.as_deref()));
        }
        state.waiting.insert(id, sender);
        Ok(answer)
    }

    /// Sends one message: QEMU takes the file that comes with the bytes of its command.
    fn send(&self, line: &[u8], file: Option<BorrowedFd<'_>>) -> std::io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files: Vec<BorrowedFd<'_>> = file.into_iter().collect();
        if !files.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&files));
        }
        let sent = sendmsg(self.stream.as_fd(), &[IoSlice::new(line)], &mut ancillary, SendFlags::NOSIGNAL)?;
        if sent < line.len() {
            std::io::Write::write_all(&mut &self.stream, &line[sent..])?;
        }
        Ok(())
    }

    /// Reports whether the connection has closed: QEMU ends or has ended.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Returns the events from now on. The channel closes when QEMU ends. It has a limit: read it soon.
    pub fn listen(&self) -> Receiver<Event> {
        let (sender, events) = mpsc::sync_channel(MAX_WAITING_EVENTS);
        let mut state = self.lock();
        if !state.closed {
            state.listening.push(sender);
        }
        events
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// Commands that are sent together. QEMU runs one after the other, so a command that does not need an earlier
/// answer need not wait for one.
pub struct Batch<'a> {
    qmp: &'a Qmp,
    lines: Vec<u8>,
    answers: Vec<(&'static str, Receiver<Value>)>,
}

impl Batch<'_> {
    /// Adds a command.
    ///
    /// # Errors
    /// QEMU has ended.
    pub fn with<C: Command>(mut self, command: &C) -> Result<Self> {
        let id = self.qmp.next_id.fetch_add(1, Ordering::Relaxed);
        self.answers.push((C::NAME, self.qmp.expect_answer(id, C::NAME)?));
        let line = serde_json::to_vec(&Execute::new(command, Some(id)));
        self.lines.extend(line.map_err(|error| unsent(C::NAME, &error))?);
        self.lines.push(b'\n');
        Ok(self)
    }

    /// Adds the negotiation, which is the first command of a connection.
    ///
    /// # Errors
    /// As [`with`](Batch::with).
    pub fn negotiating(self) -> Result<Self> {
        self.with(&qmp::qmp_capabilities { enable: None })
    }

    /// Sends the commands, with a file for the first command that takes one. Waits for all answers, and returns
    /// the last one.
    ///
    /// # Errors
    /// QEMU refuses a command, ends, or takes too long.
    pub fn run(self, file: Option<BorrowedFd<'_>>, deadline: Deadline) -> Result<Value> {
        let name = self.answers.first().map_or("nothing", |(name, _)| name);
        self.qmp.send(&self.lines, file).map_err(|error| unsent(name, &error))?;
        let mut last = Value::Null;
        for (name, answer) in self.answers {
            last = match answer.recv_timeout(deadline.remaining()) {
                Ok(mut message) => match message.get("error") {
                    None => message["return"].take(),
                    Some(error) => return Err(refused(name, error)),
                },
                Err(RecvTimeoutError::Timeout) => {
                    return Err(deadline.timeout(&format!("QEMU to answer {name}")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(ended(name, self.qmp.lock().violation.as_deref()));
                }
            };
        }
        Ok(last)
    }
}

fn unsent(command: &str, error: &dyn std::error::Error) -> Error {
    Error::failed(format!("cannot send {command} to QEMU: {error}"))
}

fn ended(command: &str, violation: Option<&str>) -> Error {
    match violation {
        None => Error::failed(format!("QEMU ended before it answered {command}")),
        Some(why) => Error::failed(format!("QEMU was killed before it answered {command}: {why}")),
    }
}

fn refused(command: &str, error: &Value) -> Error {
    let reason = error["desc"].as_str().unwrap_or("without a reason");
    if error["class"] == "CommandNotFound" {
        return Error::unsupported(&format!("this (the installed QEMU has no {command})"));
    }
    Error::failed(format!("QEMU refused {command}: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::sync::Arc;

    type Reader = std::thread::JoinHandle<Result<Vec<String>, String>>;

    /// Creates a monitor whose QEMU is the test. The thread returns the names of the events.
    fn pair() -> (Arc<Qmp>, UnixStream, Reader) {
        let (stream, qemu) = UnixStream::pair().unwrap();
        let qmp = Arc::new(Qmp::new(stream));
        let reader = Arc::clone(&qmp);
        let events = std::thread::spawn(move || {
            let mut events = Vec::new();
            let read = reader.read(|event| {
                events.push(event.name.clone());
                Ok(())
            });
            read.map(|()| events)
        });
        (qmp, qemu, events)
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(5))
    }

    /// Plays QEMU: answers the next command with `answer`, in which `ID` is replaced.
    fn answers(qemu: UnixStream, answer: &'static str) -> std::thread::JoinHandle<UnixStream> {
        std::thread::spawn(move || {
            let mut line = String::new();
            BufReader::new(&qemu).read_line(&mut line).unwrap();
            let command: Value = serde_json::from_str(&line).unwrap();
            let answer = answer.replace("ID", &command["id"].to_string());
            (&qemu).write_all(answer.as_bytes()).unwrap();
            qemu
        })
    }

    #[test]
    fn unknown_events_and_values_are_read_when_qemu_is_newer() {
        let (qmp, mut qemu, read) = pair();
        let events = qmp.listen();
        qemu.write_all(
            b"{\"QMP\": {\"version\": {}}}\nnot json\n{\"event\": \"WARP_DRIVE\", \"data\": {\"x\": 1}}\n",
        )
        .unwrap();
        assert_eq!(wait(&events, soon(), "it", |event| event.data["x"].as_u64()).unwrap(), 1);
        let strange =
            "{\"return\": {}, \"id\": 99}\n{\"return\": {\"status\": \"levitating\"}, \"id\": ID}\n";
        let qemu = answers(qemu, strange);
        assert_eq!(qmp.execute(&qmp::query_status {}, soon()).unwrap()["status"], "levitating");
        drop(qemu.join().unwrap());
        assert_eq!(read.join().unwrap().unwrap(), ["WARP_DRIVE"]);
    }

    #[test]
    fn waiting_threads_fail_when_qemu_ends() {
        let (qmp, qemu, read) = pair();
        let events = qmp.listen();
        drop(qemu);
        read.join().unwrap().unwrap();
        assert!(qmp.execute(&qmp::quit {}, soon()).unwrap_err().to_string().contains("ended"));
        assert!(wait(&events, soon(), "running", |_| Some(())).unwrap_err().to_string().contains("running"));
        assert!(wait(&qmp.listen(), soon(), "running", |_| Some(())).is_err());
    }

    #[test]
    fn command_times_out_when_qemu_is_silent() {
        let (qmp, _qemu, _read) = pair();
        let error = qmp.execute(&qmp::cont {}, Deadline::after(Duration::from_millis(10))).unwrap_err();
        assert_eq!(error.kind(), machinery::ErrorKind::Timeout);
    }

    #[test]
    fn refusal_has_qemus_reason_and_the_command() {
        let (qmp, qemu, _read) = pair();
        let refusal = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no way\"}, \"id\": ID}\n";
        let qemu = answers(qemu, refusal);
        let text = qmp.execute(&qmp::cont {}, soon()).unwrap_err().to_string();
        assert!(text.contains("no way") && text.contains("cont"), "{text}");
        drop(qemu.join().unwrap());
    }

    #[test]
    fn monitor_is_given_up_with_the_reason_when_qemu_does_not_end_its_line() {
        let (qmp, mut qemu, read) = pair();
        let asked = Arc::clone(&qmp);
        let asking =
            std::thread::spawn(move || asked.execute(&qmp::cont {}, soon()).unwrap_err().to_string());
        // The reader hangs up in the middle of it.
        let _ = qemu.write_all(&vec![b'x'; lines::MAX_LINE + 1]);
        assert!(read.join().unwrap().unwrap_err().contains("4 MiB"));
        let text = asking.join().unwrap();
        assert!(text.contains("cont: its monitor sent more than 4 MiB"), "{text}");
    }

    #[test]
    fn event_is_refused_when_it_is_long() {
        let (_qmp, mut qemu, read) = pair();
        writeln!(qemu, "{{\"event\": \"X\", \"data\": \"{}\"}}", "x".repeat(MAX_EVENT)).unwrap();
        assert!(read.join().unwrap().unwrap_err().contains("event of more than 16 KiB"));
    }

    #[test]
    fn waiting_events_are_bounded_when_the_listener_reads_nothing() {
        let (qmp, mut qemu, read) = pair();
        let events = qmp.listen();
        qemu.write_all(&b"{\"event\": \"X\"}\n".repeat(MAX_WAITING_EVENTS * 10)).unwrap();
        drop(qemu);
        assert_eq!(read.join().unwrap().unwrap().len(), MAX_WAITING_EVENTS * 10);
        assert_eq!(events.iter().count(), MAX_WAITING_EVENTS);
    }
}
