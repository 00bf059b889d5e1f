//! Read-only actions: the machine's state, its memory and its screen. A hidden domain counts as off.

use std::path::Path;

use machinery::{Deadline, DumpFormat, Result, State};
use machinery_backend::{Operation, refuse};

use super::base::Machine;
use crate::inspect;

impl Machine {
    /// Returns the machine's state.
    ///
    /// # Errors
    /// libvirt does not answer.
    pub fn state(&self, deadline: Deadline) -> Result<State> {
        deadline.check("libvirt to report the domain's state")?;
        if self.lock().operation() == Operation::Starting {
            return Ok(State::Starting);
        }
        if self.is_hidden() {
            return Ok(State::Poweroff);
        }
        if !self.abandoned_call_has_ended(deadline) {
            return Ok(State::Starting);
        }
        let (state, why) = self.query_state(deadline)?;
        if state == State::Error {
            // The answer carries no reason, and this state needs one.
            self.report_state(state, &why);
        }
        Ok(state)
    }

    /// Writes the guest's memory to a file: [`inspect::dump_memory`].
    ///
    /// # Errors
    /// The machine is off; the dump fails.
    pub fn dump_memory(&self, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        self.ensure_visible()?;
        let progress = |fraction| self.shared.host.progress(self.name(), fraction);
        inspect::dump_memory(&self.shared.connection, self.label(), path, format, &progress, deadline)
    }

    /// Writes the guest's screen to a file: [`inspect::screenshot`].
    ///
    /// # Errors
    /// The machine is off; the screenshot fails.
    pub fn screenshot(&self, path: &Path, deadline: Deadline) -> Result<()> {
        self.ensure_visible()?;
        inspect::screenshot(&self.shared.connection, self.label(), path, deadline)
    }

    fn ensure_visible(&self) -> Result<()> {
        match self.is_hidden() {
            true => Err(refuse::off()),
            false => Ok(()),
        }
    }
}
