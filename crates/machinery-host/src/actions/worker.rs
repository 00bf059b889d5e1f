//! One worker for each machine, with a mailbox.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::rules::{Actor, House, give_up_preparing};
use super::{Action, CLOSING, Outcome};
use crate::capture;
use crate::fleet::{Fleet, Machine};

struct Job {
    action: Action,
    answer: Answer,
    _pending: Pending,
}

/// How long a restore waits for its preparation. It takes longer only where all of a large snapshot has
/// to be read, or something hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long after it was told to give up a preparation is told again.
const ONCE_MORE: Duration = Duration::from_millis(500);

const UNWANTED: &str = "not prepared, because the machine is to be stopped or started cold";

impl Job {
    fn ends_a_preparation(&self) -> bool {
        matches!(self.action, Action::Stop | Action::NorestoreStart)
    }

    /// From when on a preparation that is under way is not wanted any more because of it, if ever.
    fn ends_preparations_from(&self) -> Option<Instant> {
        match self.action {
            Action::RestoreStart => Some(Instant::now() + PATIENCE),
            _ => self.ends_a_preparation().then(Instant::now),
        }
    }
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
            let worker = Worker {
                actor,
                jobs,
                waiting: VecDeque::new(),
                ended: false,
                house: Arc::clone(&house),
                closing: Arc::clone(&closing),
            };
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
    /// Jobs that came while the machine was prepared, in their order.
    waiting: VecDeque<Job>,
    /// Whether no more jobs will come.
    ended: bool,
    house: Arc<House>,
    closing: Arc<AtomicBool>,
}

impl Worker {
    async fn work(mut self) {
        loop {
            if let Some(job) = self.waiting.pop_front() {
                self.do_job(job).await;
            } else if self.ended {
                break;
            } else {
                self.next().await;
            }
        }
        power_off(&mut self.actor).await;
    }

    /// Waits for something to do. A job comes before what is only done ahead of time.
    async fn next(&mut self) {
        let machine = Arc::clone(self.actor.machine());
        tokio::select! {
            biased;
            job = self.jobs.recv() => self.take(job),
            () = machine.preparation_asked() => self.prepare_ahead().await,
        }
    }

    fn take(&mut self, job: Option<Job>) {
        self.ended = job.is_none();
        self.waiting.extend(job);
    }

    async fn do_job(&mut self, Job { action, answer, _pending }: Job) {
        let outcome = if self.closing.load(Ordering::SeqCst) {
            Err(CLOSING.to_owned())
        } else if action == Action::Prepare {
            self.prepare().await
        } else {
            self.actor.perform(&action).await
        };
        answer.give(outcome);
    }

    /// Prepares the next restore, unless something is to be done before it is the machine's turn.
    async fn prepare_ahead(&mut self) {
        if !self.actor.can_prepare() {
            return;
        }
        let turn = tokio::select! {
            biased;
            job = self.jobs.recv() => {
                self.take(job);
                return self.come_back();
            }
            turn = self.actor.turn_to_prepare() => turn,
        };
        if turn.is_some() && self.actor.can_prepare() {
            // Its failure is in the log, and the next restore does without.
            let _ = self.prepare_now().await;
        }
    }

    /// What came first does not keep the machine from being prepared, unless it is a stop.
    fn come_back(&self) {
        if !self.waiting.iter().any(Job::ends_a_preparation) {
            self.actor.machine().ask_preparation();
        }
    }

    /// Prepares the next restore because somebody wants it, when it is the machine's turn.
    async fn prepare(&mut self) -> Outcome {
        let turn = loop {
            if self.is_preparing_unwanted() {
                return Err(UNWANTED.to_owned());
            }
            tokio::select! {
                biased;
                job = self.jobs.recv(), if !self.ended => self.take(job),
                turn = self.actor.turn_to_prepare() => break turn,
            }
        };
        match turn {
            Some(_turn) => self.prepare_now().await,
            None => Err(CLOSING.to_owned()),
        }
    }

    fn is_preparing_unwanted(&self) -> bool {
        self.ended || self.waiting.iter().any(Job::ends_a_preparation)
    }

    /// Prepares the next restore. One that comes meanwhile waits for it for a while, because it would have
    /// to do the same work; what has no use for it ends it.
    async fn prepare_now(&mut self) -> Outcome {
        let machine = Arc::clone(self.actor.machine());
        let mut prepared = pin!(self.actor.perform(&Action::Prepare));
        // From when on it is not wanted any more; not known yet.
        let mut unwanted: Option<Instant> = None;
        loop {
            let give_up = async {
                match unwanted {
                    Some(since) => tokio::time::sleep_until(since).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                outcome = &mut prepared => return outcome,
                job = self.jobs.recv(), if !self.ended => {
                    let from = job.as_ref().map_or_else(|| Some(Instant::now()), Job::ends_preparations_from);
                    unwanted = [unwanted, from].into_iter().flatten().min();
                    self.ended = job.is_none();
                    self.waiting.extend(job);
                }
                () = give_up => {
                    give_up_preparing(&machine, &self.house).await;
                    // It may have come before the plugin had begun.
                    unwanted = Some(Instant::now() + ONCE_MORE);
                }
            }
        }
    }
}

/// The last thing a worker does: the host ends, and no machine outlives it.
async fn power_off(actor: &mut Actor) {
    if actor.machine().status().state != machinery::State::Poweroff {
        // Its failure is in the log, and there is nobody else to tell.
        let _ = actor.perform(&Action::Stop).await;
    }
    capture::end(actor.machine()).await;
}
