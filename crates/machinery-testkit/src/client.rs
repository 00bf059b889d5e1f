//! A client of the host's socket that can also misbehave: it sends arbitrary bytes, and every wait has a
//! timeout.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, ErrorKind, IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use machinery::SocketPath;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::Result;
use crate::error::{Context, Error};

/// The maximum time of an answer or an event.
const PATIENCE: Duration = Duration::from_secs(30);

/// Raises this process's limit of open files; a connection has two descriptors here.
pub fn raise_file_limit() -> Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).context(|| "raising the limit of open files".to_owned())
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    /// Messages that arrived while [`ask`](Client::ask) waited for an answer.
    waiting: VecDeque<Value>,
    asked: u64,
}

impl Client {
    /// Connects to the host behind that socket.
    pub fn connect(socket: &Path) -> Result<Self> {
        let what = || format!("connecting to {}", socket.display());
        let path = SocketPath::new(socket).context(what)?;
        let stream = UnixStream::connect(path.address()).context(what)?;
        stream.set_read_timeout(Some(PATIENCE)).context(what)?;
        stream.set_write_timeout(Some(PATIENCE)).context(what)?;
        let reader = BufReader::new(stream.try_clone().context(what)?);
        Ok(Client { stream, reader, waiting: VecDeque::new(), asked: 0 })
    }

    /// Sends a request unchanged.
    pub fn send(&mut self, request: &Value) -> Result<()> {
        self.send_line(request.to_string().as_bytes())
    }

    /// Sends a line of arbitrary bytes.
    pub fn send_line(&mut self, line: &[u8]) -> Result<()> {
        self.send_bytes(&[line, b"\n"].concat())
    }

    /// Sends arbitrary bytes.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context(|| "sending to the host".to_owned())
    }

    /// Sends arbitrary bytes in one message, with these descriptors.
    pub fn send_with(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(Error::new("too many descriptors"));
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
            .context(|| "passing descriptors to the host".to_owned())?;
        self.send_bytes(&bytes[sent..])
    }

    /// Sends a request with an `id` and a descriptor, and waits for its answer, as [`ask`](Client::ask) does.
    pub fn ask_with(&mut self, request: Value, descriptor: impl AsFd) -> Result<Value> {
        let (id, line) = self.with_id(request);
        self.send_with(&line, &[descriptor.as_fd()])?;
        self.answer(&id)
    }

    /// Sends bytes until the host reads no more of them for a second, or has closed the connection.
    pub fn flood(&mut self, bytes: &[u8]) -> Result<()> {
        let set = self.stream.set_write_timeout(Some(Duration::from_secs(1)));
        set.context(|| "limiting the time to send".to_owned())?;
        // A failure is the end of the flood.
        let _ = self.stream.write_all(bytes);
        Ok(())
    }

    /// Shuts down the write side; answers still arrive.
    pub fn shutdown_write(&mut self) -> Result<()> {
        self.stream.shutdown(Shutdown::Write).context(|| "ending to send".to_owned())
    }

    /// Returns the next message, an answer or an event.
    pub fn next_message(&mut self) -> Result<Value> {
        match self.waiting.pop_front() {
            Some(message) => Ok(message),
            None => self.receive(),
        }
    }

    /// Sends a request with an `id`, waits for its answer, and returns the answer without the id.
    /// [`next_message`](Client::next_message) returns other messages later.
    pub fn ask(&mut self, request: Value) -> Result<Value> {
        let (id, line) = self.with_id(request);
        self.send_bytes(&line)?;
        self.answer(&id)
    }

    /// Returns a new `id`, and the line of the request with it.
    fn with_id(&mut self, mut request: Value) -> (Value, Vec<u8>) {
        self.asked += 1;
        let id = json!(format!("asked-{}", self.asked));
        request["id"] = id.clone();
        (id, format!("{request}\n").into_bytes())
    }

    fn answer(&mut self, id: &Value) -> Result<Value> {
        loop {
            let mut message = self.receive()?;
            if message.get("id") == Some(id) {
                if let Some(object) = message.as_object_mut() {
                    object.remove("id");
                }
                return Ok(message);
            }
            self.waiting.push_back(message);
        }
    }

    /// Requests an action on a machine.
    pub fn act(&mut self, action: &str, machine: &str) -> Result<Value> {
        self.ask(json!({"action": action, "machine": machine}))
    }

    /// Requests an action on a machine, and expects its success.
    ///
    /// # Panics
    /// The action fails, or has no answer.
    #[track_caller]
    #[allow(clippy::panic)] // The test has to fail.
    pub fn perform(&mut self, action: &str, machine: &str) {
        match self.act(action, machine) {
            Ok(answer) if answer == json!({"success": true}) => {}
            other => panic!("{action} of {machine}: {other:?}"),
        }
    }

    /// Subscribes to events.
    pub fn subscribe(&mut self) -> Result<()> {
        let answer = self.ask(json!({"action": "subscribe"}))?;
        if answer["success"] == true { Ok(()) } else { Err(Error::new(format!("no events: {answer}"))) }
    }

    /// Waits for the event of that machine's state, and returns its reason.
    pub fn wait_for_state(&mut self, machine: &str, state: &str) -> Result<String> {
        loop {
            let event = self.next_message()?;
            if event["event"] == "state" && event["machine"] == machine && event["state"] == state {
                return Ok(event["reason"].as_str().unwrap_or_default().to_owned());
            }
        }
    }

    /// Waits for an event of that kind and machine, and returns it.
    pub fn wait_for_event(&mut self, event: &str, machine: &str) -> Result<Value> {
        loop {
            let heard = self.next_message()?;
            if heard["event"] == event && heard["machine"] == machine {
                return Ok(heard);
            }
        }
    }

    /// Returns the entry of one machine in `list`.
    pub fn machine(&mut self, name: &str) -> Result<Value> {
        let mut list = self.ask(json!({"action": "list"}))?;
        let machines = list["machines"].as_array_mut().into_iter().flatten();
        let machine = machines.map(Value::take).find(|machine| machine["name"] == name);
        machine.ok_or_else(|| Error::new(format!("the list has no machine '{name}'")))
    }

    /// Waits for the host to close the connection. Returns false if a message arrives, or the wait times out.
    pub fn wait_for_close(&mut self) -> bool {
        if !self.waiting.is_empty() {
            return false;
        }
        match self.reader.fill_buf() {
            Ok(bytes) => bytes.is_empty(),
            // The host had not read all bytes.
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }

    /// Reports whether a message, or the end of the connection, can be read without waiting.
    pub fn has_message(&self) -> Result<bool> {
        if !self.waiting.is_empty() || !self.reader.buffer().is_empty() {
            return Ok(true);
        }
        let now = Timespec::default();
        let ready = retry_on_intr(|| poll(&mut [PollFd::new(&self.stream, PollFlags::IN)], Some(&now)));
        Ok(ready.context(|| "looking for a message".to_owned())? > 0)
    }

    /// Waits as [`wait_for_close`](Client::wait_for_close) does, after a refusal. A host that serves the connection
    /// nevertheless answers one more request, so that the test fails at once.
    pub fn wait_for_close_after_refusal(&mut self) -> bool {
        // A closed connection takes no request.
        let _ = self.send(&json!({"action": "version"}));
        self.wait_for_close()
    }

    /// Returns the next line, without its line feed.
    pub fn next_line(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = match self.reader.read_line(&mut line) {
            Ok(0) => Err(io::Error::from(ErrorKind::UnexpectedEof)),
            other => other,
        };
        read.context(|| "waiting for the host's next line".to_owned())?;
        Ok(line.trim_end_matches('\n').to_owned())
    }

    fn receive(&mut self) -> Result<Value> {
        let line = self.next_line()?;
        serde_json::from_str(&line).context(|| format!("reading the host's line {line:?}"))
    }
}
