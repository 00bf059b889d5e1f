//! The state of one machine: its run, and its standby. The operation under way is in the [`Work`](machinery_backend::Work) around them.
//!
//! ```text
//!   run │ standby │ the machine is
//!   ────┼─────────┼───────────────────────────────────────────────
//!    –  │    –    │ off
//!    –  │   yes   │ off for the host, and a restore resumes the standby
//!   yes │    –    │ on; also after a failed action whose QEMU does not end
//! ```
//!
//! An operation takes the standby out, and puts one in again or a run in its place.

use std::sync::{Arc, Weak};
use std::time::Duration;

use machinery::{Deadline, Result, State};
use machinery_backend::{Operation, UnderWay, WorkState, refuse};
use qapi::qmp;

use super::Machine;
use crate::run::Run;
use crate::run::start_error::StartError;
use crate::standby::Standby;
use crate::states::state_of_status;

/// The grace of the QEMU of a cancelled preparation, before it is killed.
const CANCEL_GRACE: Duration = Duration::from_secs(3);

/// The run and the standby of a machine.
#[derive(Default)]
pub struct MachineState {
    /// The run. It may have ended by itself.
    run: Option<Arc<Run>>,
    /// The run of the operation under way, once it exists.
    begun: Weak<Run>,
    pub(super) standby: Option<Box<Standby>>,
}

impl MachineState {
    /// Returns the run, if the machine is on.
    pub(super) fn running(&self) -> Option<Arc<Run>> {
        self.run.clone().filter(|run| !run.has_ended())
    }

    /// Takes the standby of a machine that is off.
    ///
    /// # Errors
    /// The machine is on.
    pub(super) fn take_standby(&mut self) -> Result<Option<Box<Standby>>> {
        if self.running().is_some() {
            return Err(refuse::not_off());
        }
        self.run = None;
        Ok(self.standby.take())
    }
}

/// An operation on a machine, until it is dropped.
pub(super) type MachineOperation = UnderWay<MachineState>;

/// Ends an operation in which QEMU was started or a standby was ended. A QEMU that does not end still has the disk and
/// the socket, so the machine is on then.
pub(super) fn finish(
    operation: &MachineOperation,
    outcome: Result<Option<Arc<Run>>, StartError>,
) -> Result<()> {
    let (run, outcome) = match outcome {
        Ok(run) => (run, Ok(())),
        Err(StartError { error, still_running, .. }) => (still_running, Err(error)),
    };
    operation.lock().run = run;
    outcome
}

/// Has a cancellation of the operation end this run.
pub(super) fn end_when_cancelled(operation: &MachineOperation, run: &Arc<Run>) {
    let begun = Arc::downgrade(run);
    operation.lock().begun = Weak::clone(&begun);
    operation.cancellation().on_cancel(move || begun.upgrade().iter().for_each(|run| run.terminate()));
}

impl Machine {
    /// Returns the machine's state, from QEMU if the machine is on.
    ///
    /// # Errors
    /// QEMU does not answer, and has not ended.
    pub(super) fn current_state(&self, deadline: Deadline) -> Result<State> {
        let run = match &*self.work.lock() {
            state if state.operation() == Operation::Starting => return Ok(State::Starting),
            state => match &state.run {
                None => return Ok(State::Poweroff),
                Some(run) if run.has_just_resumed() => return Ok(State::Running),
                Some(run) => Arc::clone(run),
            },
        };
        match run.execute(&qmp::query_status {}, deadline) {
            Ok(status) => state_of_status(status["status"].as_str().unwrap_or("")),
            Err(error) => {
                // A monitor that fails is the first sign of the end.
                if run.ends_within_grace(deadline) { Ok(State::Poweroff) } else { Err(error) }
            }
        }
    }

    /// Returns the run of a machine that is on.
    ///
    /// # Errors
    /// The machine is off.
    pub(super) fn running(&self) -> Result<Arc<Run>> {
        self.work.lock().running().ok_or_else(refuse::off)
    }

    /// Cancels a preparation. The next operation waits for its end.
    pub(super) fn cancel_preparation(&self, deadline: Deadline) {
        if !self.work.cancel_preparation() {
            return;
        }
        let is_preparing = |state: &WorkState<MachineState>| state.operation() == Operation::Preparing;
        let state = self.work.wait_while(deadline.within(CANCEL_GRACE), is_preparing);
        let hanging = if is_preparing(&state) { state.begun.upgrade() } else { None };
        drop(state);
        hanging.iter().for_each(|run| run.kill());
    }

    /// Waits for the end of a run whose monitor has closed: the host learns of the end a moment earlier.
    pub(super) fn wait_for_pending_end(&self, deadline: Deadline) {
        let run = self.work.lock().run.clone().filter(|run| run.qmp().is_closed());
        if let Some(run) = run {
            run.ends_within_grace(deadline);
        }
    }

    /// Waits until no preparation is under way, and no standby ends.
    pub(super) fn wait_for_hidden_work(&self, deadline: Deadline) {
        drop(self.work.wait_while(deadline, |state| state.operation().is_hidden()));
    }

    /// Reports whether the machine is on or starts.
    pub(super) fn is_on(&self) -> bool {
        let state = self.work.lock();
        state.operation() == Operation::Starting || state.running().is_some()
    }

    /// Reports whether the machine is off, without a standby, and nothing is under way.
    pub(super) fn is_idle_without_qemu(&self) -> bool {
        let state = self.work.lock();
        state.operation() == Operation::Idle && state.run.is_none() && state.standby.is_none()
    }

    /// Reports whether the next restore is prepared or being prepared.
    pub(super) fn has_preparation(&self) -> bool {
        let state = self.work.lock();
        state.operation().is_hidden() || state.standby.is_some()
    }

    /// Asks the QEMU of the standby to end, without waiting for it.
    pub(super) fn terminate_standby(&self) {
        self.work.lock().standby.iter().for_each(|standby| standby.terminate());
    }
}
