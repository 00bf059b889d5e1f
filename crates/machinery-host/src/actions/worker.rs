//! One worker for each machine, with a mailbox.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::rules::{Actor, House, give_up_preparing};
use super::{Action, CLOSING, Outcome};
use crate::capture;
use crate::fleet::{Fleet, Machine};

struct Job {
    action: Action,
    answer: Answer,
    _pending: Pending,
}

/// Counts as an action that waits or runs, of its machine and of all, for as long as it lives.
struct Pending([watch::Sender<usize>; 2]);

impl Pending {
    fn new(counts: [&watch::Sender<usize>; 2]) -> Self {
        for count in counts {
            count.send_modify(|count| *count += 1);
        }
        Pending(counts.map(watch::Sender::clone))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        for count in &self.0 {
            count.send_modify(|count| *count -= 1);
        }
    }
}

/// Where a machine's actions wait.
struct Mailbox {
    jobs: mpsc::UnboundedSender<Job>,
    /// How many of them wait or run.
    pending: watch::Sender<usize>,
}

/// Where an outcome goes. It is given exactly once: an order that is dropped unheard, because the
/// host ends, is answered with that.
pub struct Answer(Option<Box<dyn FnOnce(Outcome) + Send>>);

impl Answer {
    /// An answer to be given to `whom`, who must not wait for anything.
    pub fn to(whom: impl FnOnce(Outcome) + Send + 'static) -> Self {
        Answer(Some(Box::new(whom)))
    }

    fn give(mut self, outcome: Outcome) {
        if let Some(whom) = self.0.take() {
            whom(outcome);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(whom) = self.0.take() {
            whom(Err(CLOSING.to_owned()));
        }
    }
}

/// The mailboxes of all workers.
pub struct Workers {
    mailboxes: Mutex<HashMap<String, Mailbox>>,
    closing: Arc<AtomicBool>,
    house: Arc<House>,
    /// How many actions wait or run.
    pending: watch::Sender<usize>,
}

impl Workers {
    /// Starts a worker for each machine. The set ends when every worker has.
    pub fn start(fleet: &Fleet, house: House) -> (Workers, JoinSet<()>) {
        let house = Arc::new(house);
        let closing = Arc::new(AtomicBool::new(false));
        let mut workers = JoinSet::new();
        let mut mailboxes = HashMap::new();
        for machine in fleet.machines() {
            let (sender, jobs) = mpsc::unbounded_channel();
            let mailbox = Mailbox { jobs: sender, pending: watch::Sender::new(0) };
            mailboxes.insert(machine.name().to_owned(), mailbox);
            let actor = Actor::new(Arc::clone(machine), Arc::clone(&house));
            let worker = Worker { actor, jobs, house: Arc::clone(&house), closing: Arc::clone(&closing) };
            machine.ask_preparation();
            workers.spawn(worker.work());
        }
        let pending = watch::Sender::new(0);
        (Workers { mailboxes: Mutex::new(mailboxes), closing, house, pending }, workers)
    }

    /// Puts an action into the machine's mailbox. It runs even if nobody waits for the answer.
    pub fn order(&self, machine: &Machine, action: Action, answer: Answer) {
        let mailboxes = self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mailbox) = mailboxes.get(machine.name()) {
            // A worker that has ended gives the job back, and dropping it answers it.
            let pending = Pending::new([&mailbox.pending, &self.pending]);
            let _ = mailbox.jobs.send(Job { action, answer, _pending: pending });
        }
    }

    /// Whether an action of that machine waits or runs.
    pub fn is_busy(&self, machine: &Machine) -> bool {
        let mailboxes = self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner);
        mailboxes.get(machine.name()).is_some_and(|mailbox| *mailbox.pending.borrow() > 0)
    }

    /// Why nothing new is begun, if the host ends.
    pub fn closing(&self) -> Option<&'static str> {
        self.closing.load(Ordering::SeqCst).then_some(CLOSING)
    }

    /// Returns as soon as no action waits or runs.
    pub async fn idle(&self) {
        // The sender is here, so this cannot fail.
        let _ = self.pending.subscribe().wait_for(|count| *count == 0).await;
    }

    /// From now on what waits in a mailbox fails. Each worker ends what it is at, powers its
    /// machine off, and is gone.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.house.restores.close();
        self.house.preparations.close();
        self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// One machine's worker.
struct Worker {
    actor: Actor,
    jobs: mpsc::UnboundedReceiver<Job>,
    house: Arc<House>,
    closing: Arc<AtomicBool>,
}

/// What came while a machine was prepared.
enum Meanwhile {
    Nothing,
    Job(Job),
    End,
}

impl Worker {
    async fn work(mut self) {
        let mut came = Meanwhile::Nothing;
        loop {
            came = match came {
                Meanwhile::Job(job) => self.do_job(job).await,
                Meanwhile::End => break,
                Meanwhile::Nothing => self.next().await,
            };
        }
        power_off(&mut self.actor).await;
    }

    /// Waits for something to do. A job comes before what is only done ahead of time.
    async fn next(&mut self) -> Meanwhile {
        let machine = Arc::clone(self.actor.machine());
        tokio::select! {
            biased;
            job = self.jobs.recv() => came(job),
            () = machine.preparation_asked() => self.prepare_ahead().await,
        }
    }

    async fn do_job(&mut self, Job { action, answer, _pending }: Job) -> Meanwhile {
        let (outcome, came) = if self.closing.load(Ordering::SeqCst) {
            (Err(CLOSING.to_owned()), Meanwhile::Nothing)
        } else if action == Action::Prepare {
            self.prepare().await
        } else {
            (self.actor.perform(&action).await, Meanwhile::Nothing)
        };
        answer.give(outcome);
        came
    }

    /// Prepares the next restore, unless something is to be done before it is the machine's turn.
    async fn prepare_ahead(&mut self) -> Meanwhile {
        if !self.actor.can_prepare() {
            return Meanwhile::Nothing;
        }
        let turn = tokio::select! {
            biased;
            job = self.jobs.recv() => return came(job),
            turn = self.actor.turn_to_prepare() => turn,
        };
        if turn.is_none() || !self.actor.can_prepare() {
            return Meanwhile::Nothing;
        }
        // Its failure is in the log, and the next restore does without.
        let (_, came) = self.prepare().await;
        came
    }

    /// Prepares the next restore. A restore that comes meanwhile waits for it, because it would have to
    /// do the same work; whatever else comes ends it.
    async fn prepare(&mut self) -> (Outcome, Meanwhile) {
        let machine = Arc::clone(self.actor.machine());
        let mut prepared = pin!(self.actor.perform(&Action::Prepare));
        let job = tokio::select! {
            biased;
            outcome = &mut prepared => return (outcome, Meanwhile::Nothing),
            job = self.jobs.recv() => job,
        };
        if job.as_ref().is_none_or(|job| job.action != Action::RestoreStart) {
            give_up_preparing(&machine, &self.house).await;
        }
        (prepared.await, came(job))
    }
}

fn came(job: Option<Job>) -> Meanwhile {
    job.map_or(Meanwhile::End, Meanwhile::Job)
}

/// The last thing a worker does: the host ends, and no machine outlives it.
async fn power_off(actor: &mut Actor) {
    if actor.machine().status().state != machinery::State::Poweroff {
        // Its failure is in the log, and there is nobody else to tell.
        let _ = actor.perform(&Action::Stop).await;
    }
    capture::end(actor.machine()).await;
}
