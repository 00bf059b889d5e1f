//! Ends a machine's run, or discards its standby.

use std::time::Duration;

use machinery::{Deadline, ErrorKind, Result};
use machinery_backend::{Operation, WorkState, refuse};

use super::base::Machine;
use super::state::{MachineOperation, MachineState, finish};
use crate::standby::Standby;

/// The grace of the QEMU of a cancelled preparation, before it is killed.
const CANCEL_GRACE: Duration = Duration::from_secs(3);

impl Machine {
    /// Pulls the plug. Of a machine that is off, cancels the preparation and discards the standby. The network stays until the
    /// host has ended its capture.
    ///
    /// # Errors
    /// The machine is off already, or starts; the process does not end.
    pub(super) fn pull_the_plug(&self, deadline: Deadline) -> Result<()> {
        self.cancel_preparation(deadline);
        let (mut stopping, (run, standby)) = self
            .work
            .begin(Operation::Discarding, deadline, |state| Ok((state.running(), state.standby.take())))?;
        let Some(run) = run else {
            self.end_standby(&stopping, standby, deadline)?;
            return Err(refuse::off_already());
        };
        stopping.continue_as(Operation::Stopping);
        finish(&stopping, run.end(deadline).map(|()| None))
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// The machine is off already, or starts; the guest does not react.
    pub(super) fn press_power_button(&self, deadline: Deadline) -> Result<()> {
        if self.work.lock().operation().is_hidden() {
            return Err(refuse::off_already());
        }
        let on = self
            .work
            .begin(Operation::Stopping, deadline, |state| state.running().ok_or_else(refuse::off_already));
        let (stopping, run) = on?;
        run.power_button(deadline)?;
        finish(&stopping, Ok(None))
    }

    /// Cancels a preparation and ends the standby; reports the machine's readiness then. The network stays, because the
    /// next run may be captured already.
    ///
    /// # Errors
    /// The preparation or QEMU does not end in time.
    pub(super) fn discard(&self, deadline: Deadline) -> Result<()> {
        self.cancel_preparation(deadline);
        let take = |state: &mut MachineState| Ok(state.standby.take());
        match self.work.begin(Operation::Discarding, deadline, take) {
            Ok((discarding, standby)) => self.end_standby(&discarding, standby, deadline),
            // A start or a stop has taken the standby.
            Err(error) if error.kind() == ErrorKind::UnexpectedState => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Ends the standby whose memory is needed. It waits for no other action.
    ///
    /// # Errors
    /// QEMU does not end in time; another action is under way.
    pub(super) fn give_back(&self, why: &str, deadline: Deadline) -> Result<()> {
        let take = |state: &mut MachineState| Ok(state.standby.take());
        let (discarding, standby) =
            self.work.begin(Operation::Discarding, Deadline::after(Duration::ZERO), take)?;
        if standby.is_some() {
            self.readiness.set_reason(why.to_owned());
        }
        self.end_standby(&discarding, standby, deadline)
    }

    fn end_standby(
        &self,
        discarding: &MachineOperation,
        standby: Option<Box<Standby>>,
        deadline: Deadline,
    ) -> Result<()> {
        let Some(standby) = standby else { return Ok(()) };
        finish(discarding, standby.end(deadline).map(|()| None))?;
        self.readiness.report();
        Ok(())
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

    /// Asks the QEMU of the standby to end, without waiting for it.
    pub(super) fn terminate_standby(&self) {
        self.work.lock().standby.iter().for_each(|standby| standby.terminate());
    }
}
