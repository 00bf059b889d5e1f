//! One worker for each machine, with a mailbox.
//!
//! A worker can be sent to *rest*: nothing is begun on its machine until the rest is over, and what comes
//! meanwhile waits. From there it goes on, or is dismissed with its machine.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use machinery::State;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::rules::{Actor, House, give_up_preparing};
use super::{Action, CLOSING, Occasion, Outcome};
use crate::capture;
use crate::fleet::Machine;

/// What comes into a mailbox.
enum Mail {
    Job(Job),
    Rest(Rest),
}

struct Job {
    action: Action,
    answer: Answer,
    _pending: Pending,
}

/// Where a worker rests.
struct Rest {
    reached: oneshot::Sender<()>,
    /// Ends with a word if the worker is dismissed, and without if it goes on.
    over: oneshot::Receiver<()>,
}

/// A worker on its way there.
pub struct GoingToRest {
    reaching: oneshot::Receiver<()>,
    resting: Resting,
}

impl GoingToRest {
    /// Waits until it is at rest. `None` if it has ended.
    pub async fn reached(self) -> Option<Resting> {
        self.reaching.await.ok().map(|()| self.resting)
    }
}

/// A worker at rest, until this is dropped.
pub struct Resting(oneshot::Sender<()>);

impl Resting {
    /// The worker does not go on: its machine is no more.
    pub fn dismiss(self) {
        // One that has ended already is as good.
        let _ = self.0.send(());
    }
}

/// How long a restore waits for its preparation. It takes longer only where all of a large snapshot has
/// to be read, or something hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long after it was told to give up a preparation is told again.
const ONCE_MORE: Duration = Duration::from_millis(500);

const UNWANTED: &str = "not prepared, because the machine is to be stopped or started cold";
const REMOVED: &str = "the machine was removed from the configuration";

impl Mail {
    fn ends_a_preparation(&self) -> bool {
        match self {
            Mail::Job(job) => matches!(job.action, Action::Stop | Action::StopOwn | Action::NorestoreStart),
            Mail::Rest(_) => true,
        }
    }

    /// From when on a preparation that is under way is not wanted any more because of it, if ever.
    fn ends_preparations_from(&self) -> Option<Instant> {
        match self {
            Mail::Job(Job { action: Action::RestoreStart, .. }) => Some(Instant::now() + PATIENCE),
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
    mail: mpsc::UnboundedSender<Mail>,
    /// How many jobs wait or run.
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
    workers: Mutex<JoinSet<()>>,
}

impl Workers {
    /// Workers of that house; none yet.
    pub fn new(house: Arc<House>) -> Self {
        Workers {
            mailboxes: Mutex::default(),
            closing: Arc::default(),
            house,
            pending: watch::Sender::new(0),
            workers: Mutex::default(),
        }
    }

    /// Starts a worker for that machine, unless the host ends.
    pub fn start(&self, machine: &Arc<Machine>) {
        let mut mailboxes = self.mailboxes();
        if self.closing().is_some() {
            return;
        }
        let (sender, mail) = mpsc::unbounded_channel();
        let mailbox = Mailbox { mail: sender, pending: watch::Sender::new(0) };
        mailboxes.insert(machine.name().to_owned(), mailbox);
        let worker = Worker {
            actor: Actor::new(Arc::clone(machine), Arc::clone(&self.house)),
            mail,
            waiting: VecDeque::new(),
            ended: false,
            house: Arc::clone(&self.house),
            closing: Arc::clone(&self.closing),
        };
        machine.ask_preparation();
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that were dismissed are forgotten.
        while workers.try_join_next().is_some() {}
        workers.spawn(worker.work());
    }

    /// Puts an action into the machine's mailbox. It runs even if nobody waits for the answer.
    pub fn order(&self, machine: &Machine, action: Action, answer: Answer) {
        let mailboxes = self.mailboxes();
        match mailboxes.get(machine.name()) {
            Some(mailbox) => {
                // A worker that has ended gives the job back, and dropping it answers it.
                let pending = Pending::new([&mailbox.pending, &self.pending]);
                let _ = mailbox.mail.send(Mail::Job(Job { action, answer, _pending: pending }));
            }
            // A host that ends has no mailboxes either, and dropping the answer says so.
            None if self.closing().is_none() => answer.give(Err(REMOVED.to_owned())),
            None => {}
        }
    }

    /// Whether an action of that machine waits or runs.
    pub fn is_busy(&self, machine: &Machine) -> bool {
        self.mailboxes().get(machine.name()).is_some_and(|mailbox| *mailbox.pending.borrow() > 0)
    }

    /// Sends the machine's worker to rest, unless an action waits or runs; what is only done ahead of
    /// time is ended.
    pub fn rest(&self, machine: &Machine) -> Option<GoingToRest> {
        let (reached, reaching) = oneshot::channel();
        let (resting, over) = oneshot::channel();
        let mailboxes = self.mailboxes();
        let idle = mailboxes.get(machine.name()).filter(|mailbox| *mailbox.pending.borrow() == 0)?;
        idle.mail.send(Mail::Rest(Rest { reached, over })).ok()?;
        Some(GoingToRest { reaching, resting: Resting(resting) })
    }

    /// From now on nothing can be ordered of that machine.
    pub fn forget(&self, machine: &Machine) {
        self.mailboxes().remove(machine.name());
    }

    /// The house they work in.
    pub fn house(&self) -> &House {
        &self.house
    }

    fn mailboxes(&self) -> MutexGuard<'_, HashMap<String, Mailbox>> {
        self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner)
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
    /// machine off, and is gone. The set ends when every worker has.
    pub fn close(&self) -> JoinSet<()> {
        self.closing.store(true, Ordering::SeqCst);
        self.house.restores.close();
        self.house.preparations.close();
        self.mailboxes().clear();
        std::mem::take(&mut self.workers.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One machine's worker.
struct Worker {
    actor: Actor,
    mail: mpsc::UnboundedReceiver<Mail>,
    /// What came while the machine was prepared, in its order.
    waiting: VecDeque<Mail>,
    /// Whether no more mail will come.
    ended: bool,
    house: Arc<House>,
    closing: Arc<AtomicBool>,
}

impl Worker {
    async fn work(mut self) {
        loop {
            match self.waiting.pop_front() {
                Some(Mail::Job(job)) => self.do_job(job).await,
                Some(Mail::Rest(rest)) => {
                    if is_dismissed(rest).await {
                        return self.turn_away();
                    }
                    self.actor.machine().ask_preparation();
                }
                None if self.ended => break,
                None => self.next().await,
            }
        }
        power_off(&mut self.actor).await;
    }

    /// Answers what came for a machine that is no more.
    fn turn_away(mut self) {
        self.mail.close();
        while let Ok(mail) = self.mail.try_recv() {
            self.waiting.push_back(mail);
        }
        for mail in self.waiting {
            if let Mail::Job(job) = mail {
                job.answer.give(Err(REMOVED.to_owned()));
            }
        }
    }

    /// Waits for something to do. A job comes before what is only done ahead of time.
    async fn next(&mut self) {
        let machine = Arc::clone(self.actor.machine());
        tokio::select! {
            biased;
            mail = self.mail.recv() => self.take(mail),
            () = machine.preparation_asked() => self.prepare_ahead().await,
        }
    }

    fn take(&mut self, mail: Option<Mail>) {
        self.ended = mail.is_none();
        self.waiting.extend(mail);
    }

    async fn do_job(&mut self, Job { action, answer, _pending }: Job) {
        let outcome = if self.closing.load(Ordering::SeqCst) {
            Err(CLOSING.to_owned())
        } else if let Action::Prepare(occasion) = action {
            self.prepare(occasion).await
        } else {
            self.actor.perform(&action).await
        };
        answer.give(outcome);
    }

    /// Prepares the next restore, unless something is to be done before it is the machine's turn.
    async fn prepare_ahead(&mut self) {
        if self.actor.is_free() && self.actor.machine().is_outdated() {
            self.house.outdated.notify_one();
        }
        if !self.actor.can_prepare() {
            return;
        }
        let turn = tokio::select! {
            biased;
            mail = self.mail.recv() => {
                self.take(mail);
                return self.come_back();
            }
            turn = self.actor.turn_to_prepare() => turn,
        };
        if turn.is_some() && self.actor.can_prepare() {
            // Its failure is in the log, and the next restore does without.
            let _ = self.prepare_now(Occasion::Automatic).await;
        }
    }

    /// What came first does not keep the machine from being prepared, unless it is a stop.
    fn come_back(&self) {
        if !self.waiting.iter().any(Mail::ends_a_preparation) {
            self.actor.machine().ask_preparation();
        }
    }

    /// Prepares the next restore because somebody wants it, when it is the machine's turn.
    async fn prepare(&mut self, occasion: Occasion) -> Outcome {
        let turn = loop {
            if self.is_preparing_unwanted() {
                return Err(UNWANTED.to_owned());
            }
            tokio::select! {
                biased;
                mail = self.mail.recv(), if !self.ended => self.take(mail),
                turn = self.actor.turn_to_prepare() => break turn,
            }
        };
        match turn {
            Some(_turn) => self.prepare_now(occasion).await,
            None => Err(CLOSING.to_owned()),
        }
    }

    fn is_preparing_unwanted(&self) -> bool {
        self.ended || self.waiting.iter().any(Mail::ends_a_preparation)
    }

    /// Prepares the next restore. One that comes meanwhile waits for it for a while, because it would have
    /// to do the same work; what has no use for it ends it.
    async fn prepare_now(&mut self, occasion: Occasion) -> Outcome {
        let machine = Arc::clone(self.actor.machine());
        let out_of_patience = self.actor.out_of_patience();
        let action = Action::Prepare(occasion);
        let mut prepared = pin!(self.actor.perform(&action));
        // From when on it is not wanted any more; not known yet.
        let mut unwanted: Option<Instant> = None;
        // Since when it has been told so.
        let mut told: Option<Instant> = None;
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
                mail = self.mail.recv(), if !self.ended => {
                    let from = mail.as_ref().map_or_else(|| Some(Instant::now()), Mail::ends_preparations_from);
                    unwanted = [unwanted, from].into_iter().flatten().min();
                    self.ended = mail.is_none();
                    self.waiting.extend(mail);
                }
                () = give_up => {
                    let told = *told.get_or_insert_with(Instant::now);
                    give_up_preparing(&machine, &self.house).await;
                    if told.elapsed() >= self.house.timeouts().stop {
                        out_of_patience.send_replace(true);
                    }
                    // It may have come before the plugin had begun.
                    unwanted = Some(Instant::now() + ONCE_MORE);
                }
            }
        }
    }
}

/// Rests; tells how it ended.
async fn is_dismissed(Rest { reached, over }: Rest) -> bool {
    reached.send(()).is_ok() && over.await.is_ok()
}

/// Stops the machine's own run when the host ends, so that no run outlives the host. A run that somebody else
/// has started continues.
async fn power_off(actor: &mut Actor) {
    let status = actor.machine().status();
    if status.own_run {
        // Its failure is in the log, and there is nobody else to tell.
        let _ = actor.perform(&Action::StopOwn).await;
    } else if status.state != State::Poweroff {
        let (machine, state) = (actor.machine().name(), status.state);
        tracing::warn!(machine, %state, "left as it is: the host has not started it");
    }
    capture::end(actor.machine()).await;
}
