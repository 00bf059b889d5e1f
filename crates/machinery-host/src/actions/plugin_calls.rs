//! The calls into the plugin of one machine, for its actions.
//!
//! ```text
//! no call ─▶ call under way ─▶ returned ─▶ no call
//!                       └─▶ abandoned: no other call until the plugin returns
//! ```

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, Error, ErrorKind, Result, State};
use tokio::sync::watch;

use super::context::ActionContext;
use super::{Action, PrepareOrigin};
use crate::client_file::PrivateFile;
use crate::fleet::Machine;
use crate::plugin::call::{AbandonedCall, CallResult, GRACE, call};

/// The time that a plugin has, at least, to report the state after an action.
const MIN_STATE_TIMEOUT: Duration = Duration::from_secs(1);

/// Calls into the plugin of one machine.
pub struct PluginCalls {
    machine: Arc<Machine>,
    context: Arc<ActionContext>,
    abandoned: Option<AbandonedCall>,
    /// True once the action under way has not ended long after its cancellation.
    abandon: Arc<watch::Sender<bool>>,
}

impl PluginCalls {
    /// Returns the calls for that machine.
    pub fn new(machine: Arc<Machine>, context: Arc<ActionContext>) -> Self {
        PluginCalls { machine, context, abandoned: None, abandon: Arc::default() }
    }

    /// Reports whether a call was abandoned and has not returned yet.
    pub fn is_abandoned(&self) -> bool {
        self.abandoned.as_ref().is_some_and(|call| !call.is_finished())
    }

    /// Waits until an abandoned call returns, if there is one.
    pub async fn abandoned_call_ended(&self) {
        if let Some(call) = self.abandoned.as_ref().filter(|call| !call.is_finished()) {
            call.finished().await;
        }
    }

    /// Reports whether the machine is recorded as powered off.
    pub fn is_off(&self) -> bool {
        self.machine.status().state == State::Poweroff
    }

    /// Returns the switch that abandons the action under way.
    pub fn abandon(&self) -> Arc<watch::Sender<bool>> {
        Arc::clone(&self.abandon)
    }

    /// Runs an action, and expects the machine to be in the action's expected state afterwards. The same call
    /// asks for the state, because a machine that has just begun to run keeps this computer busy.
    ///
    /// # Errors
    /// The plugin's error, the call was abandoned, or the machine is in another state.
    pub async fn run(&mut self, action: &Action) -> Result<()> {
        self.run_into(action, PathBuf::new()).await
    }

    /// Runs an action as [`run`](PluginCalls::run) does. An action that writes a file writes it to `path`.
    ///
    /// # Errors
    /// As [`run`](PluginCalls::run).
    pub async fn run_into(&mut self, action: &Action, path: PathBuf) -> Result<()> {
        let (machine, invoked, expected) =
            (Arc::clone(&self.machine), action.clone(), action.expected_state());
        let max_state_timeout = self.context.timeouts().state.max(MIN_STATE_TIMEOUT);
        self.abandon.send_replace(false);
        let mut abandon = self.abandon.subscribe();
        // The sender is here, so this cannot fail.
        let abandoned = async move { drop(abandon.wait_for(|abandon| *abandon).await) };
        let (what, limit) = (machine.call_name(), self.limit_of(action));
        let called = call(&what, limit, abandoned, move |deadline| {
            let (plugin, name) = (&machine.machinery.instance, machine.name());
            let done = match &invoked {
                Action::RestoreStart | Action::Heal => plugin.restore_start(name, deadline),
                Action::NorestoreStart => plugin.norestore_start(name, deadline),
                Action::Stop | Action::StopOwn | Action::StopOverrun => plugin.stop(name, deadline),
                Action::AcpiStop => plugin.acpi_stop(name, deadline),
                Action::DumpMemory { format, .. } => plugin.dump_memory(name, &path, *format, deadline),
                Action::Screenshot { .. } => plugin.screenshot(name, &path, deadline),
                Action::Prepare(PrepareOrigin::Request) => plugin.prepare(name, deadline),
                Action::Prepare(PrepareOrigin::Automatic) => plugin.prepare_automatically(name, deadline),
            };
            match done {
                Err(error)
                    if error.kind() == ErrorKind::StateReached && expected == Some(State::Poweroff) => {}
                done => done?,
            }
            let Some(expected) = expected else { return Ok(None) };
            let reports = machine.status().reports;
            // An action that took all of its time has a moment left for this.
            let deadline = Deadline::after(deadline.remaining().clamp(MIN_STATE_TIMEOUT, max_state_timeout));
            Ok(Some((expected, plugin.state(name, deadline), reports)))
        });
        match self.record_result(called.await, action.name())? {
            Some((expected, state, reports)) => self.record_state(expected, state, reports),
            None => Ok(()),
        }
    }

    /// Has the plugin make the network of the next run, if each run of the machine has one of its own.
    ///
    /// # Errors
    /// The plugin's error, or the call was abandoned.
    pub async fn open_network(&mut self, limit: Duration) -> Result<()> {
        if !self.machine.info().own_network {
            return Ok(());
        }
        let called = self.machine.call(limit, |machine, deadline| {
            machine.machinery.instance.open_network(machine.name(), deadline)
        });
        let called = called.await;
        self.record_result(called, "opening the network")
    }

    /// Has the plugin remove the network of a run that has ended. A network that remains is only logged.
    pub async fn close_network(&mut self) {
        if !self.machine.info().own_network || self.is_abandoned() {
            return;
        }
        let limit = self.limit_of(&Action::Stop);
        let called = self.machine.call(limit, |machine, deadline| {
            machine.machinery.instance.close_network(machine.name(), deadline)
        });
        let called = called.await;
        if let Err(error) = self.record_result(called, "closing the network") {
            tracing::warn!(machine = self.machine.name(), %error, "the network of a run remains");
        }
    }

    /// Has the plugin write the screen to the file, which stays as long as the plugin may write to it. `limit` is the
    /// deadline of the plugin. A call that does not return is abandoned after the time of a screenshot.
    ///
    /// # Errors
    /// The plugin's error, or the call was abandoned.
    pub async fn screen(&mut self, file: Arc<PrivateFile>, limit: Duration) -> Result<()> {
        let called = self.machine.call(self.context.timeouts().screenshot, move |machine, deadline| {
            let deadline = Deadline::after(limit.min(deadline.remaining()));
            machine.machinery.instance.screenshot(machine.name(), &file.path(), deadline)
        });
        let called = called.await;
        self.record_result(called, "showing the screen")
    }

    /// Records the state that the plugin has answered after an action.
    fn record_state(&self, expected: State, state: Result<State>, reports: u64) -> Result<()> {
        self.machine.set_answered(*state.as_ref().unwrap_or(&State::Error), reports);
        let state = state?;
        if state == expected {
            return Ok(());
        }
        let reason = format!("the machine is in state {state} after it, and {expected} was expected");
        Err(Error::unexpected_state(reason).advice("Look at the plugin's lines in the log"))
    }

    /// Asks the plugin for the state, and records it.
    ///
    /// # Errors
    /// The plugin's error, or the call was abandoned.
    pub async fn update_state(&mut self) -> Result<State> {
        let reports = self.machine.status().reports;
        let state = self.query_state().await;
        if !self.is_abandoned() {
            self.machine.set_answered(*state.as_ref().unwrap_or(&State::Error), reports);
        }
        state
    }

    /// Asks the plugin for the state.
    ///
    /// # Errors
    /// The plugin's error, or the call was abandoned.
    pub async fn query_state(&mut self) -> Result<State> {
        let limit = self.context.timeouts().state;
        let called = self.machine.query_state(limit).await;
        self.record_result(called, "querying the state")
    }

    /// Returns the timeout of the action.
    pub fn limit_of(&self, action: &Action) -> Duration {
        let timeouts = self.context.timeouts();
        match action {
            Action::RestoreStart | Action::Heal => timeouts.restore_start,
            Action::NorestoreStart => timeouts.norestore_start,
            Action::Stop | Action::StopOwn | Action::StopOverrun => timeouts.stop,
            Action::AcpiStop => timeouts.acpi_stop,
            Action::DumpMemory { .. } => timeouts.dump_memory,
            Action::Screenshot { .. } => timeouts.screenshot,
            Action::Prepare(_) => timeouts.prepare,
        }
    }

    /// Returns the time in which all calls of the action into the plugin end: a start queries the state, stops an
    /// earlier run, and stops the machine when it fails. The start of an isolated machine opens its network, and closes it
    /// after each stop and each end of a run.
    pub fn total_limit_of(&self, action: &Action) -> Duration {
        let timeouts = self.context.timeouts();
        let limit = self.limit_of(action);
        let network = match self.machine.info().own_network {
            true => limit + 4 * timeouts.stop + 5 * GRACE,
            false => Duration::ZERO,
        };
        limit + timeouts.state + 2 * timeouts.stop + 4 * GRACE + network
    }

    /// Returns the result of a call; keeps an abandoned call, after which the state is unknown.
    fn record_result<T>(&mut self, called: CallResult<T>, what: &str) -> Result<T> {
        match called {
            CallResult::Returned(result) => result,
            CallResult::Abandoned(call) => {
                self.abandoned = Some(call);
                self.machine.set_state(State::Error);
                // A plugin must return by its deadline.
                Err(Error::misbehaved(format!("{what} did not return from the plugin in time"))
                    .advice("The machine is lost until it does; restart the host to get it back"))
            }
        }
    }
}
