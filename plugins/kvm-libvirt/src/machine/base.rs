//! The machine itself: its parts, its operations, and its reports to the host.

use std::path::Path;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use machinery::{Deadline, RestoreReadiness, Result, State};
use machinery_backend::{Operation, ReadinessReport, Steps, UnderWay, Work, WorkState, refuse};
use virt::connect::Connect;

use super::state::{Activity, MachineState, is_hidden};
use crate::config::Keys;
use crate::connection::Connection;
use crate::domain;
use crate::foreign::DiskRecord;
use crate::leftovers::RunMarker;
use crate::shared::Kvm;
use crate::states::StateReport;

/// The maximum time between libvirt's answer that a domain has ended and the event of that end.
pub const END_EVENT_TIMEOUT: Duration = Duration::from_secs(2);

/// One machine of the configuration.
pub struct Machine {
    pub(super) keys: Keys,
    pub(super) shared: Arc<Kvm>,
    /// The connection to the domain's libvirt.
    pub(super) connection: Arc<Connection>,
    pub(super) marker: RunMarker,
    pub(super) disk_record: DiskRecord,
    pub(super) readiness: ReadinessReport,
    pub(super) work: Arc<Work<MachineState>>,
}

impl Machine {
    pub fn new(keys: Keys, shared: Arc<Kvm>, state_dir: &Path) -> Self {
        let name = &keys.info.name;
        let marker = RunMarker::of(name, state_dir).of_libvirt(&keys.dsn);
        let disk_record = DiskRecord::of(name, state_dir);
        let connection = shared.connections.of(&keys.dsn);
        let readiness = ReadinessReport::new(&shared.host, name);
        // Read before any event, which may remove the marker.
        let state = MachineState { left_run: marker.resumed_id(), ..MachineState::default() };
        Machine { keys, shared, connection, marker, disk_record, readiness, work: Work::new(state) }
    }

    pub(super) fn name(&self) -> &str {
        &self.keys.info.name
    }

    /// Returns the name of the machine's domain.
    pub fn label(&self) -> &str {
        &self.keys.info.label
    }

    /// Returns the connection to the domain's libvirt.
    pub fn connection(&self) -> &Arc<Connection> {
        &self.connection
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
    pub(super) fn has_anything_to_end(&self) -> bool {
        let state = self.lock();
        state.has_run || is_hidden(&state)
    }

    pub(super) fn is_hidden(&self) -> bool {
        self.forget_ended_preparation();
        is_hidden(&self.lock())
    }

    /// Expects that the domain is not hidden.
    ///
    /// # Errors
    /// It is, so the machine counts as off.
    pub(super) fn ensure_visible(&self) -> Result<()> {
        if self.is_hidden() { Err(refuse::off()) } else { Ok(()) }
    }

    /// Begins an operation, after the hidden work that is under way.
    ///
    /// # Errors
    /// The hidden work does not end in time; another operation is under way.
    pub(super) fn begin(&self, operation: Operation, deadline: Deadline) -> Result<UnderWay<MachineState>> {
        let enter = |state: &mut MachineState| {
            state.forget_events();
            Ok(())
        };
        Ok(self.work.begin(operation, deadline, enter)?.0)
    }

    pub(super) fn activity(&self) -> Activity {
        Activity::of(&self.lock())
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
        self.work.notify();
    }

    /// Waits until libvirt has reported more than `before` ends; returns whether it has.
    pub(super) fn wait_for_end(&self, before: u64, deadline: Deadline) -> bool {
        self.work.wait_while(deadline, |state| state.end_count == before).end_count != before
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, WorkState<MachineState>> {
        self.work.lock()
    }

    /// Queries the domain's state.
    ///
    /// # Errors
    /// libvirt does not answer; there is no such domain.
    pub(super) fn query_state(&self, deadline: Deadline) -> Result<StateReport> {
        let label = self.label().to_owned();
        let ask = move |connect: &Connect| domain::state(&domain::domain(connect, &label)?);
        self.connection.ask(deadline, "libvirt to report the domain's state", ask)
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
        self.shared.host.state_changed(self.name(), state, reason);
    }

    /// Reports to the host that the next restore is a plain one, and why.
    pub(super) fn report_plain(&self, why: &str) {
        self.readiness.set_plain(why);
        self.readiness.report();
    }

    /// Notes that the next run has overlays, because the machine has a save image of that size.
    pub(super) fn note_image(&self, size: u64) {
        self.lock().own_disk = None;
        self.readiness.set_instant(size);
    }

    /// Notes that the next run writes to the domain's own disk, and why. That also holds for a standby.
    pub(super) fn note_own_disk(&self, why: &str) {
        self.lock().own_disk = Some(why.to_owned());
        self.readiness.set_plain(why);
    }

    /// Returns the readiness with a standby that holds so much memory.
    pub(super) fn readiness_with_standby(&self, memory: u64) -> RestoreReadiness {
        let reason = self.lock().own_disk.clone().unwrap_or_default();
        RestoreReadiness { reason, ..self.readiness.with_standby(memory) }
    }

    /// Reports to the host why there is no standby. A save image is still valid.
    pub(super) fn report_no_standby(&self, why: &str) {
        let own_disk = self.lock().own_disk.clone().filter(|own_disk| own_disk != why);
        let reasons: Vec<String> = [why.to_owned()].into_iter().chain(own_disk).collect();
        self.readiness.set_reason(reasons.join("; "));
        self.readiness.report();
    }

    /// Reports to the host how long the steps of an action take.
    pub(super) fn steps(&self) -> Steps {
        Steps::new(&self.shared.host, self.name())
    }

    /// Reports how long the connection of a start takes to open: over ssh that is a session.
    pub(super) fn connect_step(&self) -> impl FnOnce(Duration) + Send + 'static {
        let (host, name) = (self.shared.host.clone(), self.name().to_owned());
        move |time| host.step(&name, "connect", time)
    }
}
