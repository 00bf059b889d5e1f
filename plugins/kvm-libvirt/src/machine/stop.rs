//! The stop of a machine, and the end of its standby in a reload.

use machinery::{Deadline, Result, State};
use machinery_backend::{Operation, refuse};
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt_sys as sys;

use super::base::{END_EVENT_TIMEOUT, Machine};
use crate::domain;
use crate::errors::{explain, is_off};

impl Machine {
    /// Ends the run by `destroy`, which returns `false` if there is none. Discards the standby, and cancels a
    /// preparation.
    ///
    /// # Errors
    /// The machine is off already; libvirt cannot end the domain.
    pub(super) fn stop_by(
        &self,
        destroy: fn(&Self, Deadline) -> Result<bool>,
        deadline: Deadline,
    ) -> Result<()> {
        self.cancel_prepare(deadline);
        self.end_abandoned_call(deadline)?;
        let mut stopping = self.begin(Operation::Stopping, deadline)?;
        if self.take_standby("it was stopped, which has discarded its standby").is_some() {
            stopping.continue_as(Operation::Discarding);
            self.end_standby(deadline)?;
            return Err(refuse::off_already());
        }
        let before = self.lock().end_count;
        if !destroy(self, deadline).map_err(|error| self.explain_lost_start(error))? {
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
    pub(super) fn press_power_button(&self, deadline: Deadline) -> Result<()> {
        if self.is_hidden() {
            return Err(refuse::off_already());
        }
        self.end_abandoned_call(deadline)?;
        let _stopping = self.begin(Operation::Stopping, deadline)?;
        let before = self.lock().end_count;
        let label = self.label().to_owned();
        let pressed = self.connection.ask(deadline, "libvirt to press the power button", move |connect| {
            press(&domain::domain(connect, &label)?)
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

    /// Discards the standby, and cancels a preparation, before a reload replaces or removes the machine.
    ///
    /// # Errors
    /// libvirt cannot end the standby.
    pub(super) fn discard(&self, deadline: Deadline) -> Result<()> {
        self.cancel_prepare(deadline);
        self.end_abandoned_call(deadline)?;
        let _discarding = self.begin(Operation::Discarding, deadline)?;
        self.take_standby("its configuration has changed, which has discarded its standby");
        // Without a marker there is no standby, and no need to ask libvirt, which may be away.
        if self.marker.exists() { self.end_standby(deadline) } else { Ok(()) }
    }
}

/// Presses the power button; returns `false` if the domain is off.
fn press(domain: &Domain) -> Result<bool> {
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
