//! The messages in a worker's queue: requests for actions, and pauses.
//!
//! ```text
//! request ─▶ waits ─▶ runs ─▶ its responder gets the result
//! pause   ─▶ waits ─▶ reached: the machine is idle ─▶ resumed: the worker goes on
//!                                                └──▶ retired: the worker ends with its machine
//! ```

use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::{Action, ActionResult, CLOSING};

/// The time that a restore waits for a preparation under way. A preparation takes longer only where it reads
/// all of a large snapshot, or where something hangs.
const MAX_RESTORE_DELAY: Duration = Duration::from_secs(30);

/// A message to a worker.
pub enum Message {
    /// Run an action.
    Request(Request),
    /// Pause.
    Pause(Pause),
}

impl Message {
    /// Reports whether the message makes a preparation useless.
    pub fn cancels_preparation(&self) -> bool {
        match self {
            Message::Request(request) => {
                matches!(request.action, Action::Stop | Action::StopOwn | Action::NorestoreStart)
            }
            Message::Pause(_) => true,
        }
    }

    /// Returns the time from which the message makes a preparation under way useless, if ever.
    pub fn cancels_preparation_from(&self) -> Option<Instant> {
        match self {
            Message::Request(Request { action: Action::RestoreStart, .. }) => {
                Some(Instant::now() + MAX_RESTORE_DELAY)
            }
            _ => self.cancels_preparation().then(Instant::now),
        }
    }
}

/// A request for an action.
pub struct Request {
    /// The action.
    pub action: Action,
    /// Gets the result.
    pub responder: Responder,
    pub(super) _in_flight: InFlightGuard,
}

/// Gets the result of an action, exactly once. A responder that is dropped, because the host ends, responds
/// with that.
pub struct Responder(Option<Box<dyn FnOnce(ActionResult) + Send>>);

impl Responder {
    /// Returns a responder that calls `respond`, which must not block.
    pub fn new(respond: impl FnOnce(ActionResult) + Send + 'static) -> Self {
        Responder(Some(Box::new(respond)))
    }

    /// Responds with this result.
    pub fn respond(mut self, result: ActionResult) {
        if let Some(respond) = self.0.take() {
            respond(result);
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if let Some(respond) = self.0.take() {
            respond(Err(CLOSING.to_owned()));
        }
    }
}

/// Counts an action that waits or runs, for its machine and for all machines, until it is dropped.
pub struct InFlightGuard([watch::Sender<usize>; 2]);

impl InFlightGuard {
    /// Increments these counts.
    pub fn new(counts: [&watch::Sender<usize>; 2]) -> Self {
        for count in counts {
            count.send_modify(|count| *count += 1);
        }
        InFlightGuard(counts.map(watch::Sender::clone))
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        for count in &self.0 {
            count.send_modify(|count| *count -= 1);
        }
    }
}

/// The worker's end of a pause.
pub struct Pause {
    reached: oneshot::Sender<()>,
    /// Receives a value if the worker is retired, and is closed if it resumes.
    ended: oneshot::Receiver<()>,
}

/// A pause that the worker has not reached yet.
pub struct Pausing {
    reached: oneshot::Receiver<()>,
    paused: Paused,
}

/// A paused worker. It resumes when this is dropped.
pub struct Paused(oneshot::Sender<()>);

impl Pause {
    /// Returns both ends of a pause.
    pub fn new() -> (Pause, Pausing) {
        let (reach, reached) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        (Pause { reached: reach, ended }, Pausing { reached, paused: Paused(end) })
    }

    /// Pauses. Returns whether the worker is retired.
    pub async fn is_retired(self) -> bool {
        self.reached.send(()).is_ok() && self.ended.await.is_ok()
    }
}

impl Pausing {
    /// Waits until the worker pauses. Returns `None` if the worker has ended.
    pub async fn reached(self) -> Option<Paused> {
        self.reached.await.ok().map(|()| self.paused)
    }
}

impl Paused {
    /// Ends the worker: its machine has been removed.
    pub fn retire(self) {
        // A worker that has ended already needs no message.
        let _ = self.0.send(());
    }
}
