//! The part of an author that is about one machine, for the [`Adapter`](crate::Adapter).

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use machinery::{Deadline, Diagnosis, DumpFormat, Error, Result, State};

use crate::machine_set::Reloadable;

/// The origin of a preparation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrepareOrigin {
    /// Somebody has requested the preparation.
    Request,
    /// The host prepares the machine by itself, so no changes of somebody else may be lost.
    Automatic,
}

/// One machine. The methods with the name of an action are those of [`Machinery`](machinery::Machinery) for this machine.
pub trait Backend: Reloadable + Sized + Send + Sync + 'static {
    /// See [`Machinery::state`](machinery::Machinery::state).
    ///
    /// # Errors
    /// The hypervisor does not answer.
    fn state(self: &Arc<Self>, deadline: Deadline) -> Result<State>;

    /// See [`Machinery::restore_start`](machinery::Machinery::restore_start).
    ///
    /// # Errors
    /// The machine is on, or does not start.
    fn restore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()>;

    /// See [`Machinery::norestore_start`](machinery::Machinery::norestore_start).
    ///
    /// # Errors
    /// The machine is on, or does not start.
    fn norestore_start(self: &Arc<Self>, _deadline: Deadline) -> Result<()> {
        Err(Error::unsupported("norestore_start"))
    }

    /// See [`Machinery::stop`](machinery::Machinery::stop). It ends a standby, and cancels a preparation.
    ///
    /// # Errors
    /// The machine is off already, or does not end.
    fn stop(self: &Arc<Self>, deadline: Deadline) -> Result<()>;

    /// See [`Machinery::acpi_stop`](machinery::Machinery::acpi_stop).
    ///
    /// # Errors
    /// The machine is off already, or its guest does not react.
    fn acpi_stop(self: &Arc<Self>, _deadline: Deadline) -> Result<()> {
        Err(Error::unsupported("acpi_stop"))
    }

    /// See [`Machinery::dump_memory`](machinery::Machinery::dump_memory).
    ///
    /// # Errors
    /// The machine is off; the format is not supported; the dump fails.
    fn dump_memory(self: &Arc<Self>, _path: &Path, _format: DumpFormat, _deadline: Deadline) -> Result<()> {
        Err(Error::unsupported("dump_memory"))
    }

    /// See [`Machinery::screenshot`](machinery::Machinery::screenshot).
    ///
    /// # Errors
    /// The machine is off; the screenshot fails.
    fn screenshot(self: &Arc<Self>, _path: &Path, _deadline: Deadline) -> Result<()> {
        Err(Error::unsupported("screenshot"))
    }

    /// See [`Machinery::prepare`](machinery::Machinery::prepare).
    ///
    /// # Errors
    /// The machine is on; the preparation fails or is cancelled.
    fn prepare(self: &Arc<Self>, _origin: PrepareOrigin, _deadline: Deadline) -> Result<()> {
        Err(Error::unsupported("prepare"))
    }

    /// See [`Machinery::console`](machinery::Machinery::console).
    ///
    /// # Errors
    /// The machine is off, or its run has no console.
    fn console(self: &Arc<Self>, _deadline: Deadline) -> Result<OwnedFd> {
        Err(Error::unsupported("console"))
    }

    /// See [`Machinery::open_network`](machinery::Machinery::open_network).
    ///
    /// # Errors
    /// The network cannot be made.
    fn open_network(self: &Arc<Self>, _deadline: Deadline) -> Result<()> {
        Err(Error::unsupported("open_network"))
    }

    /// See [`Machinery::close_network`](machinery::Machinery::close_network).
    ///
    /// # Errors
    /// The network remains.
    fn close_network(self: &Arc<Self>, _deadline: Deadline) -> Result<()> {
        Err(Error::unsupported("close_network"))
    }

    /// See [`Machinery::save`](machinery::Machinery::save).
    ///
    /// # Errors
    /// The machine is off, or cannot be saved.
    fn save(self: &Arc<Self>, _memory: &Path, _disk: &Path, _deadline: Deadline) -> Result<()> {
        Err(Error::unsupported("save"))
    }

    /// Returns what makes the machine unusable, and its warnings.
    fn diagnose(&self) -> Diagnosis {
        Diagnosis::new(self.name())
    }

    /// Returns how the machine's hypervisor is confined, for people; none if the machinery does not confine it.
    fn jail(&self) -> Option<String> {
        None
    }

    /// Ends the leftovers of a killed host, before the first start.
    ///
    /// # Errors
    /// A leftover does not end.
    fn clear_leftovers(&self) -> Result<()> {
        Ok(())
    }

    /// See [`Machinery::adopt`](machinery::Machinery::adopt). The default adopts nothing.
    ///
    /// # Errors
    /// A run cannot be adopted; a leftover does not end.
    fn adopt(self: &Arc<Self>, _deadline: Deadline) -> Result<bool> {
        self.clear_leftovers().map(|()| false)
    }

    /// Leaves the machine's run and standby to the next host. The default ends them.
    ///
    /// # Errors
    /// A preparation does not end.
    fn hand_over(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.end(deadline)
    }

    /// Expects that the machine is off, so that a reload can change or remove it. It may have a standby.
    ///
    /// # Errors
    /// The machine is on: [`refuse::on_in_reload`](crate::refuse::on_in_reload).
    fn ensure_off(&self, deadline: Deadline) -> Result<()>;

    /// Asks the machine's standby to end, without waiting for it: the ends of many machines then take as long as one.
    fn begin_end(&self) {}

    /// Cancels a preparation and ends the standby, for a reload.
    ///
    /// # Errors
    /// The standby does not end.
    fn discard_standby(self: &Arc<Self>, _deadline: Deadline) -> Result<()> {
        Ok(())
    }

    /// Ends the standby, and reports the readiness with that reason. Neither a run nor a preparation ends: another action
    /// may use the standby at the same moment.
    ///
    /// # Errors
    /// The standby does not end; another action is under way.
    fn give_standby_back(self: &Arc<Self>, _why: &str, _deadline: Deadline) -> Result<()> {
        Ok(())
    }

    /// Ends the machine's own run and standby, for a shutdown.
    ///
    /// # Errors
    /// The machine does not end. A machine that is off already is no failure.
    fn end(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.stop(deadline)
    }
}
