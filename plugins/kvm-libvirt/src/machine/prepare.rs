//! A machine that stands by: how it gets there, and the ways away from it.
//!
//! ```text
//!                 ┌── restore_start ──▶ still what it was? ── yes ──▶ resumed, and it is a run
//!  prepare ──▶ Held                            └── no ──▶ ended, and the snapshot is reverted to
//!                 ├── stop, norestore_start, shutdown ──▶ ended
//!                 └── it ends or is resumed by itself, libvirtd ends ──▶ ended, and the host is asked
//!                                                                        to have it prepared again
//! ```
//!
//! The run note is written before libvirt is asked for the domain, as for a run, so that the next host
//! ends what this one leaves. It is also what makes sure that only the domain is ended that was started
//! here: somebody may have started another one meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use machinery::{Deadline, Error, Reloadable, RestoreReadiness, Result, Share, Standby, State};
use virt::connect::Connect;
use virt::domain::Domain;

use super::{END_EVENT_TIMEOUT, Machine, MachineState, Operation};
use crate::call::Call;
use crate::domain;
use crate::errors::{explain, is_no_domain};
use crate::events::Event;
use crate::foreign::{self, remove_managed_save};
use crate::snapshot::{self, Snapshot};
use crate::standby::{self, Fingerprint, StandbyDomain};
use crate::states::{StateReport, is_revert_step};

/// How long it may take to end what has stood by.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a new libvirtd is given to take a domain over that an old one was loading. One that cannot do
/// it hangs until the domain is ended.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(3);

/// The reason for preparing a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrepareTrigger {
    /// Somebody has asked for the preparation.
    Request,
    /// The host prepares the machine by itself, so no changes of somebody else may be lost.
    Automatic,
}

impl Machine {
    /// Brings the domain to its snapshot and leaves it paused, for the next restore to let it run.
    ///
    /// # Errors
    /// The machine is on; libvirt cannot; it was given up.
    pub fn prepare(self: &Arc<Self>, trigger: PrepareTrigger, deadline: Deadline) -> Result<()> {
        self.ensure_no_run(deadline)?;
        if let Some(why) = self.no_standby_reason()
            && self.keys.image.is_off()
        {
            // One of a time when it was on.
            self.keys.image.remove();
            let why = [Some(why.to_owned()), self.keys.image.why_none()].into_iter().flatten();
            self.report_plain(&why.collect::<Vec<_>>().join("; "));
            return Ok(());
        }
        // A restore that comes meanwhile would have to wait for libvirt twice.
        if self.prepare_when_reconnected() {
            return Ok(());
        }
        let prepared = self.prepare_with_libvirt(trigger, deadline);
        // Asking takes time, which there has to be.
        if prepared.is_err() && !deadline.passed() && self.prepare_when_reconnected() {
            return Ok(());
        }
        if let Err(error) = &prepared {
            self.report_plain(&error.to_string());
        }
        self.handle_events_during_prepare(prepared.is_ok());
        prepared
    }

    /// Whether libvirt is away; then it is prepared when libvirt is back.
    fn prepare_when_reconnected(&self) -> bool {
        self.lock().prepare_when_reconnected = true;
        if self.link.is_away() {
            self.report_plain("libvirt is away, and the machine is prepared when it is back");
            return true;
        }
        self.lock().prepare_when_reconnected = false;
        false
    }

    fn prepare_with_libvirt(self: &Arc<Self>, trigger: PrepareTrigger, deadline: Deadline) -> Result<()> {
        self.end_abandoned_call(deadline)?;
        let _preparing = self.begin(Operation::Preparing, deadline)?;
        let cancelled = Arc::clone(&self.lock().cancel);
        let (machine, too_late) = (Arc::clone(self), Arc::clone(&cancelled));
        let call = self.link.long_call(deadline, self.connect_step(), move |connect| {
            machine.prepare_restore(connect, trigger, &too_late)
        })?;
        let prepared = call.wait(deadline.remaining()).unwrap_or_else(|| {
            cancelled.store(true, Ordering::SeqCst);
            Err(self.abandon(call, false, deadline))
        });
        prepared.and_then(|()| self.discard_if_cancelled(&cancelled))
    }

    /// A stop may come when all is prepared, but before that was known to anybody.
    fn discard_if_cancelled(&self, cancelled: &AtomicBool) -> Result<()> {
        ensure_not_cancelled(cancelled).inspect_err(|_| {
            if self.take_standby("it was given up").is_some() {
                self.preparation_failed();
            }
        })
    }

    /// Makes up for what was heard while a preparation was under way.
    fn handle_events_during_prepare(self: &Arc<Self>, prepared: bool) {
        let (unusable, lost, reset) = {
            let now = self.lock();
            (now.standby.as_ref().and_then(|held| held.unusable.clone()), now.lost, now.reset)
        };
        if let Some(unusable) = unusable {
            self.replace(&unusable);
        } else if lost && !prepared {
            self.host
                .preparation_invalidated(&self.keys.info.name, "libvirtd has ended while it was prepared");
        } else if reset && !prepared {
            self.host
                .preparation_invalidated(&self.keys.info.name, "somebody has reset it while it was prepared");
        }
    }

    /// Why it does not stand by at all.
    fn no_standby_reason(&self) -> Option<&'static str> {
        match self.keys.standby {
            Standby::On => None,
            Standby::Off => Some("standby is off"),
            Standby::Auto => Some(
                "standby is not cheap here: it holds all of the guest's memory; set standby: on to have it",
            ),
        }
    }

    /// Expects that nothing of it runs but what stands by, so that the machine can go.
    ///
    /// # Errors
    /// It is on.
    pub fn ensure_off(&self, deadline: Deadline) -> Result<()> {
        // The host hears of an end a moment before it is noted here.
        let run_marker = |now: &mut MachineState| now.has_run;
        let patience = deadline.within(END_EVENT_TIMEOUT).remaining();
        let waited = self.news.wait_timeout_while(self.lock(), patience, run_marker);
        if !waited.unwrap_or_else(PoisonError::into_inner).0.has_run {
            return Ok(());
        }
        let on = Error::unexpected_state("the machine is on, so it cannot be changed or removed");
        Err(on.machine(self.name()).advice("Stop it, and reload again"))
    }

    /// The machine goes: what stands by, or is just being prepared, is let go.
    ///
    /// # Errors
    /// libvirt cannot end it.
    pub fn discard_standby(&self, deadline: Deadline) -> Result<()> {
        self.cancel_prepare(deadline);
        self.end_abandoned_call(deadline)?;
        let _letting_go = self.begin(Operation::Discarding, deadline)?;
        self.take_standby("its configuration has changed, and what stood by was let go with that");
        // Without a need libvirt is not asked: it may be away.
        if self.marker.exists() { self.end_standby(deadline) } else { Ok(()) }
    }

    /// Removes its save image, unless one of these machines has it.
    pub fn remove_image(&self, unless: &[Arc<Machine>]) {
        if !unless.iter().any(|machine| machine.keys.image.is_where(&self.keys.image)) {
            self.keys.image.remove();
        }
    }

    /// Waits for the event of a run's end: libvirt may say that the run is over before the event arrives.
    fn ensure_no_run(&self, deadline: Deadline) -> Result<()> {
        let (has_run, _, before) = self.now();
        let soon = deadline.within(END_EVENT_TIMEOUT);
        if has_run
            && self.query_state(soon).is_ok_and(|(state, _)| state == State::Poweroff)
            && !self.wait_for_end(before, soon)
        {
            self.record_end();
        }
        match self.has_run() {
            true => Err(Error::unexpected_state("the machine is running").advice("Stop it first")),
            false => Ok(()),
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
            None => match self.stand_by(connect, trigger, cancelled)? {
                Some(why) => why,
                None => return Ok(()),
            },
        };
        self.have_image(connect, trigger, cancelled, &why)
    }

    /// Returns the reason why the domain, which is off, is not reverted. There is one if the revert would
    /// discard somebody else's work and nobody has asked for that.
    pub(super) fn foreign_work(&self, domain: &Domain, trigger: PrepareTrigger) -> Option<String> {
        let only_own_runs = self.lock().only_own_runs;
        let work = match trigger {
            PrepareTrigger::Request => None,
            PrepareTrigger::Automatic => self.disks.foreign_work(domain, only_own_runs),
        };
        let why = work.map(|work| foreign::advice(self.name(), &work));
        let before = std::mem::replace(&mut self.lock().reported_foreign_work, why.clone());
        if let Some(why) = &why
            && before != Some(why.clone())
        {
            tracing::warn!(machine = self.keys.info.name, "{why}");
        }
        why
    }

    /// Whatever it comes to, nothing is left of it unless the machine stands by; if it does not, that is
    /// why.
    fn stand_by(
        &self,
        connect: &Connect,
        trigger: PrepareTrigger,
        cancelled: &AtomicBool,
    ) -> Result<Option<String>> {
        if self.standby_is_valid(connect) {
            return Ok(None);
        }
        self.take_standby("it is prepared anew");
        let domain = domain::domain(connect, self.label())?;
        self.clear_leftover(&domain)?;
        domain::ensure_off(&domain)?;
        if let Some(why) = self.foreign_work(&domain, trigger) {
            return Ok(Some(why));
        }
        let snapshot = snapshot::find(&domain, self.keys.info.snapshot.as_deref())?;
        let share = match self.share_for(&domain, &snapshot)? {
            Ok(share) => share,
            Err(why) => return Ok(Some(why)),
        };
        let loaded = self.load(connect, &domain, &snapshot, share, cancelled);
        if loaded.is_err() {
            self.preparation_failed();
        }
        loaded.map(|()| None)
    }

    /// Its part of the memory for all that stand by, or why it has none.
    fn share_for(&self, domain: &Domain, snapshot: &Snapshot) -> Result<std::result::Result<Share, String>> {
        if !snapshot.has_memory() {
            let why = "its snapshot was taken while the domain was off, so there is no memory to load";
            return Ok(Err(why.to_owned()));
        }
        Ok(self.budget.take(standby::largest(domain)?))
    }

    fn load(
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
        let domain = self.mark(connect)?;
        let fingerprint = Fingerprint::of(&domain, snapshot.identity.clone())?;
        let held = StandbyDomain::new(&domain, fingerprint.clone(), events_from, share);
        let ready = held.ready();
        self.install(held, cancelled)?;
        // Only now, so that what happens after the look is heard.
        fingerprint.check(connect, self.label(), self.keys.info.snapshot.as_deref())?;
        self.ensure_no_reset()?;
        self.host.ready(&self.keys.info.name, &ready);
        Ok(())
    }

    /// A stop that comes before this is obeyed, and one that comes later finds what there is to let go.
    fn install(&self, held: StandbyDomain, cancelled: &AtomicBool) -> Result<()> {
        let mut now = self.lock();
        ensure_not_cancelled(cancelled)?;
        now.standby = Some(held);
        Ok(())
    }

    /// Ends what a preparation that failed has left. libvirt may have gone away in the middle of it, so
    /// not by the connection it had.
    pub(super) fn preparation_failed(&self) {
        drop(self.lock().standby.take());
        let label = self.keys.info.label.clone();
        let settled = self.link.ask(
            Deadline::after(SETTLE_TIMEOUT),
            "libvirt to take the domain over",
            move |connect| {
                domain::settle(&domain::domain(connect, &label)?);
                Ok(())
            },
        );
        if let Err(error) = settled {
            tracing::debug!(machine = self.keys.info.name, %error, "libvirt has not taken the domain over");
        }
        if let Err(error) = self.end_standby(Deadline::after(CLEANUP_TIMEOUT)) {
            tracing::warn!(machine = self.keys.info.name, %error, "what a preparation has left stays for now");
        }
    }

    fn standby_is_valid(&self, connect: &Connect) -> bool {
        let fingerprint = match &self.lock().standby {
            Some(StandbyDomain { fingerprint, unusable: None, .. }) => fingerprint.clone(),
            _ => return false,
        };
        fingerprint.check(connect, self.label(), self.keys.info.snapshot.as_deref()).is_ok()
    }

    /// Has a preparation that is under way give up. It is waited for by what comes next.
    pub(super) fn cancel_prepare(&self, deadline: Deadline) {
        {
            let now = self.lock();
            if now.operation != Operation::Preparing {
                return;
            }
            now.cancel.store(true, Ordering::SeqCst);
        }
        // What is in the middle of being loaded need not be loaded to its end.
        self.try_destroy_own(deadline);
    }

    /// Ends the domain, if it was started here.
    pub(super) fn try_destroy_own(&self, deadline: Deadline) {
        if let Err(error) = self.destroy_own(deadline) {
            tracing::debug!(machine = self.keys.info.name, %error, "the plug is not pulled");
        }
    }

    pub(super) fn destroy_own(&self, deadline: Deadline) -> Result<bool> {
        let (label, marker) = (self.keys.info.label.clone(), self.marker.clone());
        self.link.ask(deadline, "libvirt to end what stands by", move |connect| {
            match connect.lookup_domain_by_name(&label) {
                Ok(domain) => Ok(marker.matches(&domain)? && domain::destroy(&domain)?),
                Err(error) if is_no_domain(&error) => Ok(false),
                Err(error) => Err(explain("look up the domain", &error)),
            }
        })
    }

    /// Waits until nothing is done that nobody outside has asked for.
    pub(super) fn wait_for_hidden_work(&self, deadline: Deadline) -> MutexGuard<'_, MachineState> {
        let in_house =
            |now: &mut MachineState| matches!(now.operation, Operation::Preparing | Operation::Discarding);
        let waited = self.news.wait_timeout_while(self.lock(), deadline.remaining(), in_house);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// What stands by, which does so no more; `why` says it.
    pub(super) fn take_standby(&self, why: &str) -> Option<StandbyDomain> {
        let held = self.lock().standby.take()?;
        self.report_plain(why);
        Some(held)
    }

    /// Lets what stands by run; `false` if it must not, and then it is left for the start to end.
    pub(super) fn resume_standby(self: &Arc<Self>, held: StandbyDomain, deadline: Deadline) -> Result<bool> {
        if let Some(unusable) = &held.unusable {
            tracing::warn!(machine = self.keys.info.name, unusable, "what stands by is not used");
            return Ok(false);
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        let resumed = Arc::new(AtomicBool::new(false));
        let (machine, too_late, done) = (Arc::clone(self), Arc::clone(&cancelled), Arc::clone(&resumed));
        let call = self.link.short_call(deadline, move |connect, number| {
            let run_marker =
                number == held.events_from && machine.resume(connect, &held.fingerprint, &too_late);
            done.store(run_marker, Ordering::SeqCst);
            Ok(())
        })?;
        match call.wait(deadline.remaining()) {
            Some(outcome) => outcome.map(|()| resumed.load(Ordering::SeqCst)),
            None => {
                cancelled.store(true, Ordering::SeqCst);
                Err(self.abandon(call, true, deadline))
            }
        }
    }

    fn resume(&self, connect: &Connect, fingerprint: &Fingerprint, cancelled: &AtomicBool) -> bool {
        let checked = self
            .timed("check", || fingerprint.check(connect, self.label(), self.keys.info.snapshot.as_deref()));
        let domain = match checked {
            Ok(domain) => domain,
            Err(error) => return self.log_unused(&error),
        };
        self.lock().has_run = true;
        // The event of a reset may arrive after the answers to later requests.
        let resumed = self.timed("resume", || domain::resume(&domain)).and_then(|()| self.ensure_no_reset());
        if let Err(error) = resumed {
            self.lock().has_run = false;
            return self.log_unused(&error);
        }
        self.lock().host_knows_running = true;
        if cancelled.load(Ordering::SeqCst) {
            self.end_failed_start(&domain);
        }
        true
    }

    fn log_unused(&self, why: &Error) -> bool {
        tracing::warn!(machine = self.keys.info.name, %why, "what stands by is not used");
        false
    }

    /// Ends what stood by, or a run that could not be ended when it should have been.
    pub(super) fn clear_leftover(&self, domain: &Domain) -> Result<()> {
        if !self.has_run() { self.end_own(domain) } else { Ok(()) }
    }

    /// Ends what has stood by, and returns when its end was heard.
    pub(super) fn end_standby(&self, deadline: Deadline) -> Result<()> {
        let before = self.lock().ends;
        let ended = self.destroy_own(deadline)?;
        self.after_own_end(ended, before, deadline);
        Ok(())
    }

    pub(super) fn end_own(&self, domain: &Domain) -> Result<()> {
        if self.marker.matches(domain)? {
            let before = self.lock().ends;
            let ended = domain::destroy(domain)?;
            self.after_own_end(ended, before, Deadline::after(END_EVENT_TIMEOUT));
        } else if !domain.is_active().unwrap_or(true) {
            // What it was about has ended; what somebody starts later is not ours.
            self.remove_marker();
        }
        Ok(())
    }

    pub(super) fn after_own_end(&self, ended: bool, before: u64, deadline: Deadline) {
        if ended {
            self.wait_for_end(before, deadline.within(END_EVENT_TIMEOUT));
        } else {
            self.lock().disks = None;
        }
        self.close_run();
        // It was not the end of what is being started.
        self.lock().heard = None;
    }

    /// Handles a reset, which boots the guest anew. A standby, or a domain that is about to be resumed, has
    /// lost its snapshot's state. A guest that runs may reboot.
    pub(super) fn on_reset_event(self: &Arc<Self>) {
        let hidden = {
            let mut now = self.lock();
            now.reset = true;
            now.is_hidden()
        };
        if hidden {
            self.replace("somebody has reset what stood by");
        }
    }

    /// Something happened to a domain that nobody outside knows to be there.
    pub(super) fn on_hidden_event(self: &Arc<Self>, event: &Event, (state, reason): &StateReport) {
        tracing::debug!(machine = self.keys.info.name, %state, reason, "a step of standing by");
        if !is_revert_step(event) {
            self.replace(&format!("what stood by is {state} by itself: {reason}"));
        }
    }

    /// Ends what stands by in a thread of its own, and asks for another one.
    fn replace(self: &Arc<Self>, why: &str) {
        {
            let mut now = self.lock();
            let Some(held) = &mut now.standby else { return };
            held.unusable = Some(why.to_owned());
            if now.operation != Operation::Idle {
                // Whoever is at it will see.
                return;
            }
            now.standby = None;
            now.operation = Operation::Discarding;
        }
        let (machine, reason) = (Arc::clone(self), why.to_owned());
        let replacing = Call::start(move || {
            machine.end_and_request_renewal(&reason);
            Ok(())
        });
        if let Err(error) = replacing {
            tracing::error!(machine = self.keys.info.name, %error, "what stood by is not ended");
            drop(super::Action(self));
        }
    }

    fn end_and_request_renewal(&self, why: &str) {
        let letting_go = super::Action(self);
        self.report_plain(why);
        if let Err(error) = self.end_standby(Deadline::after(CLEANUP_TIMEOUT)) {
            tracing::warn!(machine = self.keys.info.name, %error, "what stood by stays for now");
        }
        drop(letting_go);
        match self.query_state(Deadline::after(CLEANUP_TIMEOUT)) {
            Ok((State::Poweroff, _)) => self.host.preparation_invalidated(&self.keys.info.name, why),
            // Somebody has started it again, of which nobody was told.
            Ok((state, reason)) => self.report_state(state, &reason),
            Err(error) => tracing::warn!(machine = self.keys.info.name, %error, "what stood by is gone"),
        }
    }

    /// What happens to it is not heard any more.
    pub(super) fn unusable(&self, why: &str) {
        let mut now = self.lock();
        now.lost = true;
        let Some(held) = &mut now.standby else { return };
        held.unusable = Some(why.to_owned());
        drop(now);
        self.report_plain(why);
    }

    /// libvirt is there again: what stood by has been out of sight, and what was not prepared because
    /// libvirt was away can be now.
    pub(super) fn renew_standby(self: &Arc<Self>) {
        let (stands_by, idle, waits) = {
            let mut now = self.lock();
            let idle = now.operation == Operation::Idle && !now.has_run;
            (now.standby.is_some(), idle, std::mem::take(&mut now.prepare_when_reconnected))
        };
        if stands_by {
            self.replace("libvirtd has ended meanwhile");
        } else if waits || idle && self.no_standby_reason().is_none() {
            self.host.preparation_invalidated(&self.keys.info.name, "libvirt was away");
        }
    }

    pub(super) fn is_hidden(&self) -> bool {
        self.forget_ended_preparation();
        self.lock().is_hidden()
    }

    /// Forgets a preparation that nobody waits for once it has ended.
    fn forget_ended_preparation(&self) {
        if self.lock().late.as_ref().is_some_and(|late| !late.is_start) {
            self.abandoned_call_has_ended(Deadline::after(Duration::ZERO));
        }
    }

    /// For looks at a machine: one that stands by is off.
    ///
    /// # Errors
    /// It is.
    pub(super) fn ensure_visible(&self) -> Result<()> {
        match self.is_hidden() {
            true => Err(Error::unexpected_state("the machine is powered off").advice("Start it first")),
            false => Ok(()),
        }
    }

    pub(super) fn report_plain(&self, why: &str) {
        let ready = RestoreReadiness { reason: why.to_owned(), ..RestoreReadiness::default() };
        self.host.ready(&self.keys.info.name, &ready);
    }
}

pub(super) fn ensure_not_cancelled(cancelled: &AtomicBool) -> Result<()> {
    match cancelled.load(Ordering::SeqCst) {
        true => Err(Error::failed("preparing was given up for something else")),
        false => Ok(()),
    }
}
