//! QEMU's monitor, over one end of a socket pair.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Read, Seek, SeekFrom};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use qapi::qmp;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::Result;
use crate::error::Error;

/// The maximum time of a single reply, also on a busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(120);

/// A connection to the monitor.
pub struct Monitor {
    qmp: qapi::Qmp<qapi::Stream<BufReader<UnixStream>, UnixStream>>,
    /// QEMU's standard error.
    errors: File,
}

impl Monitor {
    /// Waits for QEMU's greeting.
    pub fn connect(socket: UnixStream, errors: File) -> Result<Self> {
        let stream = stream(socket).map_err(|error| Error::new(format!("connecting to QEMU: {error}")))?;
        let mut monitor = Monitor { qmp: qapi::Qmp::new(stream), errors };
        monitor.greet()?;
        Ok(monitor)
    }

    fn greet(&mut self) -> Result<()> {
        // qapi expects a greeting; a QEMU that refuses its arguments sends none.
        let silent = self.qmp.inner_mut().fill_buf().is_ok_and(<[u8]>::is_empty);
        if silent {
            return Err(self.failed("starting QEMU", "it ended at once"));
        }
        self.qmp.handshake().map(drop).map_err(|error| self.failed("greeting QEMU", &error))
    }

    /// Runs a command.
    pub fn run<C: qapi::Command>(&mut self, command: &C) -> Result<C::Ok> {
        self.qmp.execute(command).map_err(|error| self.failed(C::NAME, &error))
    }

    /// Passes a file descriptor to QEMU, under this name.
    pub fn pass_descriptor(&mut self, name: &str, fd: OwnedFd) -> Result<()> {
        let command = qmp::getfd { fdname: name.to_owned() };
        let line = serde_json::json!({"execute": "getfd", "arguments": command}).to_string();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [fd.as_fd()];
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let socket = self.qmp.inner().get_ref_write();
        let bytes = [IoSlice::new(line.as_bytes())];
        sendmsg(socket, &bytes, &mut ancillary, SendFlags::empty())
            .map_err(|error| self.failed("getfd", &error))?;
        self.qmp.read_response::<qmp::getfd>().map(drop).map_err(|error| self.failed("getfd", &error))
    }

    /// Waits for an event. Events that QEMU has sent earlier count too, once.
    pub fn wait_for_event<T>(&mut self, find: impl Fn(&qmp::Event) -> Option<T>) -> Result<T> {
        let mut found = self.qmp.events().filter_map(|event| find(&event)).next_back();
        loop {
            match found {
                Some(found) => return Ok(found),
                None => found = self.event()?.as_ref().and_then(&find),
            }
        }
    }

    /// Returns the next event; `None` if this version of `qapi` does not know it.
    fn event(&mut self) -> Result<Option<qmp::Event>> {
        let mut line = String::new();
        let read = self.qmp.inner_mut().read_line(&mut line);
        match read {
            Ok(0) => Err(self.failed("waiting for an event", "QEMU ended")),
            Ok(_) => Ok(serde_json::from_str(&line).ok()),
            Err(error) => Err(self.failed("waiting for an event", &error)),
        }
    }

    /// Returns an error with QEMU's own output.
    pub fn failed(&self, doing: &str, why: &(impl std::fmt::Display + ?Sized)) -> Error {
        let mut output = String::new();
        let mut errors = &self.errors;
        let read = errors.seek(SeekFrom::Start(0)).and_then(|_| errors.read_to_string(&mut output));
        match (read, output.trim()) {
            (Ok(_), "") | (Err(_), _) => Error::new(format!("{doing}: {why}")),
            (Ok(_), output) => Error::new(format!("{doing}: {why}; QEMU printed: {output}")),
        }
    }
}

fn stream(socket: UnixStream) -> io::Result<qapi::Stream<BufReader<UnixStream>, UnixStream>> {
    socket.set_read_timeout(Some(TIMEOUT))?;
    Ok(qapi::Stream::new(BufReader::new(socket.try_clone()?), socket))
}
