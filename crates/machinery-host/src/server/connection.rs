//! One client's connection.
//!
//! ```text
//! reader ─▶ line ─▶ request ─▶ dispatch ─▶ outbox ─▶ writer
//!                                  └─▶ subscription: forwards events to the outbox
//! ```
//!
//! A connection ends when the client closes it or sends a line that Cuckoo3 closes after, when the client does
//! not read, or when the host ends. Requests of a client that has left are finished nevertheless.

use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::dispatch::Dispatcher;
use super::framing::{self, Line};
use super::limits::ConnectionPermit;
use super::outbox::{self, Outbox};
use super::peers::Peer;
use super::protocol::{self, Refusal, Sender};
use super::receive::Receiver;
use super::reply;
use crate::client_file::{DescriptorBudget, PassedFile};
use crate::manager::Manager;

/// The pause between two checks whether a client that is done sending still waits for its replies.
const HANGUP_INTERVAL: Duration = Duration::from_secs(2);

/// Serves the client until it leaves, its connection is closed, or the host ends. The permit is held until the
/// last reply is written.
pub async fn serve(
    stream: UnixStream,
    manager: Arc<Manager>,
    permit: ConnectionPermit,
    peer: Peer,
    descriptors: Arc<DescriptorBudget>,
) {
    let (reader, writer) = stream.into_split();
    let mut reader = BufReader::new(Receiver::new(reader, peer.uid, descriptors));
    let (outbox, outbound) = Outbox::new(permit.budget());
    let mut writing = tokio::spawn(outbox::write(writer, outbound, permit));
    let mut ended = manager.ended().subscribe();
    let hangup = watch::Sender::new(false);
    let dispatcher = Dispatcher::new(Arc::clone(&manager), outbox.clone(), hangup.clone());
    let mut connection = Connection { manager, outbox, dispatcher, peer };
    tokio::select! {
        () = connection.read(&mut reader) => {}
        // The host ends: replies that are made are still written.
        _ = ended.wait_for(|ended| *ended) => {}
        _ = &mut writing => return,
    }
    // A client that is done sending may still read. Its replies are written, events are not.
    drop(connection);
    tokio::select! {
        // Ends early only by a panic, which is in the log.
        _ = &mut writing => return,
        () = wait_for_hangup(reader.get_ref().stream()) => hangup.send_replace(true),
    };
    let _ = writing.await;
}

/// Waits until a client that is done sending has closed its end. The runtime cannot distinguish the two, so this
/// asks the kernel now and then, and only while a reply is due.
async fn wait_for_hangup(stream: &UnixStream) {
    let is_connected = || {
        let mut client = [PollFd::new(stream, PollFlags::empty())];
        poll(&mut client, Some(&Timespec::default())).is_err()
            || !client[0].revents().contains(PollFlags::HUP)
    };
    while is_connected() {
        tokio::time::sleep(HANGUP_INTERVAL).await;
    }
}

struct Connection {
    manager: Arc<Manager>,
    outbox: Outbox,
    dispatcher: Dispatcher,
    peer: Peer,
}

impl Connection {
    /// Reads and handles lines until the connection is to be closed.
    async fn read(&mut self, reader: &mut BufReader<Receiver>) {
        loop {
            let handled = match framing::next(reader, self.outbox.budget()).await {
                Ok(Line::Whole(line)) => self.handle(line, reader.get_mut()).await,
                Ok(Line::TooLong) => {
                    let reason = format!("a line may have {} bytes at most", framing::MAX_LINE);
                    return self.outbox.reply_and_close(reply::failure(&reason), None).await;
                }
                Ok(Line::End) => return,
                Err(error) => {
                    tracing::debug!(%error, "a connection has ended");
                    return;
                }
            };
            if reader.buffer().is_empty() {
                // A descriptor arrives no later than the last byte of its request.
                reader.get_mut().close_descriptors();
            }
            if let Err(Closed) = handled {
                return;
            }
        }
    }

    async fn handle(&mut self, line: Vec<u8>, receiver: &mut Receiver) -> Result<(), Closed> {
        let (length, object) = (line.len(), protocol::object(&line));
        // Only what the protocol accepts is kept while the reply waits: a client that does not read may send much.
        drop(line);
        let object = match object {
            Ok(object) => object,
            Err(refusal) => {
                // One of them may belong to this line.
                receiver.close_descriptors();
                return self.refuse(refusal, None).await;
            }
        };
        let file = passed_file(&object, receiver).await;
        let id = match protocol::id(&object) {
            Ok(id) => id,
            Err(refusal) => return self.refuse(refusal, None).await,
        };
        let file = match file {
            Ok(file) => file,
            Err(refusal) => return self.refuse(refusal, id).await,
        };
        let (enabled, manager) = (self.manager.is_enabled(), &self.manager);
        let sender = Sender { peer: self.peer, file, storage: manager.storage() };
        let request = protocol::request(&object, enabled, &sender, |name| manager.find(name));
        drop(object);
        match request {
            Ok(request) => {
                self.dispatcher.dispatch(request, id, length).await;
                Ok(())
            }
            Err(refusal) => self.refuse(refusal, id).await,
        }
    }

    async fn refuse(&self, refusal: Refusal, id: Option<serde_json::Value>) -> Result<(), Closed> {
        let reply = reply::failure(&refusal.reason);
        if refusal.close {
            self.outbox.reply_and_close(reply, id).await;
            return Err(Closed);
        }
        self.outbox.reply(reply, id).await;
        Ok(())
    }
}

/// Takes the descriptor of the request, if it has one, and checks it.
async fn passed_file(
    object: &serde_json::Map<String, serde_json::Value>,
    receiver: &mut Receiver,
) -> Result<Option<PassedFile>, Refusal> {
    let has_descriptor = protocol::has_descriptor(object).inspect_err(|_| receiver.close_descriptors())?;
    if !has_descriptor {
        return Ok(None);
    }
    let missing = || Refusal::open("'fd' is true, and no descriptor was passed with the request");
    let descriptor = receiver.take_descriptor().ok_or_else(missing)?;
    descriptor.checked().await.map(Some).map_err(Refusal::open)
}

/// The host has closed the connection, as Cuckoo3 does after some requests.
struct Closed;
