//! The machine itself: its parts, its lock, its operations, and its reports to the host.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use machinery::{Budget, Deadline, Error, Host, MachineInfo, Reloadable, RestoreReadiness, Result, State};
use virt::connect::Connect;

use super::state::{Activity, MachineState, Operation};
use crate::config::Keys;
use crate::domain;
use crate::foreign::DiskRecord;
use crate::link::Link;
use crate::run_marker::RunMarker;
use crate::states::StateReport;

/// The maximum time between libvirt's answer that a domain has ended and the event of that end.
pub const END_EVENT_TIMEOUT: Duration = Duration::from_secs(2);

/// One machine of the configuration.
pub struct Machine {
    pub(super) keys: Keys,
    pub(super) link: Arc<Link>,
    pub(super) host: Host,
    pub(super) marker: RunMarker,
    pub(super) disk_record: DiskRecord,
    /// The memory for the standbys of all machines.
    pub(super) budget: Arc<Budget>,
    state: Mutex<MachineState>,
    /// Wakes the threads that wait for the end of a run or of an operation.
    changed: Condvar,
}

/// An operation that is under way until this value is dropped.
pub struct OperationGuard<'a>(pub &'a Machine);

impl Drop for OperationGuard<'_> {
    fn drop(&mut self) {
        self.0.lock().operation = Operation::Idle;
        self.0.changed.notify_all();
    }
}

impl Reloadable for Machine {
    type Keys = Keys;

    fn key_name(keys: &Keys) -> &str {
        &keys.info.name
    }

    fn unique(keys: &Keys) -> Vec<(&'static str, Option<&str>)> {
        keys.info.unique()
    }

    fn keys(&self) -> &Keys {
        &self.keys
    }
}

impl Machine {
    pub fn new(keys: Keys, budget: Arc<Budget>, link: Arc<Link>, state_dir: &Path, host: Host) -> Self {
        let marker = RunMarker::of(&keys.info.name, state_dir);
        let disk_record = DiskRecord::of(&keys.info.name, state_dir);
        let (state, changed) = (Mutex::default(), Condvar::new());
        Machine { keys, link, host, marker, disk_record, budget, state, changed }
    }

    pub fn info(&self) -> &MachineInfo {
        &self.keys.info
    }

    pub fn name(&self) -> &str {
        &self.keys.info.name
    }

    /// Returns the name of the machine's domain.
    pub fn label(&self) -> &str {
        &self.keys.info.label
    }

    /// Returns the name of the snapshot to restore; `None` is the domain's current one.
    pub(super) fn wanted_snapshot(&self) -> Option<&str> {
        self.keys.info.snapshot.as_deref()
    }

    /// Reports whether the domain has an own run, as far as is known.
    pub(super) fn has_run(&self) -> bool {
        self.lock().has_run
    }

    /// Reports whether the machine has a run or a standby, which a shutdown must end.
    pub fn has_anything_to_end(&self) -> bool {
        let state = self.lock();
        state.has_run || state.is_hidden()
    }

    pub(super) fn is_hidden(&self) -> bool {
        self.forget_ended_preparation();
        self.lock().is_hidden()
    }

    /// Begins an operation, after the hidden work that is under way.
    ///
    /// # Errors
    /// The hidden work does not end in time; another operation is under way.
    pub(super) fn begin(&self, operation: Operation, deadline: Deadline) -> Result<OperationGuard<'_>> {
        let mut state = self.wait_while(deadline.remaining(), |state| state.operation.is_hidden());
        if state.operation.is_hidden() {
            return Err(deadline.timeout("the standby to end"));
        }
        if state.operation != Operation::Idle {
            return Err(Error::unexpected_state("another action on the machine is under way"));
        }
        state.operation = operation;
        state.start_event = None;
        state.cancel_prepare = Arc::default();
        state.was_reset = false;
        state.connection_lost = false;
        Ok(OperationGuard(self))
    }

    pub(super) fn activity(&self) -> Activity {
        self.lock().activity()
    }

    /// Forgets an abandoned preparation once it has ended.
    fn forget_ended_preparation(&self) {
        if self.lock().abandoned.as_ref().is_some_and(|call| !call.is_start) {
            self.abandoned_call_has_ended(Deadline::after(Duration::ZERO));
        }
    }

    /// Waits until the abandoned call has ended, at most until the deadline; returns whether there is none
    /// any more.
    pub(super) fn abandoned_call_has_ended(&self, deadline: Deadline) -> bool {
        let Some(abandoned) = self.lock().abandoned.clone() else { return true };
        // Another thread that waits for the call sees its end first.
        let Ok(call) = abandoned.call.try_lock() else { return false };
        let ended = call.wait(deadline.remaining()).is_some();
        if ended {
            self.lock().abandoned = None;
        }
        ended
    }

    /// Counts an end of a run, and wakes the threads that wait for it.
    pub(super) fn signal_end(&self) {
        self.lock().end_count += 1;
        self.changed.notify_all();
    }

    /// Waits until libvirt has reported more than `before` ends; returns whether it has.
    pub(super) fn wait_for_end(&self, before: u64, deadline: Deadline) -> bool {
        self.wait_while(deadline.remaining(), |state| state.end_count == before).end_count != before
    }

    /// Waits while the condition is true, at most for `limit`.
    pub(super) fn wait_while(
        &self,
        limit: Duration,
        condition: impl Fn(&MachineState) -> bool,
    ) -> MutexGuard<'_, MachineState> {
        let waited = self.changed.wait_timeout_while(self.lock(), limit, |state| condition(state));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Each statement that holds the lock leaves the value whole, so poison means nothing.
    pub(super) fn lock(&self) -> MutexGuard<'_, MachineState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queries the domain's state.
    ///
    /// # Errors
    /// libvirt does not answer; there is no such domain.
    pub(super) fn query_state(&self, deadline: Deadline) -> Result<StateReport> {
        let label = self.label().to_owned();
        let ask = move |connect: &Connect| domain::state(&domain::domain(connect, &label)?);
        self.link.ask(deadline, "libvirt to report the domain's state", ask)
    }

    /// Reports an event's state to the host, unless it is a step of the operation under way.
    pub(super) fn report(&self, operation: Operation, (state, reason): StateReport) {
        let machine = self.name();
        match operation {
            Operation::Starting => tracing::debug!(machine, %state, reason, "a step of the start"),
            Operation::Stopping if state == State::Poweroff => self.report_state(state, ""),
            Operation::Stopping => tracing::debug!(machine, %state, reason, "a step of the stop"),
            // The event of the own start may come after the start has returned.
            _ if state == State::Running && self.lock().host_knows_running => {}
            _ => self.report_state(state, &reason),
        }
    }

    /// Reports a state to the host.
    pub(super) fn report_state(&self, state: State, reason: &str) {
        self.lock().host_knows_running = state == State::Running;
        self.host.state_changed(self.name(), state, reason);
    }

    /// Reports to the host that the next restore is a plain one, and why.
    pub(super) fn report_plain(&self, why: &str) {
        let ready = RestoreReadiness { reason: why.to_owned(), ..RestoreReadiness::default() };
        self.host.ready(self.name(), &ready);
    }

    /// Reports to the host how long a step of an action takes.
    pub(super) fn timed<T>(&self, step: &str, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let done = work();
        self.host.step(self.name(), step, begun.elapsed());
        done
    }

    /// Reports how long the connection of a start takes to open: over ssh that is a session.
    pub(super) fn connect_step(&self) -> impl FnOnce(Duration) + Send + 'static {
        let (host, name) = (self.host.clone(), self.name().to_owned());
        move |time| host.step(&name, "connect", time)
    }
}
