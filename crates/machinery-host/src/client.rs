//! The blocking client of the host's socket, for the command line. Each command has a connection of its own.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use machinery::{Error, Result, SocketPath};
use serde_json::{Value, json};

/// A connection to a running host.
pub struct Client {
    writer: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the host that serves this socket.
    ///
    /// # Errors
    /// No host answers.
    pub fn connect(socket: &Path) -> Result<Self> {
        let failed = |error: std::io::Error| {
            Error::environment(format!("no machinery host answers on {}: {error}", socket.display()))
                .advice("Start one with `cuckoo-machinery serve`, or give the right CWD with --cwd")
        };
        let address = SocketPath::new(socket).map_err(failed)?;
        let writer = UnixStream::connect(address.address()).map_err(failed)?;
        let reader = BufReader::new(writer.try_clone().map_err(failed)?);
        Ok(Client { writer, reader })
    }

    /// Sends a request and waits for its reply. `on_event` gets the events that arrive before.
    ///
    /// # Errors
    /// The connection was lost, or the reply is not JSON.
    pub fn request(&mut self, mut request: Value, mut on_event: impl FnMut(&Value)) -> Result<Value> {
        let id = json!("request");
        request["id"] = id.clone();
        self.send(&request)?;
        loop {
            let message = self.next()?;
            // A rejected client gets a reply without an id.
            let is_rejection = message.get("id").is_none() && message.get("event").is_none();
            if is_rejection || message.get("id") == Some(&id) {
                return Ok(message);
            }
            on_event(&message);
        }
    }

    fn send(&mut self, request: &Value) -> Result<()> {
        let line = format!("{request}\n");
        self.writer.write_all(line.as_bytes()).map_err(|error| lost(&error.to_string()))
    }

    fn next(&mut self) -> Result<Value> {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => Err(lost("it closed the connection")),
            Ok(_) => serde_json::from_str(&line)
                .map_err(|error| Error::failed(format!("the host's answer is not JSON: {error}"))),
            Err(error) => Err(lost(&error.to_string())),
        }
    }
}

fn lost(why: &str) -> Error {
    Error::failed(format!("the connection to the machinery host was lost: {why}"))
        .advice("Look at the host's log")
}
