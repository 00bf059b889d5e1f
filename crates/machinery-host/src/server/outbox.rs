//! The lines on their way to one client.
//!
//! Every line needs a share of its connection's budget, which is taken before the line is made and returned when it is
//! written: see [`limits`](super::limits). While a client does not read, its budget runs out: nothing more is read from
//! it, and no event is made for it. Nobody else waits for it: a reply only enters a queue.

use std::time::Duration;

use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::time::timeout;

use super::limits::{ClientBudget, ConnectionPermit, MemoryShare};
use super::reply;
use crate::events::Event;

/// The memory of a request and a short reply besides the request's own text, in bytes.
const SHORT: usize = 512;
/// The memory of a reply that may describe one machine, with its latest errors, in bytes.
pub const MACHINE: usize = 16 * 1024;
/// A client that reads nothing for this long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// A line on its way to the client, with its share of the budget.
pub struct OutboundLine {
    /// An empty line closes the connection.
    line: Vec<u8>,
    _share: MemoryShare,
}

/// Where replies and events for one client enter.
#[derive(Clone)]
pub struct Outbox {
    lines: UnboundedSender<OutboundLine>,
    budget: ClientBudget,
}

impl Outbox {
    /// Returns an outbox, and the lines to write.
    pub fn new(budget: ClientBudget) -> (Outbox, UnboundedReceiver<OutboundLine>) {
        let (lines, outbound) = mpsc::unbounded_channel();
        (Outbox { lines, budget }, outbound)
    }

    /// Sends a reply.
    pub async fn reply(&self, reply: Value, id: Option<Value>) {
        self.slot(0).await.fill(reply, id.as_ref());
    }

    /// Sends a reply and closes the connection.
    pub async fn reply_and_close(&self, reply: Value, id: Option<Value>) {
        self.reply(reply, id).await;
        self.slot(0).await.send(Vec::new());
    }

    /// Sends a reply once it is there, without delaying the requests that follow.
    pub async fn reply_later(&self, id: Option<Value>, reply: impl Future<Output = Value> + Send + 'static) {
        let slot = self.slot(MACHINE).await;
        tokio::spawn(async move { slot.fill(reply.await, id.as_ref()) });
    }

    /// Waits for a slot of a request that holds `bytes`, or of a reply that has about as many.
    pub async fn slot(&self, bytes: usize) -> ReplySlot {
        let share = self.budget.share(bytes.saturating_add(SHORT)).await;
        ReplySlot { lines: self.lines.clone(), share }
    }

    /// Waits for a slot of a reply that is long, and has about that many bytes.
    pub async fn large_slot(&self, bytes: usize) -> ReplySlot {
        ReplySlot { lines: self.lines.clone(), share: self.budget.large_share(bytes).await }
    }

    /// Returns the budget of the connection.
    pub fn budget(&self) -> &ClientBudget {
        &self.budget
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
                let line = reply::line(line, None);
                self.slot(line.len()).await.send(line);
            }
        }
    }
}

/// A slot for one line to the client.
pub struct ReplySlot {
    lines: UnboundedSender<OutboundLine>,
    share: MemoryShare,
}

impl ReplySlot {
    /// Sends the reply, with the request's `id` if it had one.
    pub fn fill(self, reply: Value, id: Option<&Value>) {
        self.send(reply::line(reply, id));
    }

    /// Sends a line.
    pub fn send(mut self, line: Vec<u8>) {
        self.share.resize(line.len());
        // The client may have left.
        let _ = self.lines.send(OutboundLine { line, _share: self.share });
    }
}

/// Writes lines to the client until the connection is closed. The permit is held until then.
pub async fn write(
    mut writer: OwnedWriteHalf,
    mut outbound: UnboundedReceiver<OutboundLine>,
    permit: ConnectionPermit,
) {
    let why = tokio::select! {
        why = write_lines(&mut writer, &mut outbound) => why,
        () = permit.closed() => Some("a client does not read its replies, and the memory for its user is used up"),
    };
    if let Some(why) = why {
        tracing::warn!("{why}: its connection is closed");
    }
}

/// Writes lines to the client; returns the reason for closing the connection, if it is one for the log.
async fn write_lines(
    writer: &mut OwnedWriteHalf,
    outbound: &mut UnboundedReceiver<OutboundLine>,
) -> Option<&'static str> {
    while let Some(OutboundLine { line, _share }) = outbound.recv().await {
        if line.is_empty() {
            return None;
        }
        match timeout(WRITE_TIMEOUT, writer.write_all(&line)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return None,
            Err(_) => return Some("a client reads nothing"),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::task::yield_now;

    /// More than a third of a connection's budget, of which no share is larger than the half.
    const LONG: usize = 3 << 20;

    fn long_event() -> Event {
        Event::Disabled { machine: "m".into(), reason: "x".repeat(LONG) }
    }

    /// Returns the lines that have been made, after all tasks had their turn.
    async fn made(outbound: &mut UnboundedReceiver<OutboundLine>) -> Vec<OutboundLine> {
        for _ in 0..10_000 {
            yield_now().await;
        }
        std::iter::from_fn(|| outbound.try_recv().ok()).collect()
    }

    #[tokio::test]
    async fn events_wait_for_the_budget_when_the_client_reads_nothing() {
        let (outbox, mut outbound) = Outbox::new(ClientBudget::default());
        let (events, subscribed) = broadcast::channel(16);
        let forwarding = tokio::spawn(outbox.forward(subscribed));
        for _ in 0..5 {
            events.send(long_event()).unwrap();
        }
        let unread = made(&mut outbound).await;
        assert_eq!(unread.len(), 2);
        assert!(made(&mut outbound).await.is_empty(), "an event has no share of the budget");
        // The client reads.
        drop(unread);
        assert_eq!(made(&mut outbound).await.len(), 2);
        assert_eq!(made(&mut outbound).await.len(), 1);
        forwarding.abort();
    }

    #[tokio::test]
    async fn replies_wait_for_the_budget_when_the_client_reads_nothing() {
        let (outbox, mut outbound) = Outbox::new(ClientBudget::default());
        let replying = tokio::spawn(async move {
            for _ in 0..1000 {
                outbox.reply_later(None, async { Value::Null }).await;
            }
        });
        let unread = made(&mut outbound).await;
        assert_eq!(unread.len(), (8 << 20) / (MACHINE + SHORT));
        drop(unread);
        assert_eq!(made(&mut outbound).await.len(), (8 << 20) / (MACHINE + SHORT));
        assert!(made(&mut outbound).await.len() < 100);
        replying.await.unwrap();
    }
}
