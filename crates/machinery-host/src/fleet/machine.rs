//! One machine.
//!
//! What it *is* (name, ip, tags) comes from its plugin, and changes only with the configuration, while
//! nobody has it. What it *does* (state) is in its [`Status`]: the worker writes what it ordered, the plugin reports what happened by itself.
//! Who *has* it is its [`Standing`]. Every change goes out as an event.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use machinery::{Error, GUEST_POWERED_OFF, MachineInfo, RestoreReadiness, State};
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::Machinery;
use super::standing::{Hold, NotHeld, Standing, Unavailable};
use crate::capture::Capture;
use crate::events::{Event, Events};

/// One machine.
pub struct Machine {
    name: String,
    info: RwLock<Arc<MachineInfo>>,
    /// Who drives it.
    pub machinery: Arc<Machinery>,
    status: Mutex<Status>,
    /// Whether its plugin is being asked for its state.
    asking: AtomicBool,
    /// What captures its traffic; held while that begins and ends.
    pub capture: tokio::sync::Mutex<Option<Capture>>,
    /// Told when its next restore should be prepared.
    preparation: Notify,
    events: Events,
}

/// The right to ask a machine's plugin for its state; one at a time has it.
pub struct Asking(Arc<Machine>);

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.asking.store(false, Ordering::SeqCst);
    }
}

/// What is known of a machine's doings.
#[derive(Debug, Clone)]
pub struct Status {
    /// Its state, as last ordered or reported.
    pub state: State,
    /// Whether an action is under way.
    pub busy: bool,
    /// Who has it, and whether it is in the pool.
    pub standing: Standing,
    /// What went wrong lately, oldest first.
    pub errors: Vec<String>,
    /// How often its plugin has reported a state.
    pub reports: u64,
    /// How ready it is for its next restore, if its plugin has told.
    pub ready: Option<RestoreReadiness>,
    /// What the action under way, or the last one, consisted of, and how long it took.
    pub steps: Vec<(String, Duration)>,
    /// How often what was prepared has gone by itself since the last start.
    pub relapses: u32,
    /// Whether its configuration has been replaced while it was in use.
    pub outdated: bool,
    /// The plugin's warnings about the machine.
    pub warnings: Vec<String>,
    /// Whether the host has started the current run. Only an operator ends a run that somebody else has
    /// started.
    pub own_run: bool,
}

impl Status {
    fn add_error(&mut self, error: String) {
        if self.errors.len() == ERRORS_KEPT {
            self.errors.remove(0);
        }
        self.errors.push(error);
    }

    /// Whether it is powered off and no task has it.
    pub fn is_free(&self) -> bool {
        self.state == State::Poweroff && self.standing.lock.is_none()
    }
}

/// How many errors are remembered for one machine.
const ERRORS_KEPT: usize = 20;

/// A preparation that has gone this often by itself is not made again before the next start.
const RELAPSES: u32 = 3;

/// An action has no more steps than this that are worth keeping.
const STEPS_KEPT: usize = 50;

/// Whether this reported state is an accident. A guest that powers itself off is no accident, and neither is
/// a state without a reason, which the host has ordered.
fn is_accident(state: State, reason: &str) -> bool {
    match state {
        State::Error => true,
        State::Poweroff | State::Paused | State::Suspended => {
            !reason.is_empty() && reason != GUEST_POWERED_OFF
        }
        State::Starting | State::Running | State::Stopping | State::Restored => false,
    }
}

impl Machine {
    /// A machine that was just loaded.
    pub fn new(info: MachineInfo, machinery: Arc<Machinery>, state: State, events: Events) -> Self {
        let standing = Standing::default();
        let status = Status {
            state,
            busy: false,
            standing,
            errors: Vec::new(),
            reports: 0,
            ready: None,
            steps: Vec::new(),
            relapses: 0,
            outdated: false,
            warnings: Vec::new(),
            own_run: false,
        };
        Machine {
            name: info.name.clone(),
            info: RwLock::new(Arc::new(info)),
            machinery,
            status: Mutex::new(status),
            asking: AtomicBool::new(false),
            capture: tokio::sync::Mutex::new(None),
            preparation: Notify::new(),
            events,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is.
    pub fn info(&self) -> Arc<MachineInfo> {
        Arc::clone(&self.info.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// It is otherwise from now on, of the same name.
    pub fn set_info(&self, info: MachineInfo) {
        *self.info.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(info);
    }

    /// What is known now.
    pub fn status(&self) -> Status {
        self.lock_status().clone()
    }

    /// The right to ask the plugin for the state, unless somebody asks already.
    pub fn ask(self: &Arc<Self>) -> Option<Asking> {
        let taken = self.asking.swap(true, Ordering::SeqCst);
        (!taken).then(|| Asking(Arc::clone(self)))
    }

    /// Notes a state that was ordered.
    pub fn set_state(&self, state: State) {
        self.note(self.lock_status(), state, "");
    }

    /// Notes a state that the plugin answered, unless it has reported one since there were
    /// `reports`: then the answer may be older than that.
    pub fn set_answered(&self, state: State, reports: u64) {
        let status = self.lock_status();
        if status.reports == reports {
            self.note(status, state, "");
        }
    }

    /// Records a state that the plugin has reported by itself, with its reason. An accident is kept as an
    /// error.
    pub fn set_reported(&self, state: State, reason: &str) {
        let mut status = self.lock_status();
        status.reports += 1;
        // A state change of a run that somebody else has started is no accident of the host's.
        if status.own_run && status.state != state && is_accident(state, reason) {
            tracing::warn!(machine = self.name(), %state, reason, "its state has changed by itself");
            let what = Error::failed(format!("the state became {state} by itself"));
            // Before the event: who hears that may ask for the errors at once.
            status.add_error(what.detail(reason).machine(self.name()).to_string());
        }
        self.note(status, state, reason);
    }

    /// Marks the current run, if there is one, as the host's own.
    pub fn set_own_run(&self) {
        let mut status = self.lock_status();
        status.own_run = status.state != State::Poweroff;
    }

    /// Records the state, and sends the event if the state is new.
    fn note(&self, mut status: MutexGuard<'_, Status>, state: State, reason: &str) {
        if status.state == state {
            return;
        }
        status.state = state;
        match state {
            State::Starting => status.relapses = 0,
            State::Poweroff => {
                status.own_run = false;
                self.preparation.notify_one();
            }
            _ => {}
        }
        // Sent under the lock, so that subscribers hear the changes in their order.
        self.events.send(Event::State { machine: self.name.clone(), state, reason: reason.to_owned() });
    }

    /// Its next restore should be prepared when there is nothing else to do.
    pub fn ask_preparation(&self) {
        self.preparation.notify_one();
    }

    /// Returns when its next restore should be prepared.
    pub async fn preparation_asked(&self) {
        self.preparation.notified().await;
    }

    /// What was prepared has gone by itself.
    pub fn relapsed(&self, reason: &str) {
        let mut status = self.lock_status();
        status.relapses += 1;
        let again = status.relapses < RELAPSES;
        drop(status);
        let next = if again { "it is made again" } else { "it is not made again before the next start" };
        tracing::warn!(machine = self.name(), reason, next, "what was prepared for its next restore is gone");
        if again {
            self.preparation.notify_one();
        }
    }

    /// Notes how ready it is for its next restore.
    pub fn set_ready(&self, ready: &RestoreReadiness) {
        let mut status = self.lock_status();
        if status.ready.as_ref() == Some(ready) {
            return;
        }
        status.ready = Some(ready.clone());
        self.events.send(Event::Ready { machine: self.name.clone(), ready: ready.clone() });
    }

    /// Whether its configuration has been replaced while it was in use.
    pub fn is_outdated(&self) -> bool {
        self.lock_status().outdated
    }

    /// Notes that, or that it is as configured. One that has become free meanwhile says so once more.
    pub fn set_outdated(&self, outdated: bool) {
        self.lock_status().outdated = outdated;
        if outdated {
            self.preparation.notify_one();
        }
    }

    /// An action begins: it has had no steps yet.
    pub fn clear_steps(&self) {
        self.lock_status().steps.clear();
    }

    /// Notes a step of the action under way.
    pub fn add_step(&self, step: &str, took: Duration) {
        let mut status = self.lock_status();
        if status.steps.len() < STEPS_KEPT {
            status.steps.push((step.to_owned(), took));
        }
    }

    /// Notes whether an action is under way.
    pub fn set_busy(&self, busy: bool) {
        self.lock_status().busy = busy;
    }

    /// Remembers an error.
    pub fn add_error(&self, error: &str) {
        self.lock_status().add_error(error.to_owned());
    }

    /// Gives it the standing it had before the host was started.
    pub fn recall(&self, standing: Standing) {
        let mut status = self.lock_status();
        // It may have been lost since.
        let Standing { disabled: lost, unusable, .. } = std::mem::take(&mut status.standing);
        let disabled = standing.disabled.or(lost);
        status.standing = Standing { disabled, unusable, ..standing };
    }

    /// Gives it to a task; tells whether that is new.
    ///
    /// # Errors
    /// It is not available to that task. A hold that the task has already is no error.
    pub fn lock(&self, hold: &Hold) -> Result<bool, Unavailable> {
        let mut status = self.lock_status();
        if status.standing.lock.as_ref() == Some(hold) && status.standing.disabled_reason().is_none() {
            return Ok(false);
        }
        if let Some(reason) = status.standing.hindrance(&hold.task_id) {
            return Err(Unavailable { machine: self.name.clone(), wanted: "locked", reason });
        }
        status.standing.lock = Some(hold.clone());
        let task_id = hold.task_id.clone();
        self.events.send(Event::Locked { machine: self.name.clone(), task_id });
        Ok(true)
    }

    /// Takes it back from its task; with a `task_id`, only from that one.
    ///
    /// # Errors
    /// Nobody has it, or another task.
    pub fn unlock(&self, task_id: Option<&str>) -> Result<(), NotHeld> {
        let mut status = self.lock_status();
        let machine = self.name.clone();
        let Some(hold) = &status.standing.lock else { return Err(NotHeld::NotLocked(machine)) };
        if task_id.is_some_and(|task_id| task_id != hold.task_id) {
            return Err(NotHeld::OfAnother { machine, holder: hold.task_id.clone() });
        }
        status.standing.lock = None;
        self.preparation.notify_one();
        self.events.send(Event::Unlocked { machine });
        Ok(())
    }

    /// Keeps it for a task; tells whether that is new.
    ///
    /// # Errors
    /// It is not available to that task.
    pub fn reserve(&self, task_id: &str) -> Result<bool, Unavailable> {
        let mut status = self.lock_status();
        let machine = self.name.clone();
        if let Some(reason) = status.standing.hindrance(task_id) {
            return Err(Unavailable { machine, wanted: "reserved", reason });
        }
        if status.standing.reserved_by.is_some() {
            return Ok(false);
        }
        status.standing.reserved_by = Some(task_id.to_owned());
        self.events.send(Event::Reserved { machine, task_id: task_id.to_owned() });
        Ok(true)
    }

    /// Keeps it for nobody any more.
    ///
    /// # Errors
    /// It is not reserved.
    pub fn unreserve(&self) -> Result<(), NotHeld> {
        let mut status = self.lock_status();
        let machine = self.name.clone();
        if status.standing.reserved_by.take().is_none() {
            return Err(NotHeld::NotReserved(machine));
        }
        self.events.send(Event::Unreserved { machine });
        Ok(())
    }

    /// The task's hold on it, if one has it.
    pub fn hold(&self) -> Option<Hold> {
        self.lock_status().standing.lock.clone()
    }

    /// Takes the machine out of the pool.
    pub fn disable(&self, reason: &str) {
        tracing::error!(machine = self.name(), reason, "machine disabled");
        let mut status = self.lock_status();
        status.standing.disabled = Some(reason.to_owned());
        self.events.send(Event::Disabled { machine: self.name.clone(), reason: reason.to_owned() });
    }

    /// Puts it back.
    pub fn enable(&self) {
        if self.lock_status().standing.disabled.take().is_some() {
            tracing::info!(machine = self.name(), "machine enabled");
            self.preparation.notify_one();
            self.events.send(Event::Enabled { machine: self.name.clone() });
        }
    }

    /// Records the plugin's diagnosis. A machine that the plugin cannot use leaves the pool until it can be
    /// used again.
    pub fn set_diagnosis(&self, unusable: Option<&Error>, warnings: Vec<String>) {
        let mut status = self.lock_status();
        let new: Vec<_> = warnings.iter().filter(|warning| !status.warnings.contains(warning)).collect();
        for warning in new {
            tracing::warn!(machine = self.name(), warning, "its plugin warns");
        }
        status.warnings = warnings;
        let unusable = unusable.map(Error::to_string);
        if status.standing.unusable == unusable {
            return;
        }
        match &unusable {
            Some(reason) => tracing::error!(machine = self.name(), reason, "machine cannot be used"),
            None => tracing::info!(machine = self.name(), "machine can be used again"),
        }
        let before = std::mem::replace(&mut status.standing.unusable, unusable.clone());
        // A machine that an operator or an error has disabled stays disabled, for the same reason as before.
        if status.standing.disabled.is_some() {
            return;
        }
        let machine = self.name.clone();
        match unusable {
            Some(reason) => self.events.send(Event::Disabled { machine, reason }),
            None if before.is_some() => {
                self.preparation.notify_one();
                self.events.send(Event::Enabled { machine });
            }
            None => {}
        }
    }

    /// Tells and remembers that its traffic is not, or not wholly, captured.
    pub fn capture_failed(&self, error: &Error) {
        let error = error.clone().action("capturing the traffic").machine(self.name()).to_string();
        tracing::error!(machine = self.name(), error, "its traffic is not captured as it should be");
        self.add_error(&error);
        self.events.send(Event::CaptureFailed { machine: self.name.clone(), reason: error });
    }

    /// Tells how far a long action is.
    pub fn progress(&self, fraction: f64) {
        self.events.send(Event::Progress { machine: self.name.clone(), fraction });
    }

    /// Returns the keys that Cuckoo3's `Machine.from_dict` reads, and `ready`, `outdated` and `warnings`.
    pub fn to_json(&self) -> Value {
        let info = self.info();
        let status = self.lock_status();
        let Standing { lock, reserved_by, .. } = &status.standing;
        let disabled = status.standing.disabled_reason();
        json!({
            "name": info.name,
            "label": info.label,
            "ip": info.ip,
            "platform": info.platform,
            "os_version": info.os_version,
            "tags": info.tags,
            "snapshot": info.snapshot,
            "architecture": info.architecture,
            "interface": info.interface,
            "agent_port": info.agent_port,
            "mac_address": info.mac_address,
            "machinery_name": self.machinery.name,
            "state": status.state,
            "locked": lock.is_some(),
            "locked_by": lock.as_ref().map_or("", |hold| &hold.task_id),
            "reserved": reserved_by.is_some(),
            "reserved_by": reserved_by.as_deref().unwrap_or(""),
            "disabled": disabled.is_some(),
            "disabled_reason": disabled.unwrap_or(""),
            "errors": status.errors,
            "ready": status.ready,
            "outdated": status.outdated,
            "warnings": status.warnings,
        })
    }

    /// Status is whole after each statement that holds the lock, so poison means nothing.
    fn lock_status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reported_state_is_an_accident_unless_it_was_ordered_or_the_guest_powered_itself_off() {
        assert!(is_accident(
            State::Error,
            "the disk failed and the guest was paused: No space left on device"
        ));
        assert!(is_accident(State::Error, ""));
        assert!(is_accident(State::Poweroff, "QEMU was killed by signal 9"));
        assert!(is_accident(State::Suspended, "the guest suspended itself"));
        assert!(!is_accident(State::Poweroff, GUEST_POWERED_OFF));
        assert!(!is_accident(State::Poweroff, ""));
        assert!(!is_accident(State::Stopping, GUEST_POWERED_OFF));
        assert!(!is_accident(State::Running, "the guest woke up"));
    }
}
