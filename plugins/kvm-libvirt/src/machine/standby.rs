//! A machine's standby: its resume by a restore, and its end.
//!
//! ```text
//!                      ┌── restore_start ──▶ unchanged? ── yes ──▶ resumed: it is a run
//!  prepare ──▶ standby                             └── no ──▶ ended, and the snapshot is reverted to
//!                      ├── stop, norestore_start, shutdown ──▶ ended
//!                      └── it ends, is reset or resumed, libvirtd ends ──▶ ended, and the host is
//!                                                                asked to prepare the machine again
//! ```
//!
//! The run marker covers a standby as well. So the next host ends a standby that this one leaves, because it got
//! no events of the domain meanwhile. Only the own domain is ended: somebody may have started another one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use machinery::{Deadline, Error, Result, State};
use machinery_backend::{Cancellation, Operation, UnderWay};
use virt::connect::Connect;

use super::base::Machine;
use super::state::MachineState;
use crate::domain;
use crate::standby::{Fingerprint, StandbyDomain};

/// The maximum time to end a standby.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(30);

/// The time that a new libvirtd has to reconnect to a domain that the old one was loading. A libvirtd that
/// cannot do it hangs until the domain is ended.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(3);

impl Machine {
    /// Stores the standby, unless its preparation is cancelled: a stop before this cancels it, and a later one
    /// finds the standby.
    pub(super) fn install(&self, standby: StandbyDomain, cancellation: &Cancellation) -> Result<()> {
        let mut state = self.lock();
        cancellation.ensure_wanted()?;
        state.standby = Some(standby);
        Ok(())
    }

    /// Takes the standby out of the state, and reports to the host why there is none any more.
    pub(super) fn take_standby(&self, why: &str) -> Option<StandbyDomain> {
        let standby = self.lock().standby.take()?;
        self.report_no_standby(why);
        Some(standby)
    }

    /// Reports whether the standby is still unchanged.
    pub(super) fn standby_is_valid(&self, connect: &Connect) -> bool {
        let fingerprint = match &self.lock().standby {
            Some(StandbyDomain { fingerprint, unusable: None, .. }) => fingerprint.clone(),
            _ => return false,
        };
        fingerprint.check(connect, self.label(), self.wanted_snapshot()).is_ok()
    }

    /// Resumes the standby; returns `false` if it must not be used. Then the start ends it.
    ///
    /// # Errors
    /// libvirt does not answer in time.
    pub(super) fn resume_standby(
        self: &Arc<Self>,
        standby: StandbyDomain,
        cancellation: &Cancellation,
        deadline: Deadline,
    ) -> Result<bool> {
        if let Some(reason) = &standby.unusable {
            tracing::warn!(machine = self.name(), reason, "the standby is not used");
            return Ok(false);
        }
        let resumed = Arc::new(AtomicBool::new(false));
        let (machine, is_wanted, done) = (Arc::clone(self), cancellation.clone(), Arc::clone(&resumed));
        let call = self.connection.short_call(deadline, move |connect, number| {
            let runs = number == standby.events_from
                && machine.resume_unchanged(connect, &standby.fingerprint, &is_wanted);
            done.store(runs, Ordering::SeqCst);
            Ok(())
        })?;
        self.wait_for_start(call, cancellation, deadline)?;
        Ok(resumed.load(Ordering::SeqCst))
    }

    fn resume_unchanged(
        &self,
        connect: &Connect,
        fingerprint: &Fingerprint,
        cancellation: &Cancellation,
    ) -> bool {
        let mut steps = self.steps();
        let check = || fingerprint.check(connect, self.label(), self.wanted_snapshot());
        let checked = steps.timed("check", check);
        let domain = match checked {
            Ok(domain) => domain,
            Err(error) => return self.log_unused(&error),
        };
        self.lock().has_run = true;
        // The event of a reset may arrive after the answers to later requests.
        let resumed = steps.timed("resume", || domain::resume(&domain)).and_then(|()| self.ensure_no_reset());
        if let Err(error) = resumed {
            self.lock().has_run = false;
            return self.log_unused(&error);
        }
        self.marker.set_resumed(&domain);
        self.lock().host_knows_running = true;
        if cancellation.is_cancelled() {
            self.end_failed_start(&domain);
        }
        true
    }

    fn log_unused(&self, why: &Error) -> bool {
        tracing::warn!(machine = self.name(), %why, "the standby is not used");
        false
    }

    /// Ends the leftovers of a failed preparation. Uses a new connection, because libvirtd may have ended in
    /// the middle of the preparation.
    pub(super) fn preparation_failed(&self) {
        drop(self.lock().standby.take());
        let label = self.label().to_owned();
        let deadline = Deadline::after(SETTLE_TIMEOUT);
        let settled = self.connection.ask(deadline, "libvirt to reconnect to the domain", move |connect| {
            domain::settle(&domain::domain(connect, &label)?);
            Ok(())
        });
        if let Err(error) = settled {
            tracing::debug!(machine = self.name(), %error, "libvirt has not reconnected to the domain");
        }
        if let Err(error) = self.end_standby(Deadline::after(CLEANUP_TIMEOUT)) {
            tracing::warn!(machine = self.name(), %error, "leftovers of a preparation remain for now");
        }
    }

    /// Ends the standby whose memory is needed. It waits for no other action.
    ///
    /// # Errors
    /// libvirt cannot end the standby; another action is under way.
    pub(super) fn give_back(&self, why: &str, deadline: Deadline) -> Result<()> {
        let take = |state: &mut MachineState| Ok(state.standby.take());
        if self.connection.is_away() {
            return Err(Error::environment("libvirt is away"));
        }
        let begun = self.work.begin(Operation::Discarding, Deadline::after(Duration::ZERO), take)?;
        let (_discarding, Some(mut standby)) = begun else { return Ok(()) };
        let ended = self.end_standby(deadline);
        if ended.is_err() {
            // Its QEMU still has the memory.
            standby.unusable = Some(why.to_owned());
            self.lock().standby = Some(standby);
        }
        self.report_no_standby(why);
        ended
    }

    /// Ends the standby in a thread of its own, and asks the host for another one.
    pub(super) fn replace_standby(self: &Arc<Self>, why: &str) {
        match &mut self.lock().standby {
            Some(standby) => standby.unusable = Some(why.to_owned()),
            None => return,
        }
        // An operation that is under way sees that the standby is unusable.
        let take = |state: &mut MachineState| Ok(state.standby.take());
        let begun = self.work.begin(Operation::Discarding, Deadline::after(Duration::ZERO), take);
        let Ok((discarding, Some(_))) = begun else { return };
        let (machine, reason) = (Arc::clone(self), why.to_owned());
        let replacing = self.connection.calls().start(move || {
            machine.end_and_request_another(discarding, &reason);
            Ok(())
        });
        if let Err(error) = replacing {
            tracing::error!(machine = self.name(), %error, "the unusable standby is not ended");
        }
    }

    fn end_and_request_another(&self, discarding: UnderWay<MachineState>, why: &str) {
        self.report_no_standby(why);
        if let Err(error) = self.end_standby(Deadline::after(CLEANUP_TIMEOUT)) {
            tracing::warn!(machine = self.name(), %error, "the unusable standby remains for now");
        }
        drop(discarding);
        match self.query_state(Deadline::after(CLEANUP_TIMEOUT)) {
            Ok((State::Poweroff, _)) => self.request_another(why),
            // Somebody has started the domain again, whose events were hidden.
            Ok((state, reason)) => self.report_state(state, &reason),
            Err(error) => {
                tracing::warn!(machine = self.name(), %error, "the standby has ended, the domain's state is unknown");
            }
        }
    }

    /// Asks the host to prepare the machine again.
    pub(super) fn request_another(&self, why: &str) {
        self.shared.host.preparation_invalidated(self.name(), why);
    }

    /// Makes the standby unusable, because the events of its domain are lost.
    pub(super) fn invalidate_standby(&self, why: &str) {
        let mut state = self.lock();
        state.connection_lost = true;
        let Some(standby) = &mut state.standby else { return };
        standby.unusable = Some(why.to_owned());
        drop(state);
        self.report_no_standby(why);
    }

    /// Replaces the standby, or asks for one, after libvirt is back: events were lost meanwhile, and a
    /// postponed preparation is possible now.
    pub(super) fn renew_standby(self: &Arc<Self>) {
        let (has_standby, is_idle, was_postponed) = {
            let mut state = self.lock();
            let is_idle = state.operation() == Operation::Idle && !state.has_run;
            (state.standby.is_some(), is_idle, std::mem::take(&mut state.is_postponed))
        };
        if has_standby {
            self.replace_standby("libvirtd has ended meanwhile");
        } else if was_postponed || is_idle && self.no_standby_reason().is_none() {
            self.request_another("libvirt was away");
        }
    }
}
