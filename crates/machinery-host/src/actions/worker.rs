//! One worker for each machine, with a mailbox.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::rules::Actor;
use super::{Action, Outcome};
use crate::config::Timeouts;
use crate::fleet::{Fleet, Machine};

struct Job {
    action: Action,
    answer: oneshot::Sender<Outcome>,
}

/// The mailboxes of all workers.
pub struct Workers {
    mailboxes: Mutex<HashMap<String, mpsc::UnboundedSender<Job>>>,
    closing: Arc<AtomicBool>,
}

/// What an action gets that comes too late.
const CLOSING: &str = "the machinery host is shutting down and takes no new action";

impl Workers {
    /// Starts a worker for each machine. The set ends when every worker has.
    pub fn start(fleet: &Fleet, timeouts: Timeouts) -> (Workers, JoinSet<()>) {
        let closing = Arc::new(AtomicBool::new(false));
        let mut workers = JoinSet::new();
        let mut mailboxes = HashMap::new();
        for machine in fleet.machines() {
            let (mailbox, jobs) = mpsc::unbounded_channel();
            mailboxes.insert(machine.name().to_owned(), mailbox);
            let actor = Actor::new(Arc::clone(machine), timeouts);
            workers.spawn(work(actor, jobs, Arc::clone(&closing)));
        }
        (Workers { mailboxes: Mutex::new(mailboxes), closing }, workers)
    }

    /// Puts an action into the machine's mailbox. It runs even if nobody waits for the outcome.
    pub fn order(&self, machine: &Machine, action: Action) -> oneshot::Receiver<Outcome> {
        let (answer, outcome) = oneshot::channel();
        let mailboxes = self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mailbox) = mailboxes.get(machine.name()) {
            // A worker that has ended drops the job, and with it the answer.
            let _ = mailbox.send(Job { action, answer });
        }
        outcome
    }

    /// From now on what waits in a mailbox fails. Each worker ends what it is at, powers its
    /// machine off, and is gone.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

async fn work(mut actor: Actor, mut jobs: mpsc::UnboundedReceiver<Job>, closing: Arc<AtomicBool>) {
    while let Some(Job { action, answer }) = jobs.recv().await {
        let outcome = if closing.load(Ordering::SeqCst) {
            Err(CLOSING.to_owned())
        } else {
            actor.perform(&action).await
        };
        // Whoever asked may have gone.
        let _ = answer.send(outcome);
    }
    power_off(&mut actor).await;
}

/// The last thing a worker does: the host ends, and no machine outlives it.
async fn power_off(actor: &mut Actor) {
    if actor.machine().status().state != machinery::State::Poweroff {
        // Its failure is in the log, and there is nobody else to tell.
        let _ = actor.perform(&Action::Stop).await;
    }
}

/// What became of an order whose worker is gone.
pub fn outcome_of(received: Result<Outcome, oneshot::error::RecvError>) -> Outcome {
    received.unwrap_or_else(|_| Err(CLOSING.to_owned()))
}
