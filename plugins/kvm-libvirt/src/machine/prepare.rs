//! The preparation of a machine's next restore: a save image, and a standby that is loaded from it.
//!
//! A preparation is hidden work: the host still sees a machine that is off. A stop or a cold start cancels
//! it, and any other action waits for its end. While libvirt is away, the preparation is postponed.

use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, Error, ErrorKind, Result};
use machinery_backend::{Cancellation, Operation, PrepareOrigin, Share};
use virt::connect::Connect;
use virt::domain::Domain;

use super::base::Machine;
use super::end::CANCEL_TIMEOUT;
use crate::domain;
use crate::foreign::remove_managed_save;
use crate::snapshot::{self, Snapshot};
use crate::standby::{Fingerprint, StandbyDomain};

/// The maximum time that a preparation waits for an earlier call which timed out.
const EARLIER_CALL_TIMEOUT: Duration = Duration::from_secs(3);

/// The outcome of an attempt to make an image or a standby.
pub(super) enum Outcome {
    Ready,
    /// There is none, for this reason.
    Unavailable(String),
}

impl Machine {
    /// Prepares the next restore, as the configuration allows.
    ///
    /// # Errors
    /// The machine is on; libvirt fails; the preparation is cancelled.
    pub(super) fn prepare_next(self: &Arc<Self>, origin: PrepareOrigin, deadline: Deadline) -> Result<()> {
        self.ensure_no_run(deadline)?;
        if let Some(why) = self.no_standby_reason()
            && self.keys.image.is_off()
        {
            // The image of an earlier configuration.
            self.shared.images.remove(&self.keys.image);
            let why = [Some(why.to_owned()), self.keys.image.unavailable_reason()].into_iter().flatten();
            self.report_plain(&why.collect::<Vec<_>>().join("; "));
            return Ok(());
        }
        // A preparation that waits for libvirt would delay a restore that comes meanwhile.
        if self.is_postponed() {
            return Ok(());
        }
        let prepared = self.prepare_with_libvirt(origin, deadline);
        // The check for libvirt takes time, which there must be. Another action waits for the end of a cancelled one.
        let may_be_postponed = |error: &Error| error.kind() != ErrorKind::Interrupted && !deadline.passed();
        if prepared.as_ref().is_err_and(may_be_postponed) && self.is_postponed() {
            return Ok(());
        }
        if let Err(error) = &prepared {
            self.report_plain(&error.to_string());
        }
        self.handle_events_of_preparation(prepared.is_ok());
        prepared
    }

    /// Postpones the preparation if libvirt is away; returns whether it is.
    fn is_postponed(&self) -> bool {
        self.lock().is_postponed = true;
        if self.connection.is_away() {
            self.report_plain("libvirt is away, and the machine is prepared when it is back");
            return true;
        }
        self.lock().is_postponed = false;
        false
    }

    fn prepare_with_libvirt(self: &Arc<Self>, origin: PrepareOrigin, deadline: Deadline) -> Result<()> {
        // Nothing can cancel this wait, and a stop needs its time after it.
        self.end_abandoned_call(deadline.within(EARLIER_CALL_TIMEOUT))?;
        let preparing = self.begin(Operation::Preparing, deadline)?;
        let (machine, cancellation) = (Arc::clone(self), preparing.cancellation().clone());
        let call = self.connection.long_call(deadline, self.connect_step(), move |connect| {
            machine.prepare_restore(connect, origin, &cancellation)
        })?;
        let cancellation = preparing.cancellation();
        cancellation.on_cancel(call.interrupter());
        // The end of the domain ends the call of a preparation that is cancelled, unless libvirt hangs.
        let cancelled = || cancellation.is_cancelled().then(|| call.wait(CANCEL_TIMEOUT)).flatten();
        if let Some(prepared) = call.wait_unless_interrupted(deadline.remaining()).or_else(cancelled) {
            return self.discard_if_cancelled(cancellation, prepared);
        }
        let timed_out = || deadline.timeout("the domain to stand by");
        let error = cancellation.ensure_wanted().err().unwrap_or_else(timed_out);
        cancellation.cancel();
        Err(self.abandon(call, false, error))
    }

    /// Discards the standby if the preparation was cancelled after its last step. A step that the cancellation has
    /// ended fails with an error of libvirt's, which is not the cause.
    fn discard_if_cancelled(&self, cancellation: &Cancellation, prepared: Result<()>) -> Result<()> {
        let Err(interrupted) = cancellation.ensure_wanted() else { return prepared };
        if let Err(error) = prepared {
            tracing::debug!(machine = self.name(), %error, "the preparation was cancelled");
        }
        if self.take_standby("its preparation was cancelled").is_some() {
            self.preparation_failed();
        }
        Err(interrupted)
    }

    /// Handles the events that arrived while the preparation was under way.
    fn handle_events_of_preparation(self: &Arc<Self>, prepared: bool) {
        let (unusable, connection_lost, was_reset) = {
            let state = self.lock();
            let unusable = state.standby.as_ref().and_then(|standby| standby.unusable.clone());
            (unusable, state.connection_lost, state.was_reset)
        };
        if let Some(why) = unusable {
            self.replace_standby(&why);
        } else if connection_lost && !prepared {
            self.request_another("libvirtd has ended while the machine was prepared");
        } else if was_reset && !prepared {
            self.request_another("somebody has reset the domain while the machine was prepared");
        }
    }

    fn prepare_restore(
        &self,
        connect: &Connect,
        origin: PrepareOrigin,
        cancellation: &Cancellation,
    ) -> Result<()> {
        let no_standby = self.no_standby_reason();
        if no_standby.is_none() && self.standby_is_valid(connect) {
            return Ok(());
        }
        self.take_standby("it is prepared again");
        let domain = domain::domain(connect, self.label())?;
        self.clear_leftover(&domain)?;
        domain::ensure_off(&domain)?;
        if let Outcome::Unavailable(why) = self.prepare_image(connect, &domain, origin, cancellation)? {
            self.note_own_disk(&why);
        }
        let why = match no_standby {
            Some(why) => why.to_owned(),
            None => match self.prepare_standby(connect, &domain, origin, cancellation)? {
                Outcome::Ready => return Ok(()),
                Outcome::Unavailable(why) => why,
            },
        };
        self.report_no_standby(&why);
        Ok(())
    }

    /// Makes a standby of the domain, which is off. A failure leaves nothing behind.
    fn prepare_standby(
        &self,
        connect: &Connect,
        domain: &Domain,
        origin: PrepareOrigin,
        cancellation: &Cancellation,
    ) -> Result<Outcome> {
        if let Some(why) = self.foreign_work_reason(domain, origin) {
            return Ok(Outcome::Unavailable(why));
        }
        let snapshot = snapshot::find(domain, self.wanted_snapshot())?;
        if !snapshot.has_memory() {
            let why = "its snapshot was taken while the domain was off, so there is no memory to load";
            return Ok(Outcome::Unavailable(why.to_owned()));
        }
        let memory = domain::max_memory(domain)?;
        let share = match self.shared.budget.take(self.name(), self.keys.standby, memory) {
            Ok(share) => share,
            Err(why) => return Ok(Outcome::Unavailable(why)),
        };
        let loaded = self.load_standby(connect, domain, &snapshot, share, cancellation);
        if loaded.is_err() {
            self.preparation_failed();
        }
        loaded.map(|()| Outcome::Ready)
    }

    fn load_standby(
        &self,
        connect: &Connect,
        domain: &Domain,
        snapshot: &Snapshot,
        share: Share,
        cancellation: &Cancellation,
    ) -> Result<()> {
        cancellation.ensure_wanted()?;
        let events_from = self.connection.number();
        remove_managed_save(domain, self.name())?;
        self.begin_marker(domain)?;
        self.start_restored(connect, domain, cancellation)?;
        let domain = self.mark_run(connect)?;
        let fingerprint = Fingerprint::of(&domain, snapshot.identity.clone())?;
        let standby = StandbyDomain::new(&domain, fingerprint.clone(), events_from, share);
        let ready = self.readiness_with_standby(standby.memory());
        self.install(standby, cancellation)?;
        // After the installation, so that no later event is missed.
        fingerprint.check(connect, self.label(), self.wanted_snapshot())?;
        self.ensure_no_reset()?;
        self.readiness.report_as(&ready);
        Ok(())
    }
}
