//! One machine: what is done to its domain, and what happens to it.
//!
//! What we do and what we hear come by different ways: an action returns when libvirt answers, and
//! libvirt tells by events what has become of the domain. An action that ends a run waits for both, so
//! that the end of a run is never heard in the middle of the next one. While a start is under way its
//! events are its own steps, and nobody's news.
//!
//! ```text
//!              prepare                 restore_start
//!        off ──────────▶ stands by ───────────────────▶ runs ── stop, its end ──▶ off
//!         ▲                  │                           ▲
//!         └── let go ◀───────┘    restore_start (cold)   │
//!        off ────────────────────────────────────────────┘
//! ```
//!
//! What leads to a machine that stands by, and away from it, is in `prepare`; to the outside it is off.

mod image;
mod prepare;

pub use prepare::PrepareTrigger;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use machinery::{Budget, Deadline, DumpFormat, Error, Host, MachineInfo, Reloadable, Result, State};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt_sys as sys;

use crate::call::Call;
use crate::config::Keys;
use crate::domain;
use crate::errors::{explain, is_no_domain, is_off};
use crate::events::Event;
use crate::foreign::{DiskFile, DiskRecord, disks_of, has_managed_save, remove_managed_save};
use crate::inspection;
use crate::link::Link;
use crate::restore::{self, Start};
use crate::run_marker::RunMarker;
use crate::standby::StandbyDomain;
use crate::states::{StateReport, is_end, is_save, is_start, state_of_event};

/// How long the event of an end may take after libvirt has answered that it came.
const END_EVENT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a start that did not make it in time may take to be given up. A host waits two seconds
/// beyond the deadline before it gives up the machine.
const CANCEL_TIMEOUT: Duration = Duration::from_millis(1700);

pub struct Machine {
    keys: Keys,
    link: Arc<Link>,
    host: Host,
    marker: RunMarker,
    disks: DiskRecord,
    /// What all that stand by may hold.
    budget: Arc<Budget>,
    now: Mutex<MachineState>,
    /// Wakes those who wait for the end of a run, or of what is done with a machine that stands by.
    news: Condvar,
}

#[derive(Default)]
struct MachineState {
    operation: Operation,
    /// Whether the domain runs because of us, as far as is known.
    has_run: bool,
    /// How many ends of runs were heard.
    ends: u64,
    /// What was heard last while a start is under way.
    heard: Option<StateReport>,
    /// A start, or a preparation, that did not come back in time, until it does.
    late: Option<AbandonedCall>,
    /// What stands by for the next restore.
    standby: Option<StandbyDomain>,
    /// Whether the preparation under way is to give up.
    cancel: Arc<AtomicBool>,
    /// The disks of the own run's domain, once the domain is marked.
    disks: Option<Vec<DiskFile>>,
    /// Whether libvirt has reported only own runs since the last own run ended.
    only_own_runs: bool,
    /// Whether the last own run was saved, so that somebody may resume it.
    saved: bool,
    /// Whether the host knows that the machine runs, so that no report is needed.
    host_knows_running: bool,
    /// Whether the domain was reset since the last action began.
    reset: bool,
    /// The work of somebody else because of which the machine was last not prepared.
    reported_foreign_work: Option<String>,
    /// Whether the connection was lost since the last action began.
    lost: bool,
    /// Whether it is to be prepared when libvirt is back.
    prepare_when_reconnected: bool,
    /// Why save images are made no more, once one has failed.
    image_disabled: Option<String>,
    /// How often making one was given up.
    cancelled_images: u32,
}

#[derive(Clone)]
struct AbandonedCall {
    call: Arc<Mutex<Call<()>>>,
    is_start: bool,
}

impl MachineState {
    /// Whether what the domain does is nobody's business, because the machine is off to the outside.
    fn is_hidden(&self) -> bool {
        let in_house = matches!(self.operation, Operation::Preparing | Operation::Discarding);
        in_house || self.standby.is_some() || self.late.as_ref().is_some_and(|late| !late.is_start)
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Operation {
    #[default]
    Idle,
    Starting,
    Stopping,
    Preparing,
    /// What stood by is ended.
    Discarding,
}

/// An action under way, until it is dropped.
struct Action<'a>(&'a Machine);

impl Drop for Action<'_> {
    fn drop(&mut self) {
        self.0.lock().operation = Operation::Idle;
        self.0.news.notify_all();
    }
}

impl Reloadable for Machine {
    type Keys = Keys;

    fn key_name(keys: &Keys) -> &str {
        &keys.info.name
    }

    fn unique(keys: &Keys) -> Vec<(&'static str, Option<&str>)> {
        keys.info.unique()
    }

    fn keys(&self) -> &Keys {
        &self.keys
    }
}

impl Machine {
    pub fn new(keys: Keys, budget: Arc<Budget>, link: Arc<Link>, state_dir: &Path, host: Host) -> Self {
        let marker = RunMarker::of(&keys.info.name, state_dir);
        let disks = DiskRecord::of(&keys.info.name, state_dir);
        Machine { keys, link, host, marker, disks, budget, now: Mutex::default(), news: Condvar::new() }
    }

    pub fn info(&self) -> &MachineInfo {
        &self.keys.info
    }

    /// The name of its domain.
    pub fn label(&self) -> &str {
        &self.keys.info.label
    }

    /// Whether its domain runs because of us, as far as is known.
    fn has_run(&self) -> bool {
        self.lock().has_run
    }

    /// Whether there is anything of it to end: a run, or what stands by.
    pub fn has_anything_to_end(&self) -> bool {
        let now = self.lock();
        now.has_run || now.is_hidden()
    }

    /// Finds the domain; `None` if there is no such domain, which a diagnosis reports.
    ///
    /// # Errors
    /// libvirt does not answer.
    pub fn find(&self, connect: &Connect) -> Result<Option<Domain>> {
        match connect.lookup_domain_by_name(self.label()) {
            Ok(domain) => Ok(Some(domain)),
            Err(error) if is_no_domain(&error) => Ok(None),
            Err(error) => Err(explain("look up the domain", &error).machine(&self.keys.info.name)),
        }
    }

    /// Finds the domain of a machine that is new here, and ends a run that a dead host has left.
    ///
    /// # Errors
    /// As [`find`](Machine::find); the run does not end.
    pub fn adopt(&self, connect: &Connect) -> Result<()> {
        let Some(domain) = self.find(connect)? else {
            self.marker.remove();
            return Ok(());
        };
        if self.marker.matches(&domain).map_err(|error| error.machine(&self.keys.info.name))? {
            tracing::warn!(machine = self.keys.info.name, "a run that an earlier host has left is stopped");
            let disks = disks_of(&domain).unwrap_or_default();
            domain::destroy(&domain).map_err(|error| error.machine(&self.keys.info.name))?;
            self.record_disks(&disks);
        } else if domain.is_active().unwrap_or(false) {
            tracing::warn!(
                machine = self.keys.info.name,
                "its domain runs already, started by somebody else"
            );
        }
        // An own run that was saved may be resumed later.
        if !has_managed_save(&domain) {
            self.marker.remove();
        }
        Ok(())
    }

    pub fn state(&self, deadline: Deadline) -> Result<State> {
        deadline.check("libvirt to tell the domain's state")?;
        if self.lock().operation == Operation::Starting {
            return Ok(State::Starting);
        }
        if self.is_hidden() {
            return Ok(State::Poweroff);
        }
        if !self.abandoned_call_has_ended(deadline) {
            return Ok(State::Starting);
        }
        let (state, why) = self.query_state(deadline)?;
        if state == State::Error {
            // A state has no words of its own, and this one needs some.
            self.report_state(state, &why);
        }
        Ok(state)
    }

    fn query_state(&self, deadline: Deadline) -> Result<StateReport> {
        let label = self.keys.info.label.clone();
        let ask = move |connect: &Connect| domain::state(&domain::domain(connect, &label)?);
        self.link.ask(deadline, "libvirt to tell the domain's state", ask)
    }

    /// Starts from the snapshot.
    ///
    /// # Errors
    /// It is not off; whatever kept it from running.
    pub fn restore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.start(Start::Restored, deadline)
    }

    /// Starts cold.
    ///
    /// # Errors
    /// As [`restore_start`](Machine::restore_start).
    pub fn norestore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.start(Start::Cold, deadline)
    }

    fn start(self: &Arc<Self>, how: Start, deadline: Deadline) -> Result<()> {
        if how == Start::Cold {
            self.cancel_prepare(deadline);
        }
        self.end_abandoned_call(deadline)?;
        let _starting = self.begin(Operation::Starting, deadline)?;
        if let Some(held) = self.take_standby("its next restore is not prepared yet")
            && how == Start::Restored
            && self.resume_standby(held, deadline)?
        {
            return self.ensure_no_end(deadline);
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        let (machine, too_late) = (Arc::clone(self), Arc::clone(&cancelled));
        let call = self.link.long_call(deadline, self.connect_step(), move |connect| {
            machine.bring_up(connect, how, &too_late)
        })?;
        let Some(started) = call.wait(deadline.remaining()) else {
            cancelled.store(true, Ordering::SeqCst);
            return Err(self.abandon(call, true, deadline));
        };
        started?;
        self.ensure_no_end(deadline)
    }

    /// From here on the run is ours, whatever becomes of it: noted before libvirt is asked for it, and
    /// until it is known to have ended.
    fn bring_up(&self, connect: &Connect, how: Start, cancelled: &AtomicBool) -> Result<()> {
        let domain = domain::domain(connect, self.label())?;
        // A libvirtd that hung can answer long after the start has failed.
        if cancelled.load(Ordering::SeqCst) {
            return Err(Error::failed("the start was given up, because libvirt did not answer in time"));
        }
        self.clear_leftover(&domain)?;
        domain::ensure_off(&domain)?;
        remove_managed_save(&domain, &self.keys.info.name)?;
        self.begin_marker(&domain)?;
        self.lock().has_run = true;
        let started = match how {
            Start::Restored => self.restored(connect, &domain, cancelled),
            Start::Cold => {
                self.timed("boot", || restore::start_paused(&domain, self.keys.info.snapshot.as_deref(), how))
            }
        };
        let started = started.and_then(|()| self.let_run(connect));
        if started.is_err() || cancelled.load(Ordering::SeqCst) {
            self.end_failed_start(&domain);
        }
        started
    }

    /// Records that the domain is about to be started.
    fn begin_marker(&self, domain: &Domain) -> Result<()> {
        self.lock().saved = false;
        self.marker.begin(domain)
    }

    /// Resumes the domain, which was started and is paused.
    fn let_run(&self, connect: &Connect) -> Result<()> {
        let domain = self.mark(connect)?;
        self.ensure_no_reset()?;
        domain::ensure_running(&domain)?;
        self.lock().host_knows_running = true;
        Ok(())
    }

    /// Marks the domain, which was started and is paused, as an own run. Looks the domain up again, because a
    /// reverted domain object does not know its new id.
    fn mark(&self, connect: &Connect) -> Result<Domain> {
        let domain = domain::domain(connect, self.label())?;
        self.marker.mark(&domain)?;
        let disks = disks_of(&domain)?;
        self.lock().disks = Some(disks);
        Ok(domain)
    }

    fn ensure_no_reset(&self) -> Result<()> {
        match self.lock().reset {
            true => Err(Error::unexpected_state("somebody has reset the domain before it was let run")),
            false => Ok(()),
        }
    }

    /// Tells how long a step of an action takes.
    fn timed<T>(&self, step: &str, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let done = work();
        self.host.step(&self.keys.info.name, step, begun.elapsed());
        done
    }

    /// Reports how long the connection of a start takes to open: over ssh that is a session.
    fn connect_step(&self) -> impl FnOnce(Duration) + Send + 'static {
        let (host, name) = (self.host.clone(), self.keys.info.name.clone());
        move |time| host.step(&name, "connect", time)
    }

    /// The error of the start is the one to tell.
    fn end_failed_start(&self, domain: &Domain) {
        match domain::destroy(domain) {
            Ok(_) => self.record_end(),
            Err(error) => {
                tracing::warn!(machine = self.keys.info.name, %error, "what a start has left stays for now")
            }
        }
    }

    /// Ends a start, or else a preparation, that did not make it in time.
    fn abandon(&self, call: Call<()>, is_start: bool, deadline: Deadline) -> Error {
        let error = deadline.timeout(if is_start { "the domain to run" } else { "the domain to stand by" });
        let giving_up = Deadline::after(CANCEL_TIMEOUT);
        if is_start {
            self.try_destroy(giving_up);
        } else {
            self.try_destroy_own(giving_up);
        }
        if call.wait(giving_up.remaining()).is_some() {
            return error;
        }
        self.lock().late = Some(AbandonedCall { call: Arc::new(Mutex::new(call)), is_start });
        error.detail("and libvirt is still at it")
    }

    /// Waits for a call that did not come back in time, and stops what it may have started.
    fn end_abandoned_call(&self, deadline: Deadline) -> Result<()> {
        if self.lock().late.is_none() {
            return Ok(());
        }
        self.try_destroy_own(deadline);
        if self.abandoned_call_has_ended(deadline) {
            return Ok(());
        }
        Err(deadline
            .timeout("libvirt to come to an end with an earlier start")
            .advice("Look at libvirtd's log, and restart libvirtd if it hangs"))
    }

    /// Whether there is no call that goes on although nobody waits for it, until the deadline.
    fn abandoned_call_has_ended(&self, deadline: Deadline) -> bool {
        let Some(late) = self.lock().late.clone() else { return true };
        // Somebody else who waits for it knows better when it ends.
        let Ok(call) = late.call.try_lock() else { return false };
        let ended = call.wait(deadline.remaining()).is_some();
        if ended {
            self.lock().late = None;
        }
        ended
    }

    fn try_destroy(&self, deadline: Deadline) {
        if let Err(error) = self.destroy(deadline) {
            tracing::debug!(machine = self.keys.info.name, %error, "the plug is not pulled");
        }
    }

    /// A domain may end while its start is still being finished; that end was taken for a step of it.
    fn ensure_no_end(&self, deadline: Deadline) -> Result<()> {
        let heard = self.lock().heard.take();
        let Some((State::Poweroff, why)) = heard else { return Ok(()) };
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

    /// Pulls the plug. What stands by, or is just being prepared, is let go.
    ///
    /// # Errors
    /// It is off already; libvirt cannot end it.
    pub fn stop(&self, deadline: Deadline) -> Result<()> {
        // The host also calls this to cancel a preparation, which is no reason to end somebody else's run.
        let is_preparing = self.lock().operation == Operation::Preparing;
        self.stop_by(if is_preparing { Self::destroy_own } else { Self::destroy }, deadline)
    }

    /// Stops the domain, if it is an own run.
    ///
    /// # Errors
    /// As [`stop`](Machine::stop).
    pub fn stop_own(&self, deadline: Deadline) -> Result<()> {
        self.stop_by(Self::destroy_own, deadline)
    }

    fn stop_by(&self, destroy: fn(&Self, Deadline) -> Result<bool>, deadline: Deadline) -> Result<()> {
        self.cancel_prepare(deadline);
        self.end_abandoned_call(deadline)?;
        let _stopping = self.begin(Operation::Stopping, deadline)?;
        if self.take_standby("it was stopped, and what stood by was let go with that").is_some() {
            self.lock().operation = Operation::Discarding;
            self.end_standby(deadline)?;
            return Err(already_off());
        }
        let before = self.lock().ends;
        if !destroy(self, deadline)? {
            self.record_end();
            return Err(already_off());
        }
        if !self.wait_for_end(before, deadline.within(END_EVENT_TIMEOUT)) {
            tracing::debug!(machine = self.keys.info.name, "stopped, and libvirt has sent no event");
            self.record_end();
            self.report_state(State::Poweroff, "");
        }
        Ok(())
    }

    fn destroy(&self, deadline: Deadline) -> Result<bool> {
        let label = self.keys.info.label.clone();
        self.link.ask(deadline, "libvirt to stop the domain", move |connect| {
            domain::destroy(&domain::domain(connect, &label)?)
        })
    }

    /// Presses the power button, and waits for the guest to power off.
    ///
    /// # Errors
    /// It is off already; it does not react in time.
    pub fn acpi_stop(&self, deadline: Deadline) -> Result<()> {
        self.end_abandoned_call(deadline)?;
        if self.is_hidden() {
            return Err(already_off());
        }
        let _stopping = self.begin(Operation::Stopping, deadline)?;
        let before = self.lock().ends;
        let label = self.keys.info.label.clone();
        let pressed = self.link.ask(deadline, "libvirt to press the power button", move |connect| {
            press_power_button(&domain::domain(connect, &label)?)
        })?;
        if !pressed {
            self.record_end();
            return Err(already_off());
        }
        match self.wait_for_end(before, deadline) {
            true => Ok(()),
            false => Err(deadline.timeout("the guest to react to its power button")),
        }
    }

    /// See [`views::dump_memory`].
    ///
    /// # Errors
    /// It is off; as there.
    pub fn dump_memory(&self, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        self.ensure_visible()?;
        let progress = |fraction| self.host.progress(&self.keys.info.name, fraction);
        inspection::dump_memory(&self.link, self.label(), path, format, &progress, deadline)
    }

    /// See [`views::screenshot`].
    ///
    /// # Errors
    /// It is off; as there.
    pub fn screenshot(&self, path: &Path, deadline: Deadline) -> Result<()> {
        self.ensure_visible()?;
        inspection::screenshot(&self.link, self.label(), path, deadline)
    }

    /// libvirt tells what happened to the domain.
    pub fn on_event(self: &Arc<Self>, event: Event) {
        if event == Event::Reset {
            return self.on_reset_event();
        }
        let Some(told) = state_of_event(&event) else { return };
        let mut now = self.lock();
        let (operation, hidden) = (now.operation, now.is_hidden());
        if operation == Operation::Starting {
            now.heard = Some(told.clone());
        }
        let is_foreign = operation == Operation::Idle && !hidden && !now.has_run;
        now.saved |= is_save(&event) && now.disks.is_some();
        drop(now);
        if is_foreign && is_start(&event) {
            self.on_foreign_start();
        }
        match is_end(&event) {
            _ if hidden => self.on_hidden_event(&event, &told),
            true => self.on_end(operation, told),
            false => self.report(operation, told),
        }
        if hidden && is_end(&event) {
            self.signal_end();
        }
    }

    /// Reports the end of a run, except during a start, which handles the end of its run itself. A run that
    /// ended by itself is closed before the report: whoever receives the report may use the machine at once.
    /// The end of a stopped run is reported first, so that the stop does not return before the report.
    fn on_end(&self, operation: Operation, told: StateReport) {
        if operation != Operation::Starting {
            self.close_run();
        }
        if operation == Operation::Stopping {
            self.report(operation, told);
            self.signal_end();
        } else {
            self.signal_end();
            self.report(operation, told);
        }
    }

    /// Records that somebody else has started the domain.
    fn on_foreign_start(&self) {
        self.marker.remove();
        self.lock().only_own_runs = false;
    }

    /// Told before anybody who waits for it goes on.
    fn report(&self, operation: Operation, (state, reason): StateReport) {
        let name = &self.keys.info.name;
        match operation {
            Operation::Starting => tracing::debug!(machine = name, %state, reason, "a step of the start"),
            Operation::Stopping if state == State::Poweroff => self.report_state(state, ""),
            Operation::Stopping => tracing::debug!(machine = name, %state, reason, "a step of the stop"),
            // The event of the own start may come after the start has returned.
            _ if state == State::Running && self.lock().host_knows_running => {}
            _ => self.report_state(state, &reason),
        }
    }

    /// Reports a state to the host that the host has not ordered.
    pub(super) fn report_state(&self, state: State, reason: &str) {
        self.lock().host_knows_running = state == State::Running;
        self.host.state_changed(&self.keys.info.name, state, reason);
    }

    /// The connection is lost, and with it the sight of the domain.
    pub fn on_connection_lost(&self, why: &str) {
        // Nobody hears meanwhile who starts the domain.
        self.lock().only_own_runs = false;
        if self.has_run() {
            self.report_state(State::Error, why);
        }
        self.unusable(why);
    }

    /// The connection is there again: looks what has become of the domain.
    pub fn on_reconnected(self: &Arc<Self>, connect: &Connect) {
        self.renew_standby();
        let before @ (has_run, operation, _) = self.now();
        if !has_run || operation == Operation::Starting {
            return;
        }
        let look = |domain: Domain| Ok((domain::state(&domain)?, self.marker.matches(&domain)?));
        let state = domain::domain(connect, self.label()).and_then(look);
        if self.now() != before {
            // Somebody has acted meanwhile, and knows better.
            return;
        }
        match state {
            Ok((told, true)) => self.report(operation, told),
            Ok((told, false)) => self.ended_unseen(operation, told),
            Err(error) => {
                tracing::warn!(machine = self.keys.info.name, %error, "libvirt is back, but does not tell the domain's state")
            }
        }
    }

    /// Records that the own run ended while libvirt was away. The domain's current state may be somebody
    /// else's doing.
    fn ended_unseen(&self, operation: Operation, told: StateReport) {
        self.lock().disks = None;
        self.on_end(operation, (State::Poweroff, "it ended while libvirt was away".to_owned()));
        if told.0 != State::Poweroff {
            self.report(operation, told);
        }
    }

    /// Whether there is a run, what is done, and how many ends were heard.
    fn now(&self) -> (bool, Operation, u64) {
        let now = self.lock();
        (now.has_run, now.operation, now.ends)
    }

    fn begin(&self, operation: Operation, deadline: Deadline) -> Result<Action<'_>> {
        let mut now = self.wait_for_hidden_work(deadline);
        if matches!(now.operation, Operation::Preparing | Operation::Discarding) {
            return Err(deadline.timeout("what stands by to be let go"));
        }
        if now.operation != Operation::Idle {
            return Err(Error::unexpected_state("another action on the machine is under way"));
        }
        now.operation = operation;
        now.heard = None;
        now.cancel = Arc::default();
        now.reset = false;
        now.lost = false;
        Ok(Action(self))
    }

    /// There is no run any more.
    fn record_end(&self) {
        self.close_run();
        self.signal_end();
    }

    /// Records the end of the own run, if there was one.
    fn close_run(&self) {
        let disks = self.lock().disks.take();
        if let Some(disks) = disks {
            self.record_disks(&disks);
        }
        self.remove_marker();
        let mut now = self.lock();
        now.has_run = false;
        now.host_knows_running = false;
    }

    /// Removes the note of a run that has ended. A run that was saved is still an own run when somebody
    /// resumes it.
    fn remove_marker(&self) {
        if !self.lock().saved {
            self.marker.remove();
        }
    }

    /// Records the state in which an own run has left its disks.
    fn record_disks(&self, disks: &[DiskFile]) {
        self.disks.save(disks);
        self.lock().only_own_runs = true;
    }

    /// Wakes those who wait for the end of a run.
    fn signal_end(&self) {
        self.lock().ends += 1;
        self.news.notify_all();
    }

    /// Waits until more ends were heard than `before`.
    fn wait_for_end(&self, before: u64, deadline: Deadline) -> bool {
        let silent = |now: &mut MachineState| now.ends == before;
        let waited = self.news.wait_timeout_while(self.lock(), deadline.remaining(), silent);
        let (now, _) = waited.unwrap_or_else(PoisonError::into_inner);
        now.ends != before
    }

    /// Each statement that holds the lock leaves it whole, so poison means nothing.
    fn lock(&self) -> MutexGuard<'_, MachineState> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `false` when the domain is off.
fn press_power_button(domain: &Domain) -> Result<bool> {
    // Named, because otherwise libvirt may ask an agent in the guest first.
    let pressed = match domain.shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN) {
        // Some drivers have one way only, and no name for it.
        Err(error) if error.code().is(ErrorNumber::InvalidArg) => domain.shutdown(),
        other => other,
    };
    match pressed {
        Ok(()) => Ok(true),
        Err(error) if is_off(&error) => Ok(false),
        Err(error) => Err(explain("press the power button", &error)),
    }
}

fn already_off() -> Error {
    Error::state_reached("the machine is powered off already")
}
