//! The start of a machine: a restore from its standby, its save image or its snapshot, or a cold boot.

use std::sync::Arc;

use machinery::{Deadline, Error, Result, State};
use machinery_backend::{Cancellation, Operation};
use virt::connect::Connect;

use super::base::Machine;
use super::end::CANCEL_TIMEOUT;
use crate::domain;
use crate::foreign::remove_managed_save;
use crate::restore::Start;

impl Machine {
    /// Starts the machine.
    ///
    /// # Errors
    /// The machine is not off; the domain does not run in time.
    pub(super) fn start(self: &Arc<Self>, how: Start, deadline: Deadline) -> Result<()> {
        if how == Start::Cold {
            self.cancel_prepare(deadline);
        }
        self.end_abandoned_call(deadline)?;
        let starting = self.begin(Operation::Starting, deadline)?;
        if let Some(standby) = self.take_standby("its next restore is not prepared yet")
            && how == Start::Restored
            && self.resume_standby(standby, starting.cancellation(), deadline)?
        {
            return self.ensure_no_end(deadline);
        }
        let (machine, cancellation) = (Arc::clone(self), starting.cancellation().clone());
        let call = self.connection.long_call(deadline, self.connect_step(), move |connect| {
            machine.start_domain(connect, how, &cancellation)
        })?;
        self.wait_for_start(call, starting.cancellation(), deadline)?;
        self.ensure_no_end(deadline)
    }

    /// Starts the domain, marks it and resumes it. From the first marker on the run is an own one.
    fn start_domain(&self, connect: &Connect, how: Start, cancellation: &Cancellation) -> Result<()> {
        let domain = domain::domain(connect, self.label())?;
        // A libvirtd that hung can answer long after the start has failed.
        if cancellation.is_cancelled() {
            return Err(Error::failed("the start was cancelled, because libvirt did not answer in time"));
        }
        self.clear_leftover(&domain)?;
        domain::ensure_off(&domain)?;
        remove_managed_save(&domain, self.name())?;
        self.begin_marker(&domain)?;
        self.lock().has_run = true;
        let started = match how {
            Start::Restored => self.start_restored(connect, &domain, cancellation),
            Start::Cold => self.start_cold(connect, &domain),
        };
        let started = started.and_then(|()| self.mark_and_resume(connect));
        if started.is_err() || cancellation.is_cancelled() {
            self.end_failed_start(&domain);
        }
        started
    }

    fn mark_and_resume(&self, connect: &Connect) -> Result<()> {
        let domain = self.mark_run(connect)?;
        self.ensure_no_reset()?;
        domain::ensure_running(&domain)?;
        self.marker.set_resumed(&domain);
        self.lock().host_knows_running = true;
        Ok(())
    }

    /// Expects that the domain did not end while its start was being finished: that event counts as a step of
    /// the start.
    fn ensure_no_end(&self, deadline: Deadline) -> Result<()> {
        let event = self.lock().start_event.take();
        let Some((State::Poweroff, why)) = event else { return Ok(()) };
        match self.query_state(deadline) {
            Ok((State::Poweroff, _)) => {
                self.record_end();
                Err(Error::failed(format!("the domain ended right after its start: {why}")))
            }
            Ok(_) => Ok(()),
            Err(error) => {
                self.try_destroy(Deadline::after(CANCEL_TIMEOUT));
                Err(error)
            }
        }
    }
}
