//! The network of the next run, which the host has opened before it begins to capture.

use machinery::{Deadline, Result};
use machinery_backend::cell::{self, Cell};
use machinery_backend::{Operation, refuse};

use super::base::Machine;
use super::state::{MachineOperation, finish};
use crate::isolation::{expect_isolated, has_interface, spec_of};
use crate::run::start_error::StartError;

impl Machine {
    /// Opens the network of the next run, unless there is one. A standby that the next restore can use has one.
    ///
    /// # Errors
    /// The machine is on, or its network cannot be made.
    pub(super) fn open_cell(&self, deadline: Deadline) -> Result<()> {
        let begun = self.work.begin(Operation::Starting, deadline, |state| {
            let standby = state.take_standby().map_err(|_| refuse::not_off())?;
            Ok((standby, state.cell.is_some()))
        });
        let (opening, (standby, has_cell)) = begun?;
        if let Some(standby) = standby {
            match self.identity().map(|identity| standby.stale_reason(&identity)) {
                Ok(None) if has_interface(self.files()) => {
                    opening.lock().standby = Some(standby);
                    let spec = spec_of(self.files());
                    return spec.map_or(Ok(()), |spec| cell::renew_rules(&spec, deadline));
                }
                _ => finish(&opening, standby.end(deadline).map(|()| None))?,
            }
        }
        if !has_cell {
            self.clear_unknown_leftovers()?;
            self.expect_no_leftovers()?;
            let cell = self.new_cell(deadline)?;
            opening.lock().cell = cell;
        }
        Ok(())
    }

    /// Returns the network of a run that begins: the opened one, or a new one. None if the network is the operator's.
    pub(super) fn take_cell(
        &self,
        operation: &MachineOperation,
        deadline: Deadline,
    ) -> Result<Option<Cell>, StartError> {
        let opened = operation.lock().cell.take();
        Ok(match opened {
            Some(cell) => Some(cell),
            None => self.new_cell(deadline)?,
        })
    }

    fn new_cell(&self, deadline: Deadline) -> Result<Option<Cell>> {
        let files = self.files();
        expect_isolated(files)?;
        self.past_cell.close(self.name());
        spec_of(files).map(|spec| Cell::open(&spec, deadline)).transpose()
    }

    /// Removes the network that a run of an earlier host has left, whose interface was recorded.
    pub(super) fn clear_cell(&self, recorded: Option<String>) -> Result<()> {
        self.past_cell.close(self.name());
        let configured = self.files().isolation.as_ref().map(|isolation| isolation.interface.clone());
        recorded.or(configured).as_deref().map_or(Ok(()), cell::remove)
    }
}
