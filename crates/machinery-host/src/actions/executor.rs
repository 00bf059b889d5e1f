//! Runs one action by the rules: the expected state, the timeout, and the consequence of a failure.
//!
//! | action | expected state | on failure |
//! | --- | --- | --- |
//! | restore_start | running | stop, disable the machine |
//! | norestore_start | running | stop, disable the machine |
//! | stop | poweroff | disable the machine |
//! | acpi_stop | poweroff | fall back to stop |
//! | dump_memory, screenshot | unchanged | – |
//! | prepare | poweroff | – |
//! | heal | poweroff, after a restore | the machine stays in quarantine |
//!
//! The rules are Cuckoo3's (`node/machinery.py`), because its clients rely on them, with one difference: a
//! start stops a machine that runs without a lock, where Cuckoo3 disables the machine. A machine that has the
//! wanted state already is a success. An action that the machinery does not support fails, and the machine
//! stays enabled. A plugin that panics, returns nonsense or does not return takes the machine out of the pool.
//!
//! To disable means to take out of the pool: by a quarantine, if the machine can heal by itself
//! ([`quarantine`](crate::fleet::quarantine)).
//!
//! A capture of the traffic lasts from before the start until after the stop.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use machinery::{Error, ErrorKind, Result, State};
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::context::ActionContext;
use super::failure::{Failure, refused};
use super::overdue::ActionClock;
use super::plugin_calls::PluginCalls;
use super::{Action, ActionResult, capture, inspection};
use crate::fleet::Machine;
use crate::plugin::call::GRACE;

/// Runs the actions of one machine.
pub struct ActionExecutor {
    pub(super) machine: Arc<Machine>,
    pub(super) context: Arc<ActionContext>,
    pub(super) calls: PluginCalls,
    clock: ActionClock,
}

impl ActionExecutor {
    /// Returns the executor of that machine.
    pub fn new(machine: Arc<Machine>, context: Arc<ActionContext>) -> Self {
        let calls = PluginCalls::new(Arc::clone(&machine), Arc::clone(&context));
        ActionExecutor { machine, context, calls, clock: ActionClock::default() }
    }

    /// Returns the switch that abandons the action under way.
    pub fn abandon(&self) -> Arc<watch::Sender<bool>> {
        self.calls.abandon()
    }

    /// Returns the machine.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Runs an action to its end, and records its result. An action that takes too long is logged once.
    pub async fn execute(&mut self, action: &Action) -> ActionResult {
        let (machine, limit) = (Arc::clone(&self.machine), self.total_limit_of(action));
        let (begun, overdue) = (Instant::now(), self.clock.start(limit));
        let mut work = pin!(self.execute_now(action));
        tokio::select! {
            biased;
            result = &mut work => return result,
            () = overdue.wait() => {
                let (machine, seconds) = (machine.name(), begun.elapsed().as_secs());
                tracing::warn!(machine, action = action.name(), seconds, "the action takes longer than its limit: its worker is stuck");
            }
        }
        work.await
    }

    /// Returns the time in which all calls of the action into the plugin end: a start queries the state, stops an
    /// earlier run, and stops the machine when it fails.
    fn total_limit_of(&self, action: &Action) -> Duration {
        let timeouts = self.context.timeouts();
        self.calls.limit_of(action) + timeouts.state + 2 * timeouts.stop + 4 * GRACE
    }

    async fn execute_now(&mut self, action: &Action) -> ActionResult {
        self.machine.set_busy(true);
        self.machine.clear_steps();
        let begun = Instant::now();
        let result = match (self.ensure_allowed(action), action) {
            (Err(failure), _) => Err(failure),
            (Ok(()), Action::RestoreStart | Action::NorestoreStart) => self.start(action).await,
            (Ok(()), Action::Stop) => self.stop().await.map_err(Failure::from),
            (Ok(()), Action::StopOwn) => self.stop_own().await.map_err(Failure::from),
            (Ok(()), Action::StopOverrun) => self.stop_overrun().await,
            (Ok(()), Action::Heal) => self.heal().await,
            (Ok(()), Action::AcpiStop) => self.acpi_stop().await,
            (Ok(()), Action::DumpMemory { .. } | Action::Screenshot { .. }) => {
                self.run_read_only(action).await
            }
            (Ok(()), Action::Prepare(_)) => self.prepare(action).await,
        };
        self.machine.set_busy(false);
        self.record(action, begun.elapsed(), result).await
    }

    /// Reports whether the next restore may be prepared: the machine is off, in the pool, and not locked. A
    /// task may examine its machine's files until it releases the lock.
    pub fn can_prepare(&self) -> bool {
        let in_pool = self.machine.status().availability.disabled_reason().is_none();
        in_pool && self.machine.machinery.capabilities.prepare && self.is_free()
    }

    /// Reports whether the machine is off and not locked, and no call into its plugin runs.
    pub fn is_free(&self) -> bool {
        self.machine.status().is_free() && !self.calls.is_abandoned()
    }

    /// Refuses an action that cannot succeed, before anything is done: a start would stop a running machine
    /// first.
    fn ensure_allowed(&self, action: &Action) -> Result<(), Failure> {
        self.expect_no_abandoned_call()?;
        self.expect_supported(action)?;
        self.expect_usable(action)
    }

    fn expect_no_abandoned_call(&self) -> Result<(), Failure> {
        if !self.calls.is_abandoned() {
            return Ok(());
        }
        let reason = Error::failed("an earlier call into its plugin has not returned")
            .advice("Restart the host to get the machine back");
        // That call has taken the machine out of the pool already, unless an operator has enabled it since.
        let availability = self.machine.status().availability;
        let is_out = availability.disabled.is_some() || availability.quarantine.is_some();
        Err(Failure { reason, disable: !is_out })
    }

    fn expect_supported(&self, action: &Action) -> Result<(), Failure> {
        let able = self.machine.machinery.capabilities;
        let supported = match action {
            Action::RestoreStart | Action::Heal => true,
            Action::Stop | Action::StopOwn | Action::StopOverrun => true,
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
        let starts = matches!(
            action,
            Action::RestoreStart | Action::NorestoreStart | Action::Prepare(_) | Action::Heal
        );
        match self.machine.status().availability.unusable.filter(|_| starts) {
            Some(why) => {
                let reason = Error::environment(format!("the machine cannot be used: {why}"));
                let advice = "When that is put right, `reload` or `enable-machine` looks again";
                Err(Failure { reason: reason.advice(advice), disable: false })
            }
            None => Ok(()),
        }
    }

    pub(super) async fn start(&mut self, action: &Action) -> Result<(), Failure> {
        let before = self.calls.query_state().await?;
        self.end_run_in(before).await?;
        let permit = self.permit(action).await?;
        self.start_off(action, permit).await
    }

    /// Waits for the permit of a restore. Another action needs none.
    pub(super) async fn permit(&self, action: &Action) -> Result<Option<OwnedSemaphorePermit>, Failure> {
        if *action != Action::RestoreStart {
            return Ok(None);
        }
        self.clock.stop();
        let permit = self.context.restore_permit().await.map_err(refused)?;
        self.clock.restart();
        Ok(Some(permit))
    }

    /// Starts a machine that is off.
    pub(super) async fn start_off(
        &mut self,
        action: &Action,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<(), Failure> {
        let context = Arc::clone(&self.context);
        if let Some(settings) = context.settings().capture {
            capture::begin(&self.machine, &settings, &context.folders, &context.captures).await;
        }
        self.machine.set_state(State::Starting);
        self.machine.set_own_run();
        let started = self.calls.run(action).await;
        // The plugin may have reported the end of an earlier run meanwhile.
        self.machine.set_own_run();
        // Releases the permit first: the cleanup of a failed start must not delay other restores.
        drop(permit);
        let Err(error) = started else { return Ok(()) };
        let mut failure = Failure::from(error);
        if failure.reason.kind() == ErrorKind::Unsupported {
            self.machine.set_state(State::Poweroff);
        } else if !self.calls.is_abandoned() {
            let is_off = self.clean_up().await;
            failure.disable &= !(is_off && failure.reason.kind() == ErrorKind::NotNow);
        }
        capture::end(&self.machine).await;
        Err(failure)
    }

    /// Stops a machine that runs although no task has it, and ends the capture of a run that ended by itself.
    pub(super) async fn end_run_in(&mut self, before: State) -> Result<()> {
        if before != State::Poweroff {
            tracing::warn!(machine = self.machine.name(), state = %before, "the machine runs although no task has it: stopped before the start");
            self.stop().await?;
        }
        capture::end(&self.machine).await;
        Ok(())
    }

    /// Stops a machine whose start has failed; reports whether it is off.
    async fn clean_up(&mut self) -> bool {
        let stopped = self.stop().await;
        if let Err(error) = &stopped {
            let machine = self.machine.name();
            // A try has one warning of its own.
            match self.machine.status().availability.quarantine {
                Some(_) => {
                    tracing::debug!(machine, %error, "the machine cannot be stopped after a failed try")
                }
                None => {
                    tracing::error!(machine, %error, "the machine cannot be stopped after its failed start")
                }
            }
        }
        stopped.is_ok()
    }

    pub(super) async fn stop(&mut self) -> Result<()> {
        self.set_stopping();
        let ended = self.calls.run(&Action::Stop).await;
        if ended.is_err() {
            self.update_state_after_failed_stop().await;
        }
        capture::end(&self.machine).await;
        ended
    }

    pub(super) async fn stop_own(&mut self) -> Result<()> {
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
        let ended = self.calls.run(&Action::AcpiStop).await;
        if ended.is_err() {
            self.update_state_after_failed_stop().await;
        }
        match ended {
            Ok(()) => {
                capture::end(&self.machine).await;
                Ok(())
            }
            Err(error) if self.calls.is_abandoned() => Err(error.into()),
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.machine.set_state(before);
                Err(error.into())
            }
            Err(error) => {
                tracing::warn!(machine = self.machine.name(), %error, "the machine does not react to its power button: stopped");
                self.stop().await?;
                if error.is_plugin_fault() { Err(error.into()) } else { Ok(()) }
            }
        }
    }

    /// Asks the plugin for the state of a machine that may still run.
    async fn update_state_after_failed_stop(&mut self) {
        if !self.calls.is_abandoned() {
            // The first error is the cause, and the one to report.
            let _ = self.calls.update_state().await;
        }
    }

    /// Runs an action that does not change the machine's state. A failure disables the machine only where the
    /// plugin itself is at fault, or where the state is not as before.
    async fn run_read_only(&mut self, action: &Action) -> Result<(), Failure> {
        let before = self.machine.status().state;
        let folders = &self.context.folders;
        let Err(reason) = inspection::run(&mut self.calls, action, folders).await else { return Ok(()) };
        let changed =
            self.calls.is_abandoned() || self.calls.update_state().await.is_ok_and(|state| state != before);
        Err(Failure { disable: changed || reason.is_plugin_fault(), reason })
    }

    /// Prepares the next restore. A failure is harmless: the next restore works without a preparation.
    async fn prepare(&mut self, action: &Action) -> Result<(), Failure> {
        let prepared = self.calls.run(action).await;
        prepared.map_err(|reason| Failure {
            disable: self.calls.is_abandoned() || reason.is_plugin_fault(),
            reason,
        })
    }
}
