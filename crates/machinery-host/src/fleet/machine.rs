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
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use super::Machinery;
use super::availability::TaskLock;
use super::status::{Status, is_accident};
use crate::capture::tcpdump::Tcpdump;
use crate::events::{Event, Events};

/// The number of viewers that a machine's console has at a time, at most.
pub const MAX_VIEWERS: usize = 8;

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
    /// One permit for each viewer that the machine's console may have.
    pub viewers: Arc<Semaphore>,
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
            viewers: Arc::new(Semaphore::new(MAX_VIEWERS)),
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
            let error = what.detail(reason).machine(self.name()).to_string();
            status.add_error(error.clone());
            self.keep_run_error(&mut status, &error, true);
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

    /// Returns the text of an error of this machine.
    pub fn error(&self, what: &str) -> String {
        Error::failed(what).machine(self.name()).to_string()
    }

    /// Keeps an error.
    pub fn add_error(&self, error: &str) {
        self.lock_status().add_error(error.to_owned());
    }

    /// Reports that the machine's traffic is not captured for this task, or only in part, and keeps the error.
    pub fn capture_failed(&self, task: &TaskLock, error: &Error) {
        let error = error.clone().action("capturing the traffic").machine(self.name()).to_string();
        tracing::error!(machine = self.name(), error, "its traffic is not captured as it should be");
        self.add_error(&error);
        self.run_of_task_incomplete(task, &error);
        self.machinery.losses.captures.fetch_add(1, Ordering::Relaxed);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::fake_plugin::{info, machine};
    use crate::fleet::quarantine::Quarantine;
    use machinery::Readiness;
    use tokio::sync::broadcast::Receiver;
    use tokio::time::timeout;

    /// Returns the states and reasons that were sent since the last time.
    fn states(events: &mut Receiver<Event>) -> Vec<(State, String)> {
        std::iter::from_fn(|| events.try_recv().ok())
            .filter_map(|event| match event {
                Event::State { state, reason, .. } => Some((state, reason)),
                _ => None,
            })
            .collect()
    }

    /// Reports whether the worker has been woken since the last time.
    async fn is_woken(machine: &Machine) -> bool {
        timeout(Duration::ZERO, machine.idle_work()).await.is_ok()
    }

    #[test]
    fn state_is_queried_by_one_client_at_a_time() {
        let (machine, _) = machine();
        let guard = machine.start_state_query();
        assert!(guard.is_some() && machine.start_state_query().is_none());
        drop(guard);
        assert!(machine.start_state_query().is_some());
    }

    #[test]
    fn description_is_the_latest_one() {
        let (machine, _) = machine();
        machine.set_info(MachineInfo { ip: "10.0.0.9".into(), ..info("m") });
        assert_eq!(machine.info().ip, "10.0.0.9");
    }

    #[test]
    fn answered_state_is_dropped_when_the_plugin_has_reported_meanwhile() {
        let (machine, mut events) = machine();
        let reports = machine.status().reports;
        machine.set_reported(State::Running, "");
        machine.set_answered(State::Poweroff, reports);
        assert_eq!(states(&mut events), [(State::Running, String::new())]);
        machine.set_answered(State::Paused, machine.status().reports);
        assert_eq!(machine.status().state, State::Paused);
        // A state that is known already is no event.
        machine.set_answered(State::Paused, machine.status().reports);
        assert_eq!(states(&mut events), [(State::Paused, String::new())]);
    }

    #[test]
    fn reported_accident_is_an_error_of_the_hosts_own_run_only() {
        let (machine, _) = machine();
        let errors = || machine.status().errors;
        machine.set_reported(State::Running, "");
        machine.set_reported(State::Poweroff, "somebody has killed it");
        assert!(errors().is_empty(), "of somebody else");
        machine.set_state(State::Running);
        machine.set_own_run();
        machine.set_reported(State::Paused, "");
        assert!(errors().is_empty(), "no accident");
        machine.set_reported(State::Poweroff, "QEMU was killed");
        assert!(matches!(&errors()[..], [error] if error.contains("QEMU was killed")), "{:?}", errors());
        machine.set_state(State::Error);
        machine.set_own_run();
        machine.set_reported(State::Error, "again");
        assert_eq!(errors().len(), 1, "the state is no new one");
    }

    #[test]
    fn machine_is_left_alone_when_a_run_of_somebody_else_is_reported() {
        for (state, own, expected) in [
            (State::Running, false, true),
            (State::Running, true, false),
            (State::Poweroff, false, false),
            (State::Error, false, false),
            (State::Stopping, false, false),
        ] {
            let (machine, _) = machine();
            let mut status = machine.lock_status();
            status.availability.quarantine = Some(Quarantine::new("failed"));
            (status.state, status.own_run) = (State::Paused, own);
            drop(status);
            machine.set_reported(state, "");
            let quarantine = machine.status().availability.quarantine.unwrap();
            assert_eq!(quarantine.is_left_alone, expected, "{state} {own}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn worker_is_woken_when_the_machine_is_off_and_only_then() {
        let (machine, _) = machine();
        machine.set_state(State::Starting);
        machine.set_state(State::Running);
        assert!(!is_woken(&machine).await);
        machine.set_state(State::Poweroff);
        assert!(is_woken(&machine).await && !is_woken(&machine).await);
    }

    #[test]
    fn end_of_a_run_has_the_hosts_reason_where_the_plugin_gives_none() {
        let (machine, mut events) = machine();
        let too_long = || "too long".to_owned();
        machine.end_run_for(too_long());
        machine.set_state(State::Running);
        machine.set_own_run();
        assert_eq!(states(&mut events), [(State::Running, String::new())], "no run was to end");
        assert!(machine.own_run_to_end().is_some());
        machine.end_run_for(too_long());
        assert!(machine.own_run_to_end().is_none(), "it is to end already");
        machine.set_reported(State::Paused, "no space");
        machine.set_state(State::Stopping);
        assert_eq!(states(&mut events), [(State::Paused, "no space".into()), (State::Stopping, too_long())]);
    }

    #[test]
    fn adopted_run_is_the_hosts_own() {
        let (machine, _) = machine();
        machine.set_state(State::Running);
        assert!(machine.own_run_to_end().is_none());
        machine.set_adopted();
        assert!(machine.own_run_to_end().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn worker_is_woken_when_a_preparation_is_lost_for_the_first_two_times() {
        let (machine, _) = machine();
        for expected in [true, true, false] {
            machine.preparation_lost("QEMU was killed");
            assert_eq!(is_woken(&machine).await, expected);
        }
    }

    #[test]
    fn readiness_is_sent_only_when_it_changes() {
        let (machine, mut events) = machine();
        let ready = |mode| RestoreReadiness { mode, ..RestoreReadiness::default() };
        for mode in [Readiness::Standby, Readiness::Standby, Readiness::Plain] {
            machine.set_ready(&ready(mode));
        }
        assert_eq!(machine.status().ready, Some(ready(Readiness::Plain)));
        let sent: Vec<_> = std::iter::from_fn(|| events.try_recv().ok()).collect();
        let modes = sent.iter().map(|event| match event {
            Event::Ready { ready, .. } => ready.mode,
            other => panic!("{other:?}"),
        });
        assert_eq!(modes.collect::<Vec<_>>(), [Readiness::Standby, Readiness::Plain]);
    }

    #[tokio::test(start_paused = true)]
    async fn worker_is_woken_when_a_change_is_pending() {
        let (machine, _) = machine();
        machine.set_pending_change(true);
        assert!(machine.has_pending_change() && is_woken(&machine).await);
        machine.set_pending_change(false);
        assert!(!machine.has_pending_change() && !is_woken(&machine).await);
    }

    #[test]
    fn steps_are_those_of_one_action() {
        let (machine, _) = machine();
        let second = Duration::from_secs(1);
        machine.add_step("spawn", second);
        machine.clear_steps();
        machine.add_step("load", second);
        assert_eq!(machine.status().steps, [("load".to_owned(), second)]);
    }
}
