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
use std::time::Instant;

use machinery::{Error, ErrorKind, Readiness, Result, State};
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::context::ActionContext;
use super::failure::{Failure, refused};
use super::overdue::ActionClock;
use super::plugin_calls::PluginCalls;
use super::{Action, ActionResult, capture, inspection};
use crate::fleet::Machine;

/// The error of a run that the host stops together with all others.
const STOPPED_BY_HOST: &str = "the host has stopped the machine during its run, with all others";

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
        let (machine, limit) = (Arc::clone(&self.machine), self.calls.total_limit_of(action));
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

    async fn execute_now(&mut self, action: &Action) -> ActionResult {
        self.machine.set_busy(true);
        self.machine.clear_steps();
        let mode = self.restore_mode(action);
        let begun = Instant::now();
        let result = match (self.ensure_allowed(action), action) {
            (Err(failure), _) => Err(failure),
            (Ok(()), Action::RestoreStart | Action::NorestoreStart) => self.start(action).await,
            (Ok(()), Action::Stop) => self.stop().await.map_err(Failure::from),
            (Ok(()), Action::StopOwn) => self.stop_own(STOPPED_BY_HOST).await.map_err(Failure::from),
            (Ok(()), Action::StopOverrun) => self.stop_overrun().await,
            (Ok(()), Action::Heal) => self.heal().await,
            (Ok(()), Action::AcpiStop) => self.acpi_stop().await,
            (Ok(()), Action::DumpMemory { .. } | Action::Screenshot { .. }) => {
                self.run_read_only(action).await
            }
            (Ok(()), Action::Prepare(_)) => self.prepare(action).await,
        };
        self.machine.set_busy(false);
        self.record(action, begun.elapsed(), mode, result).await
    }

    /// Returns the mode that the machine is ready for, if the action is a restore.
    fn restore_mode(&self, action: &Action) -> Option<Readiness> {
        let restores = matches!(action, Action::RestoreStart | Action::Heal);
        restores.then(|| self.machine.status().ready.map_or(Readiness::Plain, |ready| ready.mode))
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
        let permit = self.context.restore_permit(&self.machine).await.map_err(refused)?;
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
        // A capture needs the interface, and holds the first packet only if it begins before the run.
        let opened = self.calls.open_network(self.calls.limit_of(action)).await;
        if let Some(settings) = context.settings().capture.filter(|_| opened.is_ok()) {
            capture::begin(&self.machine, &settings, &context.folders, &context.captures).await;
        }
        context.run_marks.begin(&self.machine);
        self.machine.set_state(State::Starting);
        self.machine.set_own_run();
        let started = if opened.is_ok() { self.calls.run(action).await } else { opened };
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
        self.run_ended().await;
        Err(failure)
    }

    /// Stops a machine that runs although no task has it, and ends the capture of a run that ended by itself.
    pub(super) async fn end_run_in(&mut self, before: State) -> Result<()> {
        if before != State::Poweroff {
            tracing::warn!(machine = self.machine.name(), state = %before, "the machine runs although no task has it: stopped before the start");
            self.stop().await?;
        }
        self.run_ended().await;
        Ok(())
    }

    /// Ends the run of a guest that has powered itself off, or died: a later host has nothing to report of it.
    pub(super) async fn end_run_without_stop(&self) {
        if self.machine.status().state == State::Poweroff && self.context.run_marks.has_run(&self.machine) {
            self.context.run_ended(&self.machine).await;
        }
    }

    /// Ends what the host does for a run.
    async fn run_ended(&mut self) {
        capture::end(&self.machine).await;
        self.calls.close_network().await;
        self.context.run_ended(&self.machine).await;
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
        self.run_ended().await;
        ended
    }

    /// Stops the host's own run, if there is one, for this reason.
    pub(super) async fn stop_own(&mut self, reason: &str) -> Result<()> {
        if !self.machine.status().own_run {
            return Ok(());
        }
        self.machine.run_lost(&self.machine.error(reason));
        self.stop().await
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
                self.run_ended().await;
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

#[cfg(test)]
mod tests {
    use super::super::lab::Lab;
    use super::super::{CLOSING, PrepareOrigin};
    use super::*;
    use crate::client_file::{ClientFile, NamedFile};
    use crate::config::Heal;
    use crate::fleet::availability::TaskLock;
    use crate::fleet::fake_plugin::{FakePlugin, info};
    use crate::plugin::call::GRACE;
    use machinery::{Capabilities, DumpFormat, MachineInfo};
    use std::time::Duration;

    const PREPARE: Action = Action::Prepare(PrepareOrigin::Request);

    fn failed() -> Error {
        Error::failed("QEMU was killed")
    }

    /// Has `action` abandoned, because the plugin does not return from `method`. Returns what lets it return.
    async fn abandon(
        lab: &Lab,
        executor: &mut ActionExecutor,
        action: &Action,
        method: &'static str,
    ) -> (ActionResult, std::sync::mpsc::Sender<()>) {
        let release = lab.plugin.block(method);
        let mut work = pin!(executor.execute(action));
        let call = async {
            lab.plugin.called(method).await;
            tokio::time::advance(Duration::from_secs(7200)).await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            result = &mut work => (result, release),
            () = call => unreachable!(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn start_runs_the_machine_as_the_hosts_own() {
        for action in [Action::RestoreStart, Action::NorestoreStart] {
            let lab = Lab::new("");
            lab.executor().execute(&action).await.unwrap();
            assert_eq!(lab.plugin.take_calls(), [action.name()]);
            let status = lab.machine.status();
            assert_eq!((status.state, status.busy), (State::Running, false));
            assert!(status.own_run && status.started_well);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn start_stops_a_machine_that_runs_without_a_task() {
        let lab = Lab::new("");
        lab.start_foreign_run();
        lab.executor().execute(&Action::RestoreStart).await.unwrap();
        assert_eq!(lab.plugin.take_calls(), ["stop", "restore_start"]);
    }

    #[tokio::test(start_paused = true)]
    async fn failed_start_stops_the_machine_and_takes_it_out_of_the_pool() {
        let lab = Lab::new("");
        lab.plugin.fail("restore_start", failed());
        let reason = lab.executor().execute(&Action::RestoreStart).await.unwrap_err();
        assert_eq!(lab.plugin.take_calls(), ["restore_start", "stop"]);
        assert_eq!(lab.quarantine().unwrap().reason, reason);
        let status = lab.machine.status();
        assert_eq!((status.state, status.errors), (State::Poweroff, vec![reason]));
        assert!(lab.saved().contains("QEMU was killed"));
    }

    #[tokio::test(start_paused = true)]
    async fn network_of_a_run_lasts_from_before_its_start_to_its_end_and_without_it_nothing_starts() {
        let lab = Lab::new("");
        lab.machine.set_info(MachineInfo { own_network: true, ..info("m") });
        lab.executor().execute(&Action::RestoreStart).await.unwrap();
        lab.executor().execute(&Action::Stop).await.unwrap();
        // An earlier run may have ended by itself.
        let calls = ["close_network", "open_network", "restore_start", "stop", "close_network"];
        assert_eq!(lab.plugin.take_calls(), calls);
        lab.plugin.fail("open_network", failed());
        let reason = lab.executor().execute(&Action::RestoreStart).await.unwrap_err();
        // The cleanup of a failed start is a stop, too.
        let calls = ["close_network", "open_network", "stop", "close_network", "close_network"];
        assert_eq!(lab.plugin.take_calls(), calls);
        assert_eq!(lab.quarantine().unwrap().reason, reason);
    }

    #[tokio::test(start_paused = true)]
    async fn start_that_cannot_be_made_now_leaves_the_machine_in_the_pool_only_when_it_is_off() {
        for (off, in_pool) in [(true, true), (false, false)] {
            let lab = Lab::new("");
            lab.plugin.fail("restore_start", Error::not_now("no space"));
            if !off {
                lab.plugin.fail("stop", failed());
            }
            lab.executor().execute(&Action::RestoreStart).await.unwrap_err();
            assert_eq!(lab.quarantine().is_none(), in_pool);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn start_that_is_unsupported_changes_nothing() {
        let lab = Lab::new("");
        lab.plugin.fail("norestore_start", Error::unsupported("a cold start"));
        lab.executor().execute(&Action::NorestoreStart).await.unwrap_err();
        assert_eq!(lab.plugin.take_calls(), ["norestore_start"]);
        assert_eq!((lab.machine.status().state, lab.quarantine()), (State::Poweroff, None));
    }

    #[tokio::test(start_paused = true)]
    async fn start_fails_when_the_plugin_says_that_the_machine_is_off_already() {
        let lab = Lab::new("");
        lab.plugin.fail("restore_start", Error::state_reached("it runs"));
        lab.executor().execute(&Action::RestoreStart).await.unwrap_err();
        lab.plugin.fail("stop", Error::state_reached("it is off"));
        lab.executor().execute(&Action::Stop).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn restore_alone_waits_for_a_permit_and_returns_it_before_its_cleanup() {
        let lab = Lab::new("max_parallel_restores: 1");
        let permit = lab.context.restore_permit(&lab.machine).await.unwrap();
        lab.executor().execute(&Action::NorestoreStart).await.unwrap();
        lab.executor().execute(&Action::Stop).await.unwrap();
        lab.plugin.fail("restore_start", failed());
        lab.plugin.take_calls();
        let mut executor = lab.executor();
        let mut restore = pin!(executor.execute(&Action::RestoreStart));
        let hour = Duration::from_secs(3600);
        assert!(tokio::time::timeout(hour, &mut restore).await.is_err());
        assert!(lab.plugin.take_calls().is_empty());
        drop(permit);
        let release = lab.plugin.block("stop");
        tokio::select! {
            result = &mut restore => panic!("{result:?}"),
            permit = async {
                lab.plugin.called("stop").await;
                lab.context.restore_permit(&lab.machine).await
            } => drop(permit.unwrap()),
        }
        drop(release);
        restore.await.unwrap_err();
    }

    #[tokio::test(start_paused = true)]
    async fn restore_is_refused_and_harmless_when_the_host_ends() {
        let lab = Lab::new("");
        lab.context.close();
        let reason = lab.executor().execute(&Action::RestoreStart).await.unwrap_err();
        assert!(reason.contains(CLOSING), "{reason}");
        assert!(lab.quarantine().is_none() && lab.context.prepare_permit(&lab.machine).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn failed_stop_asks_for_the_state_again() {
        for action in [Action::Stop, Action::AcpiStop] {
            let lab = Lab::new("");
            lab.start_own_run();
            lab.plugin.fail("acpi_stop", failed());
            lab.plugin.fail("stop", failed());
            lab.executor().execute(&action).await.unwrap_err();
            assert_eq!(lab.machine.status().state, State::Running, "{action:?}");
            assert!(lab.quarantine().is_some());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn host_stops_only_its_own_run_by_itself() {
        for action in [Action::StopOwn, Action::StopOverrun] {
            let lab = Lab::new("max_run: 1");
            lab.start_foreign_run();
            lab.executor().execute(&action).await.unwrap();
            assert!(lab.plugin.take_calls().is_empty());
            lab.machine.set_own_run();
            lab.executor().execute(&action).await.unwrap();
            assert_eq!(
                (lab.plugin.take_calls(), lab.machine.status().state),
                (vec!["stop".into()], State::Poweroff)
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn acpi_stop_falls_back_to_a_stop_when_it_fails() {
        let is_fault = |kind| [ErrorKind::PluginMisbehaved, ErrorKind::PluginPanicked].contains(&kind);
        for kind in [ErrorKind::Timeout, ErrorKind::Failed, ErrorKind::PluginMisbehaved] {
            let lab = Lab::new("");
            lab.start_own_run();
            lab.plugin.fail("acpi_stop", Error::new(kind, "no reaction"));
            let result = lab.executor().execute(&Action::AcpiStop).await;
            assert_eq!(lab.plugin.take_calls(), ["acpi_stop", "stop"]);
            assert_eq!(
                (result.is_err(), lab.quarantine().is_some()),
                (is_fault(kind), is_fault(kind)),
                "{kind:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn acpi_stop_ends_the_run_and_needs_no_stop_when_it_works() {
        let lab = Lab::new("");
        lab.start_own_run();
        lab.executor().execute(&Action::AcpiStop).await.unwrap();
        assert_eq!(
            (lab.plugin.take_calls(), lab.machine.status().state),
            (vec!["acpi_stop".into()], State::Poweroff)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn acpi_stop_changes_nothing_when_it_is_unsupported() {
        let lab = Lab::new("");
        lab.start_own_run();
        lab.plugin.fail("acpi_stop", Error::unsupported("a power button"));
        lab.executor().execute(&Action::AcpiStop).await.unwrap_err();
        assert_eq!(lab.plugin.take_calls(), ["acpi_stop"]);
        assert_eq!((lab.machine.status().state, lab.quarantine()), (State::Running, None));
    }

    #[tokio::test(start_paused = true)]
    async fn no_other_call_is_made_while_an_abandoned_one_runs() {
        for (action, method) in [
            (Action::RestoreStart, "restore_start"),
            (Action::Stop, "stop"),
            (Action::AcpiStop, "acpi_stop"),
            (PREPARE, "prepare"),
        ] {
            let lab = Lab::new("");
            if method.ends_with("stop") {
                lab.start_own_run();
            }
            let mut executor = lab.executor();
            let (result, release) = abandon(&lab, &mut executor, &action, method).await;
            assert!(result.unwrap_err().contains("did not return"));
            assert_eq!(lab.plugin.take_calls(), [method]);
            assert_eq!(lab.machine.status().state, State::Error, "{method}");
            assert!(lab.quarantine().is_some() && !executor.is_free() && executor.calls.is_abandoned());
            let reason = executor.execute(&Action::Stop).await.unwrap_err();
            assert!(reason.contains("has not returned") && lab.plugin.take_calls().is_empty(), "{reason}");
            assert!(!lab.quarantine().unwrap().reason.contains("has not returned"), "it is out already");
            lab.machine.enable();
            executor.execute(&Action::Stop).await.unwrap_err();
            assert!(lab.quarantine().unwrap().reason.contains("has not returned"), "out of the pool again");
            lab.machine.disable("by hand");
            executor.execute(&Action::Stop).await.unwrap_err();
            assert_eq!(lab.disabled_reason().as_deref(), Some("by hand"));
            release.send(()).unwrap();
            executor.calls.abandoned_call_ended().await;
            executor.execute(&Action::Stop).await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn action_without_its_method_is_refused_and_leaves_the_machine_in_the_pool() {
        let plugin = FakePlugin::default();
        plugin.set_capabilities(Capabilities::default());
        let lab = Lab::with(plugin, "");
        for action in [Action::NorestoreStart, Action::AcpiStop, lab.dump().0, PREPARE] {
            lab.executor().execute(&action).await.unwrap_err();
        }
        let executor = lab.executor();
        assert!(lab.plugin.take_calls().is_empty() && lab.quarantine().is_none());
        assert!(executor.is_free() && !executor.can_prepare());
        assert_eq!(lab.machine.status().errors.len(), 3, "a preparation is never an error");
    }

    #[tokio::test(start_paused = true)]
    async fn machine_that_its_plugin_cannot_use_can_be_stopped_only() {
        let lab = Lab::new("");
        lab.machine.set_diagnosis(Some(&Error::environment("no disk")), Vec::new());
        for action in [Action::RestoreStart, Action::NorestoreStart, PREPARE, Action::Heal] {
            let reason = lab.executor().execute(&action).await.unwrap_err();
            assert!(reason.contains("cannot be used: no disk"), "{reason}");
        }
        assert!(lab.plugin.take_calls().is_empty() && lab.quarantine().is_none());
        lab.executor().execute(&Action::Stop).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn restore_is_prepared_only_when_the_machine_is_free_and_in_the_pool() {
        let lab = Lab::new("");
        let executor = lab.executor();
        assert!(executor.can_prepare() && executor.is_free());
        lab.machine.lock(&TaskLock::default()).unwrap();
        assert!(!executor.can_prepare() && !executor.is_free());
        lab.machine.unlock(None).unwrap();
        lab.machine.take_out(ErrorKind::Failed, "killed", Heal::Auto);
        assert!(!executor.can_prepare() && executor.is_free());
        lab.machine.enable();
        lab.machine.set_state(State::Running);
        assert!(!executor.can_prepare() && !executor.is_free());
    }

    #[tokio::test(start_paused = true)]
    async fn failed_dump_takes_the_machine_out_of_the_pool_only_when_its_state_has_changed() {
        for (state, kind, in_pool) in [
            (State::Running, ErrorKind::Failed, true),
            (State::Running, ErrorKind::PluginMisbehaved, false),
            (State::Paused, ErrorKind::Failed, false),
        ] {
            let lab = Lab::new("");
            lab.start_own_run();
            lab.plugin.once("dump_memory", move |plugin| {
                plugin.set_state("m", state);
                Err(Error::new(kind, "no"))
            });
            let (dump, path) = lab.dump();
            lab.executor().execute(&dump).await.unwrap_err();
            assert_eq!(
                (lab.quarantine().is_none(), lab.machine.status().state),
                (in_pool, state),
                "{kind:?}"
            );
            assert!(!path.exists());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn machine_leaves_the_pool_when_a_dump_does_not_return() {
        let lab = Lab::new("");
        lab.start_own_run();
        let ((dump, path), mut executor) = (lab.dump(), lab.executor());
        let (result, _release) = abandon(&lab, &mut executor, &dump, "dump_memory").await;
        assert!(
            result.unwrap_err().contains("did not return") && lab.quarantine().is_some() && !path.exists()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn dump_is_written_to_the_clients_file() {
        let lab = Lab::new("");
        lab.start_own_run();
        let (dump, path) = lab.dump();
        lab.executor().execute(&dump).await.unwrap();
        assert_eq!(std::fs::read_to_string(path).unwrap(), "dump");
        assert_eq!(lab.machine.status().state, State::Running);
    }

    #[tokio::test(start_paused = true)]
    async fn failed_preparation_is_no_error_of_the_machine_unless_the_plugin_is_at_fault() {
        for (kind, is_fault) in [(ErrorKind::Failed, false), (ErrorKind::PluginPanicked, true)] {
            let lab = Lab::new("");
            lab.plugin.fail("prepare", Error::new(kind, "no space"));
            lab.executor().execute(&PREPARE).await.unwrap_err();
            let errors = lab.machine.status().errors;
            assert_eq!((lab.quarantine().is_some(), errors.is_empty()), (is_fault, !is_fault), "{kind:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn interrupted_preparation_is_no_failure() {
        let lab = Lab::new("");
        lab.plugin.fail("prepare", Error::interrupted("stopped"));
        lab.plugin.fail("prepare", failed());
        for _ in 0..2 {
            lab.executor().execute(&PREPARE).await.unwrap_err();
        }
        let entries = lab.context.metrics.to_json();
        assert_eq!((&entries[0]["count"], &entries[0]["failed"]), (&2.into(), &1.into()));
    }

    #[tokio::test(start_paused = true)]
    async fn successful_start_ends_the_row_of_plugin_faults() {
        let lab = Lab::new("");
        let mut executor = lab.executor();
        for expected in [1, 2, 0, 1] {
            match expected {
                0 => executor.execute(&Action::RestoreStart).await.unwrap(),
                _ => {
                    lab.plugin.fail("stop", Error::misbehaved("nonsense"));
                    executor.execute(&Action::Stop).await.unwrap_err();
                }
            }
            assert_eq!(lab.machine.status().plugin_faults, expected);
        }
    }

    #[test]
    fn action_is_stuck_when_it_lasts_longer_than_all_of_its_calls() {
        let lab = Lab::new("timeouts: {restore_start: 100, state: 10, stop: 1}");
        assert_eq!(
            lab.executor().calls.total_limit_of(&Action::RestoreStart),
            Duration::from_secs(112) + 4 * GRACE
        );
        lab.machine.set_info(MachineInfo { own_network: true, ..info("m") });
        let with_network = lab.executor().calls.total_limit_of(&Action::RestoreStart);
        assert_eq!(with_network, Duration::from_secs(112 + 104) + 9 * GRACE);
    }

    #[tokio::test(start_paused = true)]
    async fn failed_dump_names_the_file_unless_the_machine_is_off() {
        let lab = Lab::new("");
        let path = lab.folder.path().join("missing/dump");
        let file = ClientFile::Named(NamedFile { path, owner: None });
        let dump = Action::DumpMemory { file, format: DumpFormat::default() };
        let reason = lab.executor().execute(&dump).await.unwrap_err();
        assert!(reason.contains("powered off"), "{reason}");
        lab.start_own_run();
        let reason = lab.executor().execute(&dump).await.unwrap_err();
        assert!(reason.contains("missing"), "{reason}");
        assert!(lab.quarantine().is_none() && lab.plugin.take_calls().is_empty());
    }
}
