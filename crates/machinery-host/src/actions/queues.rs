//! The queues of all machines: where requests for actions enter.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::context::ActionContext;
use super::message::{InFlightGuard, Message, Pause, Pausing, Request, Responder};
use super::worker::Worker;
use super::{Action, CLOSING, Ending, REMOVED};
use crate::fleet::Machine;

/// The number of requests for one machine that may wait or run.
const MAX_REQUESTS: usize = 64;
/// The reason for refusing a further request.
const FULL: &str = "64 requests for this machine wait or run already: wait for their replies";

/// The queue of one machine.
struct Queue {
    messages: mpsc::UnboundedSender<Message>,
    /// The number of requests that wait or run.
    in_flight: watch::Sender<usize>,
}

/// The queues of all machines, and their workers.
pub struct Queues {
    queues: Mutex<HashMap<String, Queue>>,
    closing: Arc<OnceLock<Ending>>,
    context: Arc<ActionContext>,
    /// The number of requests that wait or run, of all machines.
    in_flight: watch::Sender<usize>,
    workers: Mutex<JoinSet<()>>,
}

impl Queues {
    /// Returns queues without any machine.
    pub fn new(context: Arc<ActionContext>) -> Self {
        Queues {
            queues: Mutex::default(),
            closing: Arc::default(),
            context,
            in_flight: watch::Sender::new(0),
            workers: Mutex::default(),
        }
    }

    /// Adds a queue and starts a worker for the machine, unless the host ends.
    pub fn add(&self, machine: &Arc<Machine>) {
        let mut queues = self.queues();
        if self.closing().is_some() {
            return;
        }
        let (sender, messages) = mpsc::unbounded_channel();
        let queue = Queue { messages: sender, in_flight: watch::Sender::new(0) };
        queues.insert(machine.name().to_owned(), queue);
        let (context, closing) = (Arc::clone(&self.context), Arc::clone(&self.closing));
        let worker = Worker::new(Arc::clone(machine), context, messages, closing);
        machine.notify_idle_work();
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        // Drops the entries of workers that have ended.
        while workers.try_join_next().is_some() {}
        workers.spawn(worker.run());
    }

    /// Submits an action to the machine's queue. The action runs even if nobody waits for its result.
    pub fn submit(&self, machine: &Machine, action: Action, responder: Responder) {
        match self.queues().get(machine.name()) {
            Some(queue) if *queue.in_flight.borrow() >= MAX_REQUESTS => {
                responder.respond(Err(FULL.to_owned()))
            }
            Some(queue) => {
                let in_flight = InFlightGuard::new([&queue.in_flight, &self.in_flight]);
                // A worker that has ended drops the request, which responds.
                let _ = queue.messages.send(Message::Request(Request {
                    action,
                    responder,
                    _in_flight: in_flight,
                }));
            }
            // A host that ends has no queues, and the dropped responder responds with that.
            None if self.closing().is_none() => responder.respond(Err(REMOVED.to_owned())),
            None => {}
        }
    }

    /// Reports whether an action of that machine waits or runs.
    pub fn is_busy(&self, machine: &Machine) -> bool {
        self.queues().get(machine.name()).is_some_and(|queue| *queue.in_flight.borrow() > 0)
    }

    /// Asks the machine's worker to pause, unless an action waits or runs. A preparation is cancelled.
    pub fn pause(&self, machine: &Machine) -> Option<Pausing> {
        let queues = self.queues();
        let idle = queues.get(machine.name()).filter(|queue| *queue.in_flight.borrow() == 0)?;
        let (pause, pausing) = Pause::new();
        idle.messages.send(Message::Pause(pause)).ok()?;
        Some(pausing)
    }

    /// Removes the machine's queue: no later action is accepted.
    pub fn remove(&self, machine: &Machine) {
        self.queues().remove(machine.name());
    }

    /// Returns the context of all executors.
    pub fn context(&self) -> &ActionContext {
        &self.context
    }

    /// Returns the reason for refusing new actions, if the host ends.
    pub fn closing(&self) -> Option<&'static str> {
        self.closing.get().map(|_| CLOSING)
    }

    /// Waits until no action waits or runs.
    pub async fn idle(&self) {
        // The sender is here, so this cannot fail.
        let _ = self.in_flight.subscribe().wait_for(|count| *count == 0).await;
    }

    /// Closes all queues. Waiting requests fail. Each worker finishes its present action, powers its machine off unless
    /// the next host adopts it, and ends. The returned set is empty when every worker has ended.
    pub fn close(&self, ending: Ending) -> JoinSet<()> {
        // A host ends once.
        let _ = self.closing.set(ending);
        self.context.close();
        self.queues().clear();
        std::mem::take(&mut self.workers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes and releases the locks of the queues.
    pub fn pass_locks(&self) {
        drop(self.queues());
        drop(self.workers.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn queues(&self) -> MutexGuard<'_, HashMap<String, Queue>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
