//! The network of the machine, which the host has opened before it begins to capture the next run.
//!
//! ```text
//! open_network ─▶ cell ─▶ standby, template or snapshot: each QEMU of the start is in that cell ─▶ run ─▶ close_network
//! ```

use std::sync::Arc;

use machinery::{Deadline, Result};
use machinery_backend::cell::{self, Cell};
use machinery_backend::{Operation, refuse};

use super::base::Machine;
use super::state::finish;
use crate::isolation::{expect_isolated, has_interface, spec_of};

impl Machine {
    /// Opens the network of the next run. A standby that the next restore can use has one.
    ///
    /// # Errors
    /// The machine is on, or its network cannot be made.
    pub(super) fn open_cell(&self, deadline: Deadline) -> Result<()> {
        let begun = self.work.begin(Operation::Starting, deadline, |state| {
            state.take_standby().map_err(|_| refuse::not_off())
        });
        let (opening, standby) = begun?;
        if let Some(standby) = standby {
            let identity = self.identity();
            match identity.as_ref().map(|identity| standby.stale_reason(identity)) {
                Ok(None) if self.usable_cell().is_some() => {
                    let mut opened = opening.lock();
                    (opened.standby, opened.identity) = (Some(standby), identity.ok());
                    drop(opened);
                    let spec = spec_of(self.files());
                    return spec.map_or(Ok(()), |spec| cell::renew_rules(&spec, deadline));
                }
                _ => {
                    finish(&opening, standby.end(deadline).map(|()| None))?;
                    self.readiness.report();
                }
            }
        }
        self.clear_unknown_leftovers()?;
        self.expect_no_leftovers()?;
        self.new_cell(deadline).map(drop)
    }

    /// Returns the network of a QEMU that is started: the machine's, or a new one. None if the network is the operator's.
    pub(super) fn cell_of_start(&self, deadline: Deadline) -> Result<Option<Arc<Cell>>> {
        match self.usable_cell() {
            Some(cell) => Ok(Some(cell)),
            None => self.new_cell(deadline),
        }
    }

    /// Closes the network once no QEMU needs it.
    pub(super) fn close_cell(&self) {
        let state = self.work.lock();
        let is_used = state.standby.is_some() || state.running().is_some();
        drop(state);
        if !is_used {
            self.cell.close(self.name());
        }
    }

    /// Removes the network that a run of an earlier host has left, whose interface was recorded.
    pub(super) fn clear_cell(&self, recorded: Option<String>) -> Result<()> {
        self.cell.close(self.name());
        let configured = self.files().isolation.as_ref().map(|isolation| isolation.interface.clone());
        recorded.or(configured).as_deref().map_or(Ok(()), cell::remove)
    }

    /// Returns the machine's network, if it has one whose interface exists.
    fn usable_cell(&self) -> Option<Arc<Cell>> {
        self.cell.get().filter(|_| has_interface(self.files()))
    }

    fn new_cell(&self, deadline: Deadline) -> Result<Option<Arc<Cell>>> {
        let files = self.files();
        expect_isolated(files)?;
        self.cell.close(self.name());
        let opened = spec_of(files).map(|spec| Cell::open(&spec, deadline)).transpose()?;
        Ok(opened.map(|cell| self.cell.set(cell)))
    }
}
