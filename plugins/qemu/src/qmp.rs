//! The QEMU monitor: commands, answers, events.
//!
//! ```text
//! any thread:  execute ─▶ line out … waits for the answer with its id
//! watcher:     read ─▶ answer ─▶ whoever waits for that id
//!                   └▶ event  ─▶ the caller of `read`, then everyone who listens
//! ```
//!
//! Commands are the `qapi` crate's types. Answers and events are read as plain JSON, because a QEMU
//! newer than that crate's schema knows events and values that its types do not.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use machinery::{Deadline, Error, Result};
use qapi::qmp;
use qapi::{Command, Execute};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

/// How long QEMU may take to read a command.
const SENDING: Duration = Duration::from_secs(5);

/// An event of QEMU's.
#[derive(Debug, Clone)]
pub struct Event {
    pub name: String,
    pub data: Value,
}

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
    waiting: HashMap<u64, Sender<Value>>,
    listening: Vec<Sender<Event>>,
}

impl Qmp {
    /// A monitor behind that stream. Somebody has to [`read`](Qmp::read) it.
    pub fn new(stream: UnixStream) -> Self {
        // A QEMU that is stopped reads nothing, and its socket fills up in the end.
        if let Err(error) = stream.set_write_timeout(Some(SENDING)) {
            tracing::debug!(%error, "sending to QEMU has no time limit");
        }
        Qmp { stream, next_id: AtomicU64::new(1), state: Mutex::default() }
    }

    /// Reads until QEMU closes the connection; each event is also told to `heard`.
    pub fn read(&self, mut heard: impl FnMut(&Event)) {
        if let Ok(stream) = self.stream.try_clone() {
            let mut lines = BufReader::new(stream);
            let mut line = Vec::new();
            // Some ends are an end of file, some a reset: nothing more comes after either.
            while matches!(lines.read_until(b'\n', &mut line), Ok(length) if length > 0) {
                match serde_json::from_slice(&line) {
                    Ok(message) => self.dispatch(message, &mut heard),
                    Err(error) => tracing::warn!(%error, "QEMU's monitor says something that is no JSON"),
                }
                line.clear();
            }
        }
        let mut state = self.lock();
        state.closed = true;
        state.waiting.clear();
        state.listening.clear();
    }

    fn dispatch(&self, mut message: Value, heard: &mut impl FnMut(&Event)) {
        if let Some(name) = message["event"].as_str() {
            let event = Event { name: name.to_owned(), data: message["data"].take() };
            heard(&event);
            self.lock().listening.retain(|listener| listener.send(event.clone()).is_ok());
        } else if let Some(id) = message["id"].as_u64() {
            let waiting = self.lock().waiting.remove(&id);
            // Whoever asked may have given up.
            let _ = waiting.map(|waiting| waiting.send(message));
        }
    }

    /// Commands that are sent at once, and run one after the other.
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

    /// Gives QEMU an open file, and gets the name by which commands know it. `by_name` is false for
    /// a QEMU whose commands take only numbers.
    pub fn pass(&self, file: BorrowedFd<'_>, by_name: bool, deadline: Deadline) -> Result<String> {
        if by_name {
            let name = format!("file{}", self.next_id.load(Ordering::Relaxed));
            self.execute_with(&qmp::getfd { fdname: name.clone() }, Some(file), deadline)?;
            return Ok(name);
        }
        let answer =
            self.execute_with(&qmp::add_fd { fdset_id: None, opaque: None }, Some(file), deadline)?;
        match answer["fd"].as_i64() {
            Some(number) => Ok(number.to_string()),
            None => Err(Error::failed(format!("QEMU took a file and did not say its number: {answer}"))),
        }
    }

    /// Gives QEMU an open file that it can open again by the path that `use_it` gets. QEMU keeps no
    /// hold of it afterwards.
    pub fn with_path<T>(
        &self,
        file: BorrowedFd<'_>,
        deadline: Deadline,
        use_it: impl FnOnce(String) -> Result<T>,
    ) -> Result<T> {
        let answer =
            self.execute_with(&qmp::add_fd { fdset_id: None, opaque: None }, Some(file), deadline)?;
        let Some(fdset_id) = answer["fdset-id"].as_i64() else {
            return Err(Error::failed(format!("QEMU took a file and did not say its set: {answer}")));
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

    /// The channel on which the answer to the command with that number comes.
    fn expect_answer(&self, id: u64, command: &str) -> Result<Receiver<Value>> {
        let (sender, answer) = mpsc::channel();
        let mut state = self.lock();
        if state.closed {
            return Err(ended(command));
        }
        state.waiting.insert(id, sender);
        Ok(answer)
    }

    /// One message: QEMU takes the file that comes with the bytes of its command.
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

    /// Whether nothing more will come: QEMU ends or has ended.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Events from now on. The end of the receiver is the end of QEMU.
    pub fn listen(&self) -> Receiver<Event> {
        let (sender, events) = mpsc::channel();
        let mut state = self.lock();
        if !state.closed {
            state.listening.push(sender);
        }
        events
    }

    /// State is whole after each statement that holds the lock, so poison means nothing.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Commands on their way to QEMU. It reads one after the other, so what does not need an earlier one's
/// answer need not wait for it.
pub struct Batch<'a> {
    qmp: &'a Qmp,
    lines: Vec<u8>,
    answers: Vec<(&'static str, Receiver<Value>)>,
}

impl Batch<'_> {
    /// One more.
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

    /// Negotiates, which has to come first on a connection.
    ///
    /// # Errors
    /// As [`with`](Batch::with).
    pub fn negotiating(self) -> Result<Self> {
        self.with(&qmp::qmp_capabilities { enable: None })
    }

    /// Sends them, with a file for the first that takes one, and waits for all answers; gives the last.
    ///
    /// # Errors
    /// QEMU refuses one, ends, or takes too long.
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
                Err(RecvTimeoutError::Disconnected) => return Err(ended(name)),
            };
        }
        Ok(last)
    }
}

fn unsent(command: &str, error: &dyn std::error::Error) -> Error {
    Error::failed(format!("cannot send {command} to QEMU: {error}"))
}

/// Waits for the first event of which `pick` makes something.
///
/// # Errors
/// QEMU ends before, or it takes too long; `what` says what was waited for.
pub fn wait<T>(
    events: &Receiver<Event>,
    deadline: Deadline,
    what: &str,
    pick: impl Fn(&Event) -> Option<T>,
) -> Result<T> {
    wait_with_progress(events, deadline, what, || (), pick)
}

/// How often it is told how far something is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// The same; meanwhile `tell` is called now and then.
///
/// # Errors
/// As [`wait`].
pub fn wait_with_progress<T>(
    events: &Receiver<Event>,
    deadline: Deadline,
    what: &str,
    tell: impl Fn(),
    pick: impl Fn(&Event) -> Option<T>,
) -> Result<T> {
    loop {
        match events.recv_timeout(PROGRESS_INTERVAL.min(deadline.remaining())) {
            Ok(event) => {
                if let Some(picked) = pick(&event) {
                    return Ok(picked);
                }
            }
            Err(RecvTimeoutError::Timeout) if deadline.remaining().is_zero() => {
                return Err(deadline.timeout(what));
            }
            Err(RecvTimeoutError::Timeout) => tell(),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::failed(format!("QEMU ended while waiting for {what}")));
            }
        }
    }
}

fn ended(command: &str) -> Error {
    Error::failed(format!("QEMU ended before it answered {command}"))
}

fn refused(command: &str, error: &Value) -> Error {
    let said = error["desc"].as_str().unwrap_or("without a reason");
    let text = format!("QEMU refused {command}: {said}");
    if error["class"] == "CommandNotFound" {
        return Error::unsupported(&format!("this (the installed QEMU has no {command})"));
    }
    Error::failed(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Arc;

    /// A monitor whose other end is played by the test.
    fn pair() -> (Arc<Qmp>, UnixStream, std::thread::JoinHandle<Vec<String>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let qmp = Arc::new(Qmp::new(ours));
        let reader = Arc::clone(&qmp);
        let heard = std::thread::spawn(move || {
            let mut heard = Vec::new();
            reader.read(|event| heard.push(event.name.clone()));
            heard
        });
        (qmp, theirs, heard)
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
    fn a_newer_qemu_is_understood() {
        let (qmp, mut qemu, heard) = pair();
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
        assert_eq!(heard.join().unwrap(), ["WARP_DRIVE"]);
    }

    #[test]
    fn an_end_is_told_to_all_who_wait() {
        let (qmp, qemu, heard) = pair();
        let events = qmp.listen();
        drop(qemu);
        heard.join().unwrap();
        assert!(qmp.execute(&qmp::quit {}, soon()).unwrap_err().to_string().contains("ended"));
        assert!(wait(&events, soon(), "running", |_| Some(())).unwrap_err().to_string().contains("running"));
        assert!(wait(&qmp.listen(), soon(), "running", |_| Some(())).is_err());
    }

    #[test]
    fn silence_is_a_timeout() {
        let (qmp, _qemu, _heard) = pair();
        let error = qmp.execute(&qmp::cont {}, Deadline::after(Duration::from_millis(10))).unwrap_err();
        assert_eq!(error.kind(), machinery::ErrorKind::Timeout);
    }

    #[test]
    fn a_refusal_is_told_in_qemus_words() {
        let (qmp, qemu, _heard) = pair();
        let refusal = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no way\"}, \"id\": ID}\n";
        let qemu = answers(qemu, refusal);
        let text = qmp.execute(&qmp::cont {}, soon()).unwrap_err().to_string();
        assert!(text.contains("no way") && text.contains("cont"), "{text}");
        drop(qemu.join().unwrap());
    }
}
