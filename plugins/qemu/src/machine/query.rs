//! The present state of a machine.

use std::sync::Arc;

use machinery::{Deadline, Result, State};
use machinery_backend::{Operation, refuse};
use qapi::qmp;

use super::base::Machine;
use crate::run::Run;
use crate::states::state_of_status;

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

    /// Reports whether the machine has a QEMU, or is about to have one.
    pub(super) fn uses_resources(&self) -> bool {
        let state = self.work.lock();
        let is_busy = state.operation() == Operation::Starting || state.operation().is_hidden();
        is_busy || state.standby.is_some() || state.running().is_some()
    }

    /// Reports whether the next restore is prepared or being prepared.
    pub(super) fn has_preparation(&self) -> bool {
        let state = self.work.lock();
        state.operation().is_hidden() || state.standby.is_some()
    }
}
