//! The worker of one machine: takes messages from the machine's queue, one at a time.
//!
//! ```text
//! idle ─▶ request: run it ─▶ idle
//!      ─▶ idle work: have a pending change applied, prepare the next restore ─▶ idle
//!      ─▶ a try is due, or the run has lasted too long: heal, or stop ─▶ idle
//!      ─▶ screen: show it, unless anything else waits ─▶ idle
//!      ─▶ pause: wait ─▶ idle, or retired with the machine
//!      ─▶ queue closed: power the host's own run off, or leave it to the next host ─▶ ended
//! ```
//!
//! Requests precede idle work. Messages that arrive during a preparation wait in their order.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::{Arc, OnceLock};

use machinery::State;
use tokio::sync::mpsc;

use super::context::ActionContext;
use super::executor::ActionExecutor;
use super::message::{Message, Request, ScreenRequest};
use super::preparation::{Cancellation, USELESS};
use super::{Action, ActionResult, CLOSING, Ending, PrepareOrigin, REMOVED, capture};
use crate::fleet::Machine;

/// The worker of one machine.
pub struct Worker {
    executor: ActionExecutor,
    context: Arc<ActionContext>,
    messages: mpsc::UnboundedReceiver<Message>,
    /// Messages that arrived during a preparation, in their order.
    waiting: VecDeque<Message>,
    /// True once the queue is closed.
    queue_closed: bool,
    /// The way in which the host ends, once it does.
    closing: Arc<OnceLock<Ending>>,
}

impl Worker {
    /// Returns the worker of that machine.
    pub fn new(
        machine: Arc<Machine>,
        context: Arc<ActionContext>,
        messages: mpsc::UnboundedReceiver<Message>,
        closing: Arc<OnceLock<Ending>>,
    ) -> Self {
        let executor = ActionExecutor::new(machine, Arc::clone(&context));
        Worker { executor, context, messages, waiting: VecDeque::new(), queue_closed: false, closing }
    }

    /// Runs until the queue is closed, or the machine is removed.
    pub async fn run(mut self) {
        loop {
            match self.waiting.pop_front() {
                Some(Message::Request(Request { action, responder, waiting, _in_flight })) => {
                    drop(waiting);
                    let result = match action {
                        _ if self.closing.get().is_some() => Err(CLOSING.to_owned()),
                        Action::Prepare(origin) => self.prepare_when_permitted(origin).await,
                        action => self.executor.execute(&action).await,
                    };
                    responder.respond(result);
                }
                Some(Message::Pause(pause)) => {
                    if pause.is_retired().await {
                        return self.refuse_the_rest();
                    }
                    self.executor.machine().notify_idle_work();
                }
                Some(Message::Screen(request)) => self.show_screen(request).await,
                None if self.queue_closed => break,
                None => self.wait().await,
            }
        }
        let is_left = self.closing.get() == Some(&Ending::HandOver);
        if !(is_left && self.executor.machine().machinery.adopts()) {
            self.power_off().await;
        }
        capture::end(self.executor.machine()).await;
    }

    /// Shows the screen, unless anything else waits: actions come first.
    async fn show_screen(&mut self, request: ScreenRequest) {
        while let Ok(message) = self.messages.try_recv() {
            self.waiting.push_back(message);
        }
        if self.waiting.is_empty() && self.closing.get().is_none() && !request.is_abandoned() {
            let screen = self.executor.screen().await;
            request.respond(screen);
        }
    }

    /// Refuses all requests: the machine has been removed.
    fn refuse_the_rest(mut self) {
        self.messages.close();
        while let Ok(message) = self.messages.try_recv() {
            self.waiting.push_back(message);
        }
        for message in self.waiting {
            if let Message::Request(request) = message {
                request.responder.respond(Err(REMOVED.to_owned()));
            }
        }
    }

    /// Waits for a message, for idle work, or for a moment at which the host acts by itself.
    async fn wait(&mut self) {
        let machine = Arc::clone(self.executor.machine());
        tokio::select! {
            biased;
            message = self.messages.recv() => self.keep(message),
            () = machine.idle_work() => self.do_idle_work().await,
            // Its quarantine may have ended in the last moment.
            () = self.executor.try_due() => if machine.next_try().is_some() {
                self.execute_own(&Action::Heal).await;
            },
            () = self.executor.overrun() => self.execute_own(&Action::StopOverrun).await,
        }
    }

    /// Runs an action of the host itself, unless the host ends.
    async fn execute_own(&mut self, action: &Action) {
        if self.closing.get().is_none() {
            // The result is in the log.
            let _ = self.executor.execute(action).await;
        }
    }

    fn keep(&mut self, message: Option<Message>) {
        self.queue_closed = message.is_none();
        self.waiting.extend(message);
    }

    /// Has a pending change applied, and prepares the next restore unless a message comes first.
    async fn do_idle_work(&mut self) {
        self.executor.end_run_without_stop().await;
        if self.executor.is_free() && self.executor.machine().has_pending_change() {
            self.context.pending_change.notify_one();
        }
        if !self.executor.can_prepare() {
            return;
        }
        let (context, machine) = (Arc::clone(&self.context), Arc::clone(self.executor.machine()));
        let permit = tokio::select! {
            biased;
            message = self.messages.recv() => {
                self.keep(message);
                return self.retry_idle_work();
            }
            permit = context.prepare_permit(&machine) => permit,
        };
        if permit.is_some() && self.executor.can_prepare() {
            // A failure is in the log, and the next restore works without a preparation.
            let _ = self.prepare(PrepareOrigin::Automatic).await;
        }
    }

    /// Repeats the idle work later, unless a message makes the preparation useless.
    fn retry_idle_work(&self) {
        if !self.waiting.iter().any(Message::cancels_preparation) {
            self.executor.machine().notify_idle_work();
        }
    }

    /// Prepares the next restore by request, once there is a permit.
    async fn prepare_when_permitted(&mut self, origin: PrepareOrigin) -> ActionResult {
        let (context, machine) = (Arc::clone(&self.context), Arc::clone(self.executor.machine()));
        let permit = loop {
            if self.queue_closed || self.waiting.iter().any(Message::cancels_preparation) {
                return Err(USELESS.to_owned());
            }
            tokio::select! {
                biased;
                message = self.messages.recv(), if !self.queue_closed => self.keep(message),
                permit = context.prepare_permit(&machine) => break permit,
            }
        };
        match permit {
            Some(_permit) => self.prepare(origin).await,
            None => Err(CLOSING.to_owned()),
        }
    }

    /// Prepares the next restore, and cancels that once a message makes it useless.
    async fn prepare(&mut self, origin: PrepareOrigin) -> ActionResult {
        let machine = Arc::clone(self.executor.machine());
        let abandon = self.executor.abandon();
        let mut cancellation = Cancellation::new(machine, Arc::clone(&self.context), abandon);
        let action = Action::Prepare(origin);
        let mut prepared = pin!(self.executor.execute(&action));
        loop {
            tokio::select! {
                biased;
                result = &mut prepared => return result,
                message = self.messages.recv(), if !self.queue_closed => {
                    cancellation.consider(message.as_ref());
                    self.queue_closed = message.is_none();
                    self.waiting.extend(message);
                }
                () = cancellation.due() => cancellation.cancel().await,
            }
        }
    }

    /// Stops the machine's own run when the host ends, so that no run outlives the host. A run that somebody
    /// else has started continues.
    async fn power_off(&mut self) {
        let status = self.executor.machine().status();
        if status.own_run {
            // A failure is in the log, and there is nobody else to report it to.
            let _ = self.executor.execute(&Action::StopOwn).await;
        } else if status.state != State::Poweroff {
            let (machine, state) = (self.executor.machine().name(), status.state);
            tracing::warn!(machine, %state, "left as it is: the host has not started it");
        }
    }
}
