//! The blocking client of the host's socket, for the command line. Each command has a connection of its own.

use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use machinery::{Error, Result, SocketPath};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

/// A connection to a running host.
pub struct Client {
    requests: Requests,
    messages: Messages,
}

/// The sending half of a connection.
pub struct Requests(UnixStream);

/// The receiving half of a connection.
pub struct Messages(BufReader<UnixStream>);

impl Client {
    /// Connects to the host that serves this socket.
    ///
    /// # Errors
    /// No host answers.
    pub fn connect(socket: &Path) -> Result<Self> {
        open(socket).map_err(|error| no_answer(socket, &error))
    }

    /// Connects to the host that serves this socket. Returns `None` if nobody listens on it.
    ///
    /// # Errors
    /// The socket cannot be used, so that a host may serve it.
    pub fn find(socket: &Path) -> Result<Option<Self>> {
        match open(socket) {
            Ok(client) => Ok(Some(client)),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                Ok(None)
            }
            Err(error) => Err(no_answer(socket, &error)),
        }
    }

    /// Splits the connection, so that one thread receives while another one sends.
    pub fn split(self) -> (Requests, Messages) {
        (self.requests, self.messages)
    }

    /// Sends a request and waits for its reply. `on_event` gets the events that arrive before.
    ///
    /// # Errors
    /// The connection was lost, or the reply is not JSON.
    pub fn request(&mut self, request: Value, on_event: impl FnMut(&Value)) -> Result<Value> {
        self.request_with(request, None, on_event)
    }

    /// Sends a request as [`request`](Client::request) does, and passes the file with it.
    ///
    /// # Errors
    /// As [`request`](Client::request).
    pub fn request_with(
        &mut self,
        mut request: Value,
        file: Option<&File>,
        mut on_event: impl FnMut(&Value),
    ) -> Result<Value> {
        let id = json!("request");
        request["id"] = id.clone();
        self.requests.send(&request, file)?;
        loop {
            let message = self.messages.receive()?;
            // A rejected client gets a reply without an id.
            let is_rejection = message.get("id").is_none() && message.get("event").is_none();
            if is_rejection || message.get("id") == Some(&id) {
                return Ok(message);
            }
            on_event(&message);
        }
    }

    /// Waits until the host closes the connection.
    pub fn wait_for_close(&mut self) {
        while self.messages.receive().is_ok() {}
    }
}

impl Requests {
    /// Sends a request, and passes the file with it.
    ///
    /// # Errors
    /// The connection was lost.
    pub fn send(&mut self, request: &Value, file: Option<&File>) -> Result<()> {
        let line = format!("{request}\n");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        if !files.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&files));
        }
        let sent = sendmsg(&self.0, &[IoSlice::new(line.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL)
            .map_err(|error| lost(&error.to_string()))?;
        self.0.write_all(&line.as_bytes()[sent..]).map_err(|error| lost(&error.to_string()))
    }
}

impl Messages {
    /// Waits for the next message, a reply or an event.
    ///
    /// # Errors
    /// The connection was lost, or the message is not JSON.
    pub fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => Err(lost("it closed the connection")),
            Ok(_) => serde_json::from_str(&line)
                .map_err(|error| Error::failed(format!("the host's answer is not JSON: {error}"))),
            Err(error) => Err(lost(&error.to_string())),
        }
    }
}

fn open(socket: &Path) -> io::Result<Client> {
    let writer = UnixStream::connect(SocketPath::new(socket)?.address())?;
    let reader = BufReader::new(writer.try_clone()?);
    Ok(Client { requests: Requests(writer), messages: Messages(reader) })
}

fn no_answer(socket: &Path, error: &io::Error) -> Error {
    if error.kind() == ErrorKind::PermissionDenied {
        return Error::environment(format!("this user may not use {}", socket.display())).advice(
            "Run as root or as the host's user, or join the group that `socket_group` names in machinery-host.yaml",
        );
    }
    Error::environment(format!("no machinery host answers on {}: {error}", socket.display()))
        .advice("Start one with `cuckoo-machinery serve`, or give the right CWD with --cwd")
}

fn lost(why: &str) -> Error {
    Error::failed(format!("the connection to the machinery host was lost: {why}"))
        .advice("Look at the host's log")
}
