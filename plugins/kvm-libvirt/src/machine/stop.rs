//! The stop of a machine, and its end in a reload.

use machinery::{Deadline, Result, State};
use machinery_backend::{Operation, refuse};
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt_sys as sys;

use super::base::{END_EVENT_TIMEOUT, Machine};
use crate::domain;
use crate::errors::{explain, is_off};

impl Machine {
    /// Stops the domain at once. Discards the standby, and cancels a preparation.
    ///
    /// # Errors
    /// The machine is off already; libvirt cannot end the domain.
    pub fn stop(&self, deadline: Deadline) -> Result<()> {
        // The host also stops a machine to cancel its preparation. That must not end somebody else's run.
        let is_preparing = self.lock().operation() == Operation::Preparing;
        self.stop_by(if is_preparing { Self::destroy_own } else { Self::destroy }, deadline)
    }

    /// Ends the own run or the standby, if there is one.
    ///
    /// # Errors
    /// As [`stop`](Machine::stop).
    pub fn end(&self, deadline: Deadline) -> Result<()> {
        if self.has_anything_to_end() { self.stop_by(Self::destroy_own, deadline) } else { Ok(()) }
    }

    fn stop_by(&self, destroy: fn(&Self, Deadline) -> Result<bool>, deadline: Deadline) -> Result<()> {
        self.cancel_prepare(deadline);
        self.end_abandoned_call(deadline)?;
        let mut stopping = self.begin(Operation::Stopping, deadline)?;
        if self.take_standby("it was stopped, which has discarded its standby").is_some() {
            stopping.continue_as(Operation::Discarding);
            self.end_standby(deadline)?;
            return Err(refuse::off_already());
        }
        let before = self.lock().end_count;
        if !destroy(self, deadline)? {
            self.record_end();
            return Err(refuse::off_already());
        }
        if !self.wait_for_end(before, deadline.within(END_EVENT_TIMEOUT)) {
            tracing::debug!(machine = self.name(), "stopped, and libvirt has sent no event");
            self.record_end();
            self.report_state(State::Poweroff, "");
        }
        Ok(())
    }

    /// Presses the power button, and waits for the guest to power off.
    ///
    /// # Errors
    /// The machine is off already; the guest does not react in time.
    pub fn acpi_stop(&self, deadline: Deadline) -> Result<()> {
        self.end_abandoned_call(deadline)?;
        if self.is_hidden() {
            return Err(refuse::off_already());
        }
        let _stopping = self.begin(Operation::Stopping, deadline)?;
        let before = self.lock().end_count;
        let label = self.label().to_owned();
        let pressed =
            self.shared.connection.ask(deadline, "libvirt to press the power button", move |connect| {
                press_power_button(&domain::domain(connect, &label)?)
            })?;
        if !pressed {
            self.record_end();
            return Err(refuse::off_already());
        }
        match self.wait_for_end(before, deadline) {
            true => Ok(()),
            false => Err(deadline.timeout("the guest to react to its power button")),
        }
    }

    /// Expects that the machine has no run, so that a reload can replace or remove it.
    ///
    /// # Errors
    /// The machine is on.
    pub fn ensure_off(&self, deadline: Deadline) -> Result<()> {
        // The host receives the event of an end a moment before the end is recorded here.
        match self.work.wait_while(deadline.within(END_EVENT_TIMEOUT), |state| state.has_run).has_run {
            true => Err(refuse::on_in_reload(self.name())),
            false => Ok(()),
        }
    }

    /// Discards the standby, and cancels a preparation, before a reload replaces or removes the machine.
    ///
    /// # Errors
    /// libvirt cannot end the standby.
    pub fn discard_standby(&self, deadline: Deadline) -> Result<()> {
        self.cancel_prepare(deadline);
        self.end_abandoned_call(deadline)?;
        let _discarding = self.begin(Operation::Discarding, deadline)?;
        self.take_standby("its configuration has changed, which has discarded its standby");
        // Without a marker there is no standby, and no need to ask libvirt, which may be away.
        if self.marker.exists() { self.end_standby(deadline) } else { Ok(()) }
    }
}

/// Presses the power button; returns `false` if the domain is off.
fn press_power_button(domain: &Domain) -> Result<bool> {
    // Without this flag libvirt may ask an agent in the guest first.
    let pressed = match domain.shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN) {
        // Some drivers know no flags.
        Err(error) if error.code().is(ErrorNumber::InvalidArg) => domain.shutdown(),
        other => other,
    };
    match pressed {
        Ok(()) => Ok(true),
        Err(error) if is_off(&error) => Ok(false),
        Err(error) => Err(explain("press the power button", &error)),
    }
}
