//! The messages in a worker's queue: requests for actions, pauses, and requests for the screen.
//!
//! ```text
//! request ─▶ waits ─▶ runs ─▶ its responder gets the result
//! pause   ─▶ waits ─▶ reached: the machine is idle ─▶ resumed: the worker goes on
//!                                                └──▶ retired: the worker ends with its machine
//! screen  ─▶ waits ─▶ nothing else waits: it is shown
//!                └──▶ something else waits: refused
//! ```

use std::fmt;
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
    /// Show the screen, unless anything else waits.
    Screen(ScreenRequest),
}

impl Message {
    /// Reports whether the message makes a preparation useless.
    pub fn cancels_preparation(&self) -> bool {
        match self {
            Message::Request(request) => {
                matches!(request.action, Action::Stop | Action::StopOwn | Action::NorestoreStart)
            }
            Message::Pause(_) => true,
            Message::Screen(_) => false,
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
    /// Held until the action runs.
    pub(super) waiting: InFlightGuard<1>,
    pub(super) _in_flight: InFlightGuard<2>,
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

/// The reason why there is no screen now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoScreen {
    /// The machine does not run.
    Off,
    /// An action waits or runs.
    Busy,
    /// The machinery shows no screens.
    Unsupported,
    /// It failed.
    Failed(String),
}

impl fmt::Display for NoScreen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoScreen::Off => f.write_str("the machine does not run"),
            NoScreen::Busy => f.write_str("the machine is busy with an action"),
            NoScreen::Unsupported => f.write_str("its machinery shows no screens"),
            NoScreen::Failed(reason) => f.write_str(reason),
        }
    }
}

/// A screen as a PNG image.
pub type Screen = Result<Vec<u8>, NoScreen>;

/// A request for the screen. A request that is dropped was refused, because the machine is busy.
pub struct ScreenRequest(oneshot::Sender<Screen>);

impl ScreenRequest {
    /// Returns a request, and its response.
    pub fn new() -> (ScreenRequest, oneshot::Receiver<Screen>) {
        let (sender, receiver) = oneshot::channel();
        (ScreenRequest(sender), receiver)
    }

    /// Reports whether nobody waits for the screen any more.
    pub fn is_abandoned(&self) -> bool {
        self.0.is_closed()
    }

    /// Responds with this screen.
    pub fn respond(self, screen: Screen) {
        // The watcher may have left.
        let _ = self.0.send(screen);
    }
}

/// Counts an action that waits or runs, until it is dropped.
pub struct InFlightGuard<const N: usize>([watch::Sender<usize>; N]);

impl<const N: usize> InFlightGuard<N> {
    /// Increments these counts.
    pub fn new(counts: [&watch::Sender<usize>; N]) -> Self {
        for count in counts {
            count.send_modify(|count| *count += 1);
        }
        InFlightGuard(counts.map(watch::Sender::clone))
    }
}

impl<const N: usize> Drop for InFlightGuard<N> {
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

#[cfg(test)]
mod tests {
    use super::super::PrepareOrigin;
    use super::*;

    fn request(action: Action) -> Message {
        let count = watch::Sender::new(0);
        let (waiting, _in_flight) = (InFlightGuard::new([&count]), InFlightGuard::new([&count, &count]));
        Message::Request(Request { action, responder: Responder::new(|_| ()), waiting, _in_flight })
    }

    #[tokio::test(start_paused = true)]
    async fn preparation_is_useless_at_once_or_when_a_restore_has_waited_for_it() {
        let (now, later) = (Some(Instant::now()), Some(Instant::now() + MAX_RESTORE_DELAY));
        for (message, cancels, from) in [
            (request(Action::Stop), true, now),
            (request(Action::StopOwn), true, now),
            (request(Action::NorestoreStart), true, now),
            (Message::Pause(Pause::new().0), true, now),
            (request(Action::RestoreStart), false, later),
            (request(Action::AcpiStop), false, None),
            (request(Action::Prepare(PrepareOrigin::Request)), false, None),
        ] {
            assert_eq!((message.cancels_preparation(), message.cancels_preparation_from()), (cancels, from));
        }
    }

    #[test]
    fn action_counts_for_its_machine_and_for_all_until_it_ends() {
        let (own, all) = (watch::Sender::new(0), watch::Sender::new(3));
        let guard = InFlightGuard::new([&own, &all]);
        assert_eq!((*own.borrow(), *all.borrow()), (1, 4));
        drop(guard);
        assert_eq!((*own.borrow(), *all.borrow()), (0, 3));
    }

    #[tokio::test]
    async fn paused_worker_is_retired_or_resumes() {
        for retires in [true, false] {
            let (pause, pausing) = Pause::new();
            let worker = tokio::spawn(pause.is_retired());
            let paused = pausing.reached().await.unwrap();
            if retires {
                paused.retire()
            } else {
                drop(paused)
            }
            assert_eq!(worker.await.unwrap(), retires);
        }
    }

    #[tokio::test]
    async fn pause_of_a_worker_that_has_ended_is_never_reached() {
        let (pause, pausing) = Pause::new();
        drop(pause);
        assert!(pausing.reached().await.is_none());
    }
}
