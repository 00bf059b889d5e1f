//! The lines on their way to one client.
//!
//! Every line needs a share of a fixed budget, which is taken before the line is made and returned when it is
//! written. While a client does not read, its budget runs out: nothing more is read from it, and no event is
//! made for it. So its cost is bounded, and nobody else waits for it: a reply only enters a queue.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast};
use tokio::time::timeout;

use super::limits::ConnectionPermit;
use super::reply;
use crate::events::Event;

/// The budget of one client: requests under way, and lines that wait to be written.
const MAX_LINES: u32 = 16_384;
/// The share of a reply about all machines, which can be long.
pub const LARGE_SHARE: u32 = MAX_LINES / 4;
/// The share of a reply that may describe one machine, with its latest errors.
const MEDIUM_SHARE: u32 = 32;
/// A client that reads nothing for this long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// A line on its way to the client, with its share of the budget.
pub struct OutboundLine {
    /// An empty line closes the connection.
    line: Vec<u8>,
    _share: OwnedSemaphorePermit,
}

/// Where replies and events for one client enter.
#[derive(Clone)]
pub struct Outbox {
    lines: UnboundedSender<OutboundLine>,
    budget: Arc<Semaphore>,
}

impl Outbox {
    /// Returns an outbox, and the lines to write.
    pub fn new() -> (Outbox, UnboundedReceiver<OutboundLine>) {
        let (lines, outbound) = mpsc::unbounded_channel();
        (Outbox { lines, budget: Arc::new(Semaphore::new(MAX_LINES as usize)) }, outbound)
    }

    /// Sends a reply.
    pub async fn reply(&self, reply: Value, id: Option<Value>) {
        self.slot(1).await.fill(reply, id.as_ref());
    }

    /// Sends a reply and closes the connection.
    pub async fn reply_and_close(&self, reply: Value, id: Option<Value>) {
        self.reply(reply, id).await;
        self.slot(1).await.send(Vec::new());
    }

    /// Sends a reply once it is there, without delaying the requests that follow.
    pub async fn reply_later(&self, id: Option<Value>, reply: impl Future<Output = Value> + Send + 'static) {
        let slot = self.slot(MEDIUM_SHARE).await;
        tokio::spawn(async move { slot.fill(reply.await, id.as_ref()) });
    }

    /// Waits for a slot with this share of the budget.
    pub async fn slot(&self, share: u32) -> ReplySlot {
        let share = Arc::clone(&self.budget).acquire_many_owned(share).await;
        ReplySlot { lines: self.lines.clone(), share: share.ok() }
    }

    /// Forwards events until it is aborted, with its connection.
    pub async fn forward(self, mut events: broadcast::Receiver<Event>) {
        loop {
            let lines = match events.recv().await {
                Ok(event) => vec![reply::event(&event)],
                Err(RecvError::Lagged(count)) => reply::lagged(count).to_vec(),
                Err(RecvError::Closed) => return,
            };
            for line in lines {
                self.slot(1).await.fill(line, None);
            }
        }
    }
}

/// A slot for one line to the client.
pub struct ReplySlot {
    lines: UnboundedSender<OutboundLine>,
    /// None only while the connection is closed.
    share: Option<OwnedSemaphorePermit>,
}

impl ReplySlot {
    /// Sends the reply, with the request's `id` if it had one.
    pub fn fill(self, reply: Value, id: Option<&Value>) {
        self.send(reply::line(reply, id));
    }

    fn send(self, line: Vec<u8>) {
        if let Some(share) = self.share {
            // The client may have left.
            let _ = self.lines.send(OutboundLine { line, _share: share });
        }
    }
}

/// Writes lines to the client until the connection is closed. The permit is held until then.
pub async fn write(
    mut writer: OwnedWriteHalf,
    mut outbound: UnboundedReceiver<OutboundLine>,
    _permit: ConnectionPermit,
) {
    while let Some(OutboundLine { line, _share }) = outbound.recv().await {
        if line.is_empty() {
            return;
        }
        match timeout(WRITE_TIMEOUT, writer.write_all(&line)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            Err(_) => {
                tracing::warn!("a client reads nothing: its connection is closed");
                return;
            }
        }
    }
}
