//! The rules of an action: what it expects, how long it may take, what happens on failure.
//!
//! | action | expected state | on failure |
//! | --- | --- | --- |
//! | restore_start | running | stop, disable the machine |
//! | norestore_start | running | stop, disable the machine |
//! | stop | poweroff | disable the machine |
//! | acpi_stop | poweroff | fall back to stop |
//! | dump_memory, screenshot | unchanged | – |
//! | prepare | poweroff | – |
//!
//! The traffic of a machine that a task has is captured from before it runs until it is stopped.
//!
//! They are Cuckoo3's (`node/machinery.py`), because its clients rely on them, with one change for
//! the better: a start of a machine that runs although no task holds it first stops it, instead of
//! losing the machine. A machine in the wanted state already has been stopped with success; what a
//! machinery does not support fails and leaves the machine enabled; a plugin that panics, answers
//! nonsense or does not come back costs the machine.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use machinery::{Deadline, Error, ErrorKind, Result, State};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit, watch};
use tokio::task::JoinHandle;

use super::call::{Called, call, call_unless};
use super::metrics::{Metrics, milliseconds};
use super::{Action, CLOSING, Occasion, Outcome};
use crate::capture;
use crate::config::Timeouts;
use crate::fleet::Machine;
use crate::fleet::books::Books;

/// How long a plugin may take at least to tell a state after an action.
const LAST_QUESTION: Duration = Duration::from_secs(1);

/// What all actors share.
pub struct House {
    /// What the configuration says.
    pub settings: RwLock<Settings>,
    /// A permit for each restore that may go on; who waits for one is served in turn.
    pub restores: Semaphore,
    /// The same for preparing restores, which never keeps one waiting that is wanted now.
    pub preparations: Arc<Semaphore>,
    /// How often each action was done, and how long it took.
    pub metrics: Arc<Metrics>,
    /// Where a machine that is disabled is noted.
    pub books: Arc<Books>,
    /// Told when a machine is free whose configuration has been replaced.
    pub outdated: Notify,
}

/// What the configuration says about all actions.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long each may take.
    pub timeouts: Timeouts,
    /// How to capture traffic, if it is to be captured.
    pub capture: Option<capture::Settings>,
}

impl Settings {
    /// Returns the configuration keys whose values differ in `new`.
    fn differing(&self, new: &Settings) -> Vec<String> {
        let (old_capture, new_capture) = (self.capture.as_ref(), new.capture.as_ref());
        let both = old_capture.zip(new_capture);
        let keys = [
            ("timeouts", self.timeouts != new.timeouts),
            ("tcpdump.enabled", old_capture.is_some() != new_capture.is_some()),
            ("tcpdump.path", both.is_some_and(|(old, new)| old.tcpdump != new.tcpdump)),
            ("resultserver", both.is_some_and(|(old, new)| old.result_server != new.result_server)),
        ];
        keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key.to_owned()).collect()
    }
}

impl House {
    /// Applies these settings to all later actions.
    pub fn set(&self, settings: Settings) {
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    /// Returns the configuration keys whose values differ in `settings`.
    pub fn differing(&self, settings: &Settings) -> Vec<String> {
        self.settings().differing(settings)
    }

    fn settings(&self) -> Settings {
        self.settings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How long each action may take.
    pub fn timeouts(&self) -> Timeouts {
        self.settings().timeouts
    }

    /// Waits until a restore may begin; other actions need no turn. It is refused when the host ends.
    async fn turn(&self, action: &Action) -> Result<Option<SemaphorePermit<'_>>, Failure> {
        if *action != Action::RestoreStart {
            return Ok(None);
        }
        let closing = |_| Failure { reason: Error::failed(CLOSING), disable: false };
        self.restores.acquire().await.map(Some).map_err(closing)
    }
}

/// The one who acts on a machine.
pub struct Actor {
    machine: Arc<Machine>,
    house: Arc<House>,
    /// The call that did not come back, if one did not: until it does, nothing else may be called.
    lost: Option<JoinHandle<()>>,
    /// True when the preparation under way has been told to give up, and has not for too long.
    out_of_patience: Arc<watch::Sender<bool>>,
}

/// A failure, and whether it costs the machine.
struct Failure {
    reason: Error,
    disable: bool,
}

impl From<Error> for Failure {
    fn from(reason: Error) -> Self {
        let harmless = matches!(reason.kind(), ErrorKind::Unsupported);
        Failure { reason, disable: !harmless }
    }
}

impl Actor {
    /// The actor of that machine.
    pub fn new(machine: Arc<Machine>, house: Arc<House>) -> Self {
        Actor { machine, house, lost: None, out_of_patience: Arc::default() }
    }

    /// Where to say that the preparation under way is not waited for any more.
    pub fn out_of_patience(&self) -> Arc<watch::Sender<bool>> {
        Arc::clone(&self.out_of_patience)
    }

    /// The machine it acts on.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Runs one action to its end.
    pub async fn perform(&mut self, action: &Action) -> Outcome {
        self.machine.set_busy(true);
        self.machine.clear_steps();
        let begun = std::time::Instant::now();
        let result = self.by_the_rules(action).await;
        self.machine.set_busy(false);
        let took = begun.elapsed();
        let steps = self.count(action.name(), took, result.is_err());
        let took_ms = milliseconds(took);
        match result {
            Ok(()) => {
                tracing::info!(machine = self.machine.name(), action = action.name(), took_ms, steps, "done");
                Ok(())
            }
            Err(Failure { reason, disable }) => {
                let reason = reason.action(action.name()).machine(self.machine.name()).to_string();
                let machine = self.machine.name();
                if matches!(action, Action::Prepare(_)) && !disable {
                    // The next restore does without, and the plugin has told how ready the machine is.
                    tracing::warn!(machine, took_ms, steps, reason, "not prepared");
                } else {
                    tracing::error!(machine, action = action.name(), took_ms, steps, reason, "failed");
                    self.machine.add_error(&reason);
                }
                if disable {
                    self.disable(&reason).await;
                }
                Err(reason)
            }
        }
    }

    /// Counts an action in the metrics, and gives its steps as text.
    fn count(&self, action: &'static str, took: Duration, failed: bool) -> String {
        let steps = self.machine.status().steps;
        self.house.metrics.count(&self.machine.machinery.name, action, took, &steps, failed);
        let text = steps.iter().map(|(step, took)| format!("{step} {:.1}", milliseconds(*took)));
        text.collect::<Vec<_>>().join(", ")
    }

    /// Whether there is a restore to prepare: for a machine that is off, in the pool, and that no task has.
    /// A task may want to look at what its machine has left before anything is begun anew.
    pub fn can_prepare(&self) -> bool {
        let in_pool = self.machine.status().standing.disabled_reason().is_none();
        in_pool && self.machine.machinery.capabilities.prepare && self.is_free()
    }

    /// Whether nobody has the machine, and nothing runs on it.
    pub fn is_free(&self) -> bool {
        self.machine.status().is_free() && self.lost.is_none()
    }

    /// Waits for the turn to prepare. `None` when the host ends.
    pub async fn turn_to_prepare(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.house.preparations).acquire_owned().await.ok()
    }

    async fn disable(&self, reason: &str) {
        self.machine.disable(reason);
        if let Err(error) = self.house.books.save().await {
            tracing::error!(machine = self.machine.name(), %error, "disabled, but not beyond a restart of the host");
        }
    }

    async fn by_the_rules(&mut self, action: &Action) -> Result<(), Failure> {
        self.expect_no_lost_call()?;
        self.expect_supported(action)?;
        self.expect_usable(action)?;
        match action {
            Action::RestoreStart => self.start(action, self.house.timeouts().restore_start).await,
            Action::NorestoreStart => self.start(action, self.house.timeouts().norestore_start).await,
            Action::Stop => self.stop().await.map_err(Failure::from),
            Action::StopOwn => self.stop_own().await.map_err(Failure::from),
            Action::AcpiStop => self.acpi_stop().await,
            Action::DumpMemory { .. } => self.look(action, self.house.timeouts().dump_memory).await,
            Action::Screenshot { .. } => self.look(action, self.house.timeouts().screenshot).await,
            Action::Prepare(occasion) => self.prepare(*occasion).await,
        }
    }

    fn expect_no_lost_call(&mut self) -> Result<(), Failure> {
        match self.lost.take() {
            Some(call) if !call.is_finished() => {
                self.lost = Some(call);
                let reason = Error::failed("an earlier call into its plugin has not come back")
                    .advice("Restart the host to get the machine back");
                // Disabled since that call, unless somebody has put it back into the pool.
                Err(Failure { reason, disable: self.machine.status().standing.disabled.is_none() })
            }
            _ => Ok(()),
        }
    }

    /// Told before anything is done: a start would stop a running machine first.
    fn expect_supported(&self, action: &Action) -> Result<(), Failure> {
        let able = self.machine.machinery.capabilities;
        let supported = match action {
            Action::RestoreStart | Action::Stop | Action::StopOwn => true,
            Action::NorestoreStart => able.norestore_start,
            Action::AcpiStop => able.acpi_stop,
            Action::DumpMemory { .. } => able.dump_memory,
            Action::Screenshot { .. } => able.screenshot,
            Action::Prepare(_) => able.prepare,
        };
        if supported { Ok(()) } else { Err(Error::unsupported(action.name()).into()) }
    }

    /// Refuses the action if the plugin has reported that it cannot use the machine.
    fn expect_usable(&self, action: &Action) -> Result<(), Failure> {
        let starts = matches!(action, Action::RestoreStart | Action::NorestoreStart | Action::Prepare(_));
        match self.machine.status().standing.unusable.filter(|_| starts) {
            Some(why) => {
                let reason = Error::environment(format!("the machine cannot be used: {why}"));
                let advice = "When that is put right, `reload` or `enable-machine` looks again";
                Err(Failure { reason: reason.advice(advice), disable: false })
            }
            None => Ok(()),
        }
    }

    async fn start(&mut self, action: &Action, limit: Duration) -> Result<(), Failure> {
        self.end_earlier_run().await?;
        let house = Arc::clone(&self.house);
        let turn = house.turn(action).await?;
        if let Some(settings) = house.settings().capture {
            capture::begin(&self.machine, &settings).await;
        }
        self.machine.set_state(State::Starting);
        self.machine.set_own_run();
        let started = self.run_to(State::Running, action, limit).await;
        // The plugin may have reported the end of an earlier run meanwhile.
        self.machine.set_own_run();
        // What a failed start needs to be cleared away, no other restore waits for.
        drop(turn);
        let Err(error) = started else { return Ok(()) };
        if error.kind() == ErrorKind::Unsupported {
            self.machine.set_state(State::Poweroff);
        } else if self.lost.is_none() {
            self.clear_away().await;
        }
        capture::end(&self.machine).await;
        Err(error.into())
    }

    /// Of a machine that runs although nobody holds it, and of one that powered itself off while it was
    /// captured.
    async fn end_earlier_run(&mut self) -> Result<()> {
        let before = self.state().await?;
        if before != State::Poweroff {
            tracing::warn!(machine = self.machine.name(), state = %before, "runs although nobody holds it: stopped before the start");
            self.stop().await?;
        }
        capture::end(&self.machine).await;
        Ok(())
    }

    /// After a start that failed: whatever is left is stopped.
    async fn clear_away(&mut self) {
        if let Err(error) = self.stop().await {
            tracing::error!(machine = self.machine.name(), %error, "cannot be stopped after its failed start");
        }
    }

    async fn stop(&mut self) -> Result<()> {
        self.set_stopping();
        let ended = self.end(&Action::Stop, self.house.timeouts().stop).await;
        capture::end(&self.machine).await;
        ended
    }

    async fn stop_own(&mut self) -> Result<()> {
        if self.machine.status().own_run { self.stop().await } else { Ok(()) }
    }

    fn set_stopping(&self) {
        if self.machine.status().state != State::Poweroff {
            self.machine.set_state(State::Stopping);
        }
    }

    async fn acpi_stop(&mut self) -> Result<(), Failure> {
        let before = self.machine.status().state;
        self.set_stopping();
        match self.end(&Action::AcpiStop, self.house.timeouts().acpi_stop).await {
            Ok(()) => {
                capture::end(&self.machine).await;
                Ok(())
            }
            Err(error) if self.lost.is_some() => Err(error.into()),
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.machine.set_state(before);
                Err(error.into())
            }
            Err(error) => {
                tracing::warn!(machine = self.machine.name(), %error, "does not react to its power button: stopped");
                self.stop().await?;
                if plugin_at_fault(&error) { Err(error.into()) } else { Ok(()) }
            }
        }
    }

    /// Runs an action that ends a run.
    async fn end(&mut self, action: &Action, limit: Duration) -> Result<()> {
        let ended = self.run_to(State::Poweroff, action, limit).await;
        if ended.is_err() && self.lost.is_none() {
            // The error at hand is the one to tell.
            let _ = self.note_state().await;
        }
        ended
    }

    /// Runs an action that does not change the machine's state. Its failure costs the machine only
    /// where the plugin itself is at fault, or where the machine is not as before.
    async fn look(&mut self, action: &Action, limit: Duration) -> Result<(), Failure> {
        let before = self.machine.status().state;
        let Err(reason) = self.run(action, limit).await else { return Ok(()) };
        let changed = self.lost.is_some() || self.note_state().await.is_ok_and(|state| state != before);
        Err(Failure { disable: changed || plugin_at_fault(&reason), reason })
    }

    /// What cannot be prepared costs nothing: the next restore does without, and finds out how things stand.
    async fn prepare(&mut self, occasion: Occasion) -> Result<(), Failure> {
        self.out_of_patience.send_replace(false);
        let mut patience = self.out_of_patience.subscribe();
        let given_up = async move {
            // The sender is here, so this cannot fail.
            let _ = patience.wait_for(|over| *over).await;
        };
        let limit = self.house.timeouts().prepare;
        let called = call_unless(given_up, &self.machine, limit, move |machine, deadline| {
            invoke(machine, &Action::Prepare(occasion), deadline)
        });
        let prepared = called.await;
        self.returned(prepared, "prepare")
            .map_err(|reason| Failure { disable: self.lost.is_some() || plugin_at_fault(&reason), reason })
    }

    /// Runs an action. When the plugin says it is done, the machine has to be where the action leads. That
    /// is asked in the same breath: a machine that has just begun to run keeps this computer busy.
    async fn run_to(&mut self, wanted: State, action: &Action, limit: Duration) -> Result<()> {
        let (action, name) = (action.clone(), action.name());
        let longest = self.house.timeouts().state.max(LAST_QUESTION);
        let told = self.through(limit, name, move |machine, deadline| {
            match invoke(machine, &action, deadline) {
                Err(error) if error.kind() == ErrorKind::StateReached && wanted == State::Poweroff => {}
                done => done?,
            }
            let reports = machine.status().reports;
            // An action that took all of its time has a moment left for this.
            let deadline = Deadline::after(deadline.remaining().clamp(LAST_QUESTION, longest));
            Ok((machine.machinery.instance.state(machine.name(), deadline), reports))
        });
        let (state, reports) = told.await?;
        self.machine.set_answered(*state.as_ref().unwrap_or(&State::Error), reports);
        let state = state?;
        if state == wanted {
            return Ok(());
        }
        let reason = format!("the machine is in state {state} after it, and {wanted} was expected");
        Err(Error::unexpected_state(reason).advice("Look at the plugin's lines in the log"))
    }

    /// Asks how things stand, and notes it.
    async fn note_state(&mut self) -> Result<State> {
        let reports = self.machine.status().reports;
        let state = self.state().await;
        if self.lost.is_none() {
            self.machine.set_answered(*state.as_ref().unwrap_or(&State::Error), reports);
        }
        state
    }

    async fn state(&mut self) -> Result<State> {
        self.through(self.house.timeouts().state, "telling the state", |machine, deadline| {
            machine.machinery.instance.state(machine.name(), deadline)
        })
        .await
    }

    async fn run(&mut self, action: &Action, limit: Duration) -> Result<()> {
        let (action, name) = (action.clone(), action.name());
        self.through(limit, name, move |machine, deadline| invoke(machine, &action, deadline)).await
    }

    async fn through<T, F>(&mut self, limit: Duration, what: &str, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Machine, Deadline) -> Result<T> + Send + 'static,
    {
        let called = call(&self.machine, limit, work).await;
        self.returned(called, what)
    }

    fn returned<T>(&mut self, called: Called<T>, what: &str) -> Result<T> {
        match called {
            Called::Returned(result) => result,
            Called::Lost(call) => {
                self.lost = Some(call);
                self.machine.set_state(State::Error);
                Err(Error::timeout(format!("{what} did not come back from the plugin in time"))
                    .advice("The machine is lost until it does; restart the host to get it back"))
            }
        }
    }
}

/// Has a plugin that prepares a machine give up, by the way the interface has for that.
pub async fn give_up_preparing(machine: &Arc<Machine>, house: &House) {
    if machine.status().state != State::Poweroff {
        // Somebody has started the machine, which ends the preparation. A stop would end that run.
        return;
    }
    let given_up = call(machine, house.timeouts().stop, |machine, deadline| {
        machine.machinery.instance.stop(machine.name(), deadline)
    });
    match given_up.await {
        // Usually the machine is off, and says so.
        Called::Returned(answer) => tracing::debug!(machine = machine.name(), ?answer, "gives up preparing"),
        Called::Lost(_) => tracing::warn!(machine = machine.name(), "does not give up preparing"),
    }
}

/// Whether the error says that the plugin does not do as it should.
pub fn plugin_at_fault(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::PluginPanicked | ErrorKind::PluginMisbehaved)
}

fn invoke(machine: &Machine, action: &Action, deadline: Deadline) -> Result<()> {
    let (plugin, name) = (&machine.machinery.instance, machine.name());
    match action {
        Action::RestoreStart => plugin.restore_start(name, deadline),
        Action::NorestoreStart => plugin.norestore_start(name, deadline),
        Action::Stop | Action::StopOwn => plugin.stop(name, deadline),
        Action::AcpiStop => plugin.acpi_stop(name, deadline),
        Action::DumpMemory { path, format } => plugin.dump_memory(name, path, *format, deadline),
        Action::Screenshot { path } => plugin.screenshot(name, path, deadline),
        Action::Prepare(Occasion::Request) => plugin.prepare(name, deadline),
        Action::Prepare(Occasion::Automatic) => plugin.prepare_automatically(name, deadline),
    }
}
