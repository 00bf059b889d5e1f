//! One machine.
//!
//! Its *description* (name, ip, tags) comes from its plugin and changes only with the configuration, while
//! nobody uses the machine. Its *state* is in its [`Status`]: the worker records the states that it ordered,
//! and the plugin reports the others. Its [`assignment`](super::assignment) to tasks is in the status too.
//! Every change is sent as an event.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use machinery::{Error, MachineInfo, RestoreReadiness, State};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Machinery;
use super::availability::TaskLock;
use super::status::{Status, is_accident};
use crate::capture::tcpdump::Tcpdump;
use crate::events::{Event, Events};

/// One machine.
pub struct Machine {
    name: String,
    info: RwLock<Arc<MachineInfo>>,
    /// The machinery that drives the machine.
    pub machinery: Arc<Machinery>,
    status: Mutex<Status>,
    /// True while somebody asks the plugin for the state.
    querying_state: AtomicBool,
    /// The capture of the machine's traffic. The lock is held while a capture begins and ends.
    pub capture: tokio::sync::Mutex<Option<Capture>>,
    /// Notified when the worker should look after the machine: prepare its next restore, or have a pending
    /// change applied.
    idle_work: Notify,
    pub(super) events: Events,
}

/// The capture of a machine's traffic for a task.
#[derive(Debug)]
pub struct Capture {
    /// The task whose traffic is captured.
    pub lock: TaskLock,
    /// The process that captures.
    pub tcpdump: Tcpdump,
}

/// The right to ask a machine's plugin for its state. One client at a time has it.
pub struct StateQueryGuard(Arc<Machine>);

impl Drop for StateQueryGuard {
    fn drop(&mut self) {
        self.0.querying_state.store(false, Ordering::SeqCst);
    }
}

impl Machine {
    /// Returns a machine that was just loaded.
    pub fn new(info: MachineInfo, machinery: Arc<Machinery>, state: State, events: Events) -> Self {
        Machine {
            name: info.name.clone(),
            info: RwLock::new(Arc::new(info)),
            machinery,
            status: Mutex::new(Status::new(state)),
            querying_state: AtomicBool::new(false),
            capture: tokio::sync::Mutex::new(None),
            idle_work: Notify::new(),
            events,
        }
    }

    /// Returns the machine's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the machine's description.
    pub fn info(&self) -> Arc<MachineInfo> {
        Arc::clone(&self.info.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the machine's description. The name must not change.
    pub fn set_info(&self, info: MachineInfo) {
        *self.info.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(info);
    }

    /// Returns a copy of the machine's status.
    pub fn status(&self) -> Status {
        self.lock_status().clone()
    }

    /// Returns the right to ask the plugin for the state, unless somebody else has it.
    pub fn start_state_query(self: &Arc<Self>) -> Option<StateQueryGuard> {
        let taken = self.querying_state.swap(true, Ordering::SeqCst);
        (!taken).then(|| StateQueryGuard(Arc::clone(self)))
    }

    /// Records a state that the host ordered.
    pub fn set_state(&self, state: State) {
        self.record_state(self.lock_status(), state, "");
    }

    /// Records a state that the plugin answered, unless the plugin has reported a state after its first
    /// `reports` reports: that one is newer than the answer.
    pub fn set_answered(&self, state: State, reports: u64) {
        let status = self.lock_status();
        if status.reports == reports {
            self.record_state(status, state, "");
        }
    }

    /// Records a state that the plugin reported, with its reason. An accident is kept as an error.
    pub fn set_reported(&self, state: State, reason: &str) {
        let mut status = self.lock_status();
        status.reports += 1;
        // A state change of a run that somebody else has started is no accident of the host's.
        if status.own_run && status.state != state && is_accident(state, reason) {
            tracing::warn!(machine = self.name(), %state, reason, "its state has changed by itself");
            let what = Error::failed(format!("the state became {state} by itself"));
            // Before the event: a subscriber may ask for the errors at once.
            status.add_error(what.detail(reason).machine(self.name()).to_string());
        }
        if !status.own_run && !matches!(state, State::Poweroff | State::Error | State::Stopping) {
            status.leave_alone(self.name());
        }
        self.record_state(status, state, reason);
    }

    /// Marks the current run, if there is one, as the host's own.
    pub fn set_own_run(&self) {
        let mut status = self.lock_status();
        status.own_run = status.state != State::Poweroff;
    }

    /// Marks the current run, if there is one, as adopted from an earlier host. Its age counts from its lock.
    pub fn set_adopted(&self) {
        self.lock_status().adopt_run();
    }

    /// Returns the begin of the host's own run, unless the run is to end already.
    pub fn own_run_to_end(&self) -> Option<Instant> {
        let status = self.lock_status();
        let goes_on = status.own_run && status.end_reason.is_none();
        status.run_begin.filter(|_| goes_on).map(|begin| begin.instant)
    }

    /// Records that the host ends the present run for this reason. The events of its end have it.
    pub fn end_run_for(&self, reason: String) {
        let mut status = self.lock_status();
        status.end_reason = Some(reason).filter(|_| status.own_run);
    }

    /// Records the state, and sends the event if the state is new.
    fn record_state(&self, mut status: MutexGuard<'_, Status>, state: State, reason: &str) {
        if status.state == state {
            return;
        }
        let reason = match &status.end_reason {
            Some(own) if reason.is_empty() => own.clone(),
            _ => reason.to_owned(),
        };
        status.set_state(state);
        if state == State::Poweroff {
            self.notify_idle_work();
        }
        // Sent under the lock, so that subscribers receive the changes in their order.
        self.events.send(Event::State { machine: self.name.clone(), state, reason });
    }

    /// Wakes the worker to prepare the next restore, or to have a pending change applied, once no action
    /// waits.
    pub fn notify_idle_work(&self) {
        self.idle_work.notify_one();
    }

    /// Waits for [`notify_idle_work`](Machine::notify_idle_work).
    pub async fn idle_work(&self) {
        self.idle_work.notified().await;
    }

    /// Records that the preparation of the next restore is lost, and has it made again a few times.
    pub fn preparation_lost(&self, reason: &str) {
        let again = self.lock_status().count_lost_preparation();
        let next =
            if again { "it is prepared again" } else { "it is not prepared again before its next start" };
        tracing::warn!(machine = self.name(), reason, next, "the preparation of its next restore is lost");
        if again {
            self.notify_idle_work();
        }
    }

    /// Records the readiness for the next restore.
    pub fn set_ready(&self, ready: &RestoreReadiness) {
        let mut status = self.lock_status();
        if status.ready.as_ref() == Some(ready) {
            return;
        }
        status.ready = Some(ready.clone());
        self.events.send(Event::Ready { machine: self.name.clone(), ready: ready.clone() });
    }

    /// Reports whether a change of the configuration waits for the machine.
    pub fn has_pending_change(&self) -> bool {
        self.lock_status().change_pending
    }

    /// Sets or clears the pending change, and wakes the worker: the machine may be free already.
    pub fn set_pending_change(&self, pending: bool) {
        self.lock_status().change_pending = pending;
        if pending {
            self.notify_idle_work();
        }
    }

    /// Forgets the steps of the last action.
    pub fn clear_steps(&self) {
        self.lock_status().steps.clear();
    }

    /// Records a step of the present action.
    pub fn add_step(&self, step: &str, took: Duration) {
        self.lock_status().add_step(step, took);
    }

    /// Records whether an action runs.
    pub fn set_busy(&self, busy: bool) {
        self.lock_status().busy = busy;
    }

    /// Keeps an error.
    pub fn add_error(&self, error: &str) {
        self.lock_status().add_error(error.to_owned());
    }

    /// Reports that the machine's traffic is not captured, or only in part, and keeps the error.
    pub fn capture_failed(&self, error: &Error) {
        let error = error.clone().action("capturing the traffic").machine(self.name()).to_string();
        tracing::error!(machine = self.name(), error, "its traffic is not captured as it should be");
        self.add_error(&error);
        self.events.send(Event::CaptureFailed { machine: self.name.clone(), reason: error });
    }

    /// Sends the progress of a long action, from 0.0 to 1.0.
    pub fn progress(&self, fraction: f64) {
        self.events.send(Event::Progress { machine: self.name.clone(), fraction });
    }

    /// Locks the status. It is whole after each statement that holds the lock, so poison means nothing.
    pub(super) fn lock_status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
