//! Ends a machine's run, or discards its standby.

use machinery::{Deadline, Error, Result};

use super::Machine;
use crate::peers::Peer;

impl Machine {
    /// Pulls the plug. Of a machine that is off, discards the standby.
    ///
    /// # Errors
    /// The machine is off already; the process does not end.
    pub fn stop(&self, deadline: Deadline) -> Result<()> {
        let Some(run) = self.slot.running() else {
            self.discard_standby(deadline)?;
            return Err(off_already());
        };
        run.stop(deadline)?;
        self.slot.set_off();
        Ok(())
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// The machine is off already; the guest does not react.
    pub fn acpi_stop(&self, deadline: Deadline) -> Result<()> {
        let run = self.slot.running().ok_or_else(off_already)?;
        run.power_button(deadline)?;
        self.slot.set_off();
        Ok(())
    }

    /// Checks that the machine is off, so that it can be changed or removed. It may have a standby.
    ///
    /// # Errors
    /// The machine is on.
    pub fn ensure_off(&self, deadline: Deadline) -> Result<()> {
        if !self.slot.is_on(deadline) {
            return Ok(());
        }
        let on = Error::unexpected_state("the machine is on, so it cannot be changed or removed");
        Err(on.machine(self.name()).advice("Stop it, and reload again"))
    }

    /// Asks the QEMU of the standby to end, without waiting for it.
    pub fn terminate_standby(&self) {
        self.slot.terminate_standby();
    }
}

fn off_already() -> Error {
    Error::state_reached("the machine is powered off already")
}
