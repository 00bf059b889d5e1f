//! The preparation of a machine's next restore: a standby, else a save image.
//!
//! A preparation is hidden work: the host still sees a machine that is off. A stop or a cold start cancels
//! it, and any other action waits for its end. While libvirt is away, the preparation is postponed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use machinery::{Deadline, Result, Share};
use virt::connect::Connect;
use virt::domain::Domain;

use super::base::Machine;
use super::conditions::{PrepareTrigger, ensure_not_cancelled};
use super::state::Operation;
use crate::domain;
use crate::foreign::remove_managed_save;
use crate::snapshot::{self, Snapshot};
use crate::standby::{Fingerprint, StandbyDomain};

/// The outcome of an attempt to make a standby.
enum StandbyOutcome {
    Ready,
    /// There is none, for this reason.
    Unavailable(String),
}

impl Machine {
    /// Prepares the next restore, as the configuration allows.
    ///
    /// # Errors
    /// The machine is on; libvirt fails; the preparation is cancelled.
    pub fn prepare(self: &Arc<Self>, trigger: PrepareTrigger, deadline: Deadline) -> Result<()> {
        self.ensure_no_run(deadline)?;
        if let Some(why) = self.no_standby_reason()
            && self.keys.image.is_off()
        {
            // The image of an earlier configuration.
            self.keys.image.remove();
            let why = [Some(why.to_owned()), self.keys.image.unavailable_reason()].into_iter().flatten();
            self.report_plain(&why.collect::<Vec<_>>().join("; "));
            return Ok(());
        }
        // A preparation that waits for libvirt would delay a restore that comes meanwhile.
        if self.is_postponed() {
            return Ok(());
        }
        let prepared = self.prepare_with_libvirt(trigger, deadline);
        // The check for libvirt takes time, which there must be.
        if prepared.is_err() && !deadline.passed() && self.is_postponed() {
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
        if self.link.is_away() {
            self.report_plain("libvirt is away, and the machine is prepared when it is back");
            return true;
        }
        self.lock().is_postponed = false;
        false
    }

    fn prepare_with_libvirt(self: &Arc<Self>, trigger: PrepareTrigger, deadline: Deadline) -> Result<()> {
        self.end_abandoned_call(deadline)?;
        let _preparing = self.begin(Operation::Preparing, deadline)?;
        let cancelled = Arc::clone(&self.lock().cancel_prepare);
        let (machine, is_cancelled) = (Arc::clone(self), Arc::clone(&cancelled));
        let call = self.link.long_call(deadline, self.connect_step(), move |connect| {
            machine.prepare_restore(connect, trigger, &is_cancelled)
        })?;
        let prepared = call.wait(deadline.remaining()).unwrap_or_else(|| {
            cancelled.store(true, Ordering::SeqCst);
            Err(self.abandon(call, false, deadline))
        });
        prepared.and_then(|()| self.discard_if_cancelled(&cancelled))
    }

    /// Discards the standby if the preparation was cancelled after its last step.
    fn discard_if_cancelled(&self, cancelled: &AtomicBool) -> Result<()> {
        ensure_not_cancelled(cancelled).inspect_err(|_| {
            if self.take_standby("its preparation was cancelled").is_some() {
                self.preparation_failed();
            }
        })
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
            self.host
                .preparation_invalidated(self.name(), "libvirtd has ended while the machine was prepared");
        } else if was_reset && !prepared {
            self.host.preparation_invalidated(
                self.name(),
                "somebody has reset the domain while the machine was prepared",
            );
        }
    }

    fn prepare_restore(
        &self,
        connect: &Connect,
        trigger: PrepareTrigger,
        cancelled: &AtomicBool,
    ) -> Result<()> {
        let why = match self.no_standby_reason() {
            Some(why) => why.to_owned(),
            None => match self.prepare_standby(connect, trigger, cancelled)? {
                StandbyOutcome::Ready => return Ok(()),
                StandbyOutcome::Unavailable(why) => why,
            },
        };
        self.prepare_image(connect, trigger, cancelled, &why)
    }

    /// Makes a standby, unless there is a valid one. A failure leaves nothing behind.
    fn prepare_standby(
        &self,
        connect: &Connect,
        trigger: PrepareTrigger,
        cancelled: &AtomicBool,
    ) -> Result<StandbyOutcome> {
        if self.standby_is_valid(connect) {
            return Ok(StandbyOutcome::Ready);
        }
        self.take_standby("it is prepared again");
        let domain = domain::domain(connect, self.label())?;
        self.clear_leftover(&domain)?;
        domain::ensure_off(&domain)?;
        if let Some(why) = self.foreign_work_reason(&domain, trigger) {
            return Ok(StandbyOutcome::Unavailable(why));
        }
        let snapshot = snapshot::find(&domain, self.wanted_snapshot())?;
        if !snapshot.has_memory() {
            let why = "its snapshot was taken while the domain was off, so there is no memory to load";
            return Ok(StandbyOutcome::Unavailable(why.to_owned()));
        }
        let share = match self.budget.take(domain::max_memory(&domain)?) {
            Ok(share) => share,
            Err(why) => return Ok(StandbyOutcome::Unavailable(why)),
        };
        let loaded = self.load_standby(connect, &domain, &snapshot, share, cancelled);
        if loaded.is_err() {
            self.preparation_failed();
        }
        loaded.map(|()| StandbyOutcome::Ready)
    }

    fn load_standby(
        &self,
        connect: &Connect,
        domain: &Domain,
        snapshot: &Snapshot,
        share: Share,
        cancelled: &AtomicBool,
    ) -> Result<()> {
        ensure_not_cancelled(cancelled)?;
        let events_from = self.link.number();
        remove_managed_save(domain, self.name())?;
        self.begin_marker(domain)?;
        self.timed("revert", || snapshot.revert_paused())?;
        let domain = self.mark_run(connect)?;
        let fingerprint = Fingerprint::of(&domain, snapshot.identity.clone())?;
        let standby = StandbyDomain::new(&domain, fingerprint.clone(), events_from, share);
        let ready = standby.ready();
        self.install(standby, cancelled)?;
        // After the installation, so that no later event is missed.
        fingerprint.check(connect, self.label(), self.wanted_snapshot())?;
        self.ensure_no_reset()?;
        self.host.ready(self.name(), &ready);
        Ok(())
    }
}
