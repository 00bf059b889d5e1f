//! The ways to end a domain: on request, as a leftover, or because a call timed out.
//!
//! An action that ends a run waits for libvirt's answer and for the event of the end. So the event of an end
//! never arrives in the middle of the next run.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use machinery::{Deadline, Error, Result};
use machinery_backend::{Cancellation, Operation, WorkState};
use virt::domain::{Domain, DomainPausedReason};

use super::base::{END_EVENT_TIMEOUT, Machine};
use super::state::{AbandonedCall, MachineState};
use crate::call::Call;
use crate::domain;
use crate::dsn;
use crate::errors::{explain, is_no_domain};

/// The time that a call which timed out has to end. A host waits two seconds beyond the deadline before it
/// disables the machine.
pub const CANCEL_TIMEOUT: Duration = Duration::from_millis(1500);

/// The time that libvirt has to report a state after another request has failed.
const LOOK_TIMEOUT: Duration = Duration::from_millis(500);

impl Machine {
    /// Destroys the domain; returns `false` if it was off already.
    ///
    /// # Errors
    /// libvirt cannot end it.
    pub(super) fn destroy(&self, deadline: Deadline) -> Result<bool> {
        let label = self.label().to_owned();
        self.connection.ask(deadline, "libvirt to stop the domain", move |connect| {
            domain::destroy(&domain::domain(connect, &label)?)
        })
    }

    /// Destroys the domain if it is an own run or the standby; returns `false` if it is neither.
    ///
    /// # Errors
    /// libvirt cannot end it.
    pub(super) fn destroy_own(&self, deadline: Deadline) -> Result<bool> {
        let (label, marker) = (self.label().to_owned(), self.marker.clone());
        self.connection.ask(deadline, "libvirt to end the standby", move |connect| {
            match connect.lookup_domain_by_name(&label) {
                Ok(domain) => Ok(marker.matches(&domain)? && domain::destroy(&domain)?),
                Err(error) if is_no_domain(&error) => Ok(false),
                Err(error) => Err(explain("look up the domain", &error)),
            }
        })
    }

    /// Destroys the domain; only logs a failure.
    pub(super) fn try_destroy(&self, deadline: Deadline) {
        if let Err(error) = self.destroy(deadline) {
            tracing::debug!(machine = self.name(), %error, "the domain is not destroyed");
        }
    }

    /// Destroys the domain if it is an own run or the standby; only logs a failure.
    pub(super) fn try_destroy_own(&self, deadline: Deadline) {
        if let Err(error) = self.destroy_own(deadline) {
            tracing::debug!(machine = self.name(), %error, "the domain is not destroyed");
        }
    }

    /// Ends the standby, and returns after the event of its end.
    ///
    /// # Errors
    /// libvirt cannot end it.
    pub(super) fn end_standby(&self, deadline: Deadline) -> Result<()> {
        let before = self.lock().end_count;
        let ended = self.destroy_own(deadline).map_err(|error| self.explain_lost_start(error))?;
        self.after_standby_end(ended, before, deadline);
        Ok(())
    }

    /// Ends a leftover: a standby, or a run that could not be ended in time. An own run is none.
    ///
    /// # Errors
    /// libvirt cannot end it.
    pub(super) fn clear_leftover(&self, domain: &Domain) -> Result<()> {
        if self.has_run() {
            return Ok(());
        }
        if self.marker.matches(domain)? {
            let before = self.lock().end_count;
            let ended = domain::destroy(domain)?;
            self.after_standby_end(ended, before, Deadline::after(END_EVENT_TIMEOUT));
            return Ok(());
        }
        self.marker.set_aside_if_elsewhere()?;
        if !domain.is_active().unwrap_or(true) {
            // The marked run has ended, and a later run is not ours.
            self.remove_marker();
        }
        Ok(())
    }

    /// Records the end of a standby, after its event if it has `ended` just now.
    pub(super) fn after_standby_end(&self, ended: bool, before: u64, deadline: Deadline) {
        if ended {
            self.wait_for_end(before, deadline.within(END_EVENT_TIMEOUT));
        } else {
            self.lock().run_disks = None;
        }
        self.close_run();
        // That event was not a step of the start under way.
        self.lock().start_event = None;
    }

    /// Ends the domain of a failed start. A further failure is only logged, because the start's own error is
    /// the one to return.
    pub(super) fn end_failed_start(&self, domain: &Domain) {
        match domain::destroy(domain) {
            Ok(_) => self.record_end(),
            Err(error) => {
                tracing::warn!(machine = self.name(), %error, "the domain of a failed start remains for now");
            }
        }
    }

    /// Cancels the preparation that is under way. The next operation waits for its end.
    pub(super) fn cancel_prepare(&self, deadline: Deadline) {
        if self.work.cancel_preparation() {
            // Ends a domain that is still being loaded.
            self.try_destroy_own(deadline);
        }
    }

    /// Waits for the call of a start. One that times out is cancelled, and its domain ended.
    ///
    /// # Errors
    /// The start fails; it takes too long.
    pub(super) fn wait_for_start(
        &self,
        call: Call<()>,
        cancellation: &Cancellation,
        deadline: Deadline,
    ) -> Result<()> {
        call.wait(deadline.remaining()).unwrap_or_else(|| {
            cancellation.cancel();
            Err(self.abandon(call, true, deadline.timeout("the domain to run")))
        })
    }

    /// Ends the domain of a start or a preparation that timed out, or was cancelled: that is `error`. Keeps the call if it
    /// goes on nevertheless.
    pub(super) fn abandon(&self, call: Call<()>, is_start: bool, error: Error) -> Error {
        let cancelling = Deadline::after(CANCEL_TIMEOUT);
        if is_start {
            self.try_destroy(cancelling);
        } else {
            self.try_destroy_own(cancelling);
        }
        if call.wait(cancelling.remaining()).is_some() {
            return error;
        }
        self.lock().abandoned = Some(AbandonedCall { call: Arc::new(Mutex::new(call)), is_start });
        error.detail("and libvirt has not finished the call")
    }

    /// Waits for a preparation and an abandoned call, and destroys the domain that the latter may have started.
    ///
    /// # Errors
    /// The call does not end in time.
    pub(super) fn end_abandoned_call(&self, deadline: Deadline) -> Result<()> {
        // One that was cancelled may become an abandoned call.
        let is_preparing = |state: &WorkState<MachineState>| state.operation() == Operation::Preparing;
        if self.work.wait_while(deadline, is_preparing).abandoned.is_none() {
            return Ok(());
        }
        self.try_destroy_own(deadline);
        if self.abandoned_call_has_ended(deadline) {
            return Ok(());
        }
        let error = deadline.timeout("libvirt to finish an earlier start");
        Err(self
            .explain_lost_start(error)
            .default_advice("Look at libvirtd's log, and restart libvirtd if it hangs"))
    }

    /// Explains a failure by a start that libvirt has lost: a libvirtd that ends before it has noted QEMU's process leaves
    /// a domain whose start the next one never finishes, and which it refuses to stop: after 30 s it answers that it cannot
    /// lock the domain. Seen with libvirt 9.0: its `qemuProcessReconnectHelper` skips a domain without a process.
    ///
    /// It asks libvirt, and so belongs only where an action has no other wait before it.
    pub(super) fn explain_lost_start(&self, error: Error) -> Error {
        let label = self.label().to_owned();
        let look = Deadline::after(LOOK_TIMEOUT);
        let starting = self.connection.ask(look, "the domain's state", move |connect| {
            domain::is_paused(&domain::domain(connect, &label)?, DomainPausedReason::StartingUp)
        });
        match starting {
            Ok(true) => {
                let dsn = self.connection.dsn();
                let place = dsn::host(dsn).map(|host| format!(" on {host}")).unwrap_or_default();
                error.detail("the domain is still starting up").advice(format!(
                    "If libvirtd ended during that start, it never finishes: stop libvirtd{place}, remove {}/{}.xml there, \
                     and start libvirtd again. Running domains go on meanwhile",
                    dsn::status_folder(dsn),
                    self.label()
                ))
            }
            _ => error,
        }
    }
}
