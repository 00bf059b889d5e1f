//! Questions about one machine, which its plugin answers.

use std::sync::Arc;
use std::time::Duration;

use machinery::{Error, Result, State};
use tokio::time::timeout;

use super::Manager;
use crate::actions::message::{NoScreen, Screen};
use crate::fleet::Machine;
use crate::fleet::quarantine::is_plugin_fault;
use crate::plugin::call::CallResult;

/// The time that a watcher waits for a screen. The machine may begin an action of the host's own meanwhile.
const MAX_SCREEN_WAIT: Duration = Duration::from_secs(10);

impl Manager {
    /// Returns the machine's state. During an action that is the recorded state. Otherwise the plugin is asked,
    /// by one client at a time.
    ///
    /// # Errors
    /// The plugin failed. A plugin that does not return, or misbehaves, takes the machine out of the pool.
    pub async fn machine_state(&self, machine: &Arc<Machine>) -> Result<State, String> {
        let known = machine.status();
        let query = if known.busy { None } else { machine.start_state_query() };
        let Some(query) = query else { return Ok(known.state) };
        let context = self.queues.context();
        let called = machine.call(context.timeouts().state, move |machine, deadline| {
            // Held until the plugin returns, however late that is.
            let _query = query;
            machine.machinery.instance.state(machine.name(), deadline)
        });
        let error = match called.await {
            CallResult::Returned(Ok(state)) => return Ok(state),
            CallResult::Returned(Err(error)) => error,
            CallResult::Abandoned(_) => Error::misbehaved("it did not return from the plugin"),
        };
        let kind = error.kind();
        let reason = error.action("querying the state").machine(machine.name()).to_string();
        if is_plugin_fault(kind) {
            machine.add_error(&reason);
            context.take_out(machine, kind, &reason).await;
        }
        Err(reason)
    }

    /// Returns the machine's screen, unless the machine is busy: somebody who watches it must not delay an action.
    ///
    /// # Errors
    /// There is none now.
    pub async fn screen(&self, machine: &Machine) -> Screen {
        let status = machine.status();
        if !machine.machinery.capabilities.screenshot {
            return Err(NoScreen::Unsupported);
        }
        if status.state != State::Running {
            return Err(NoScreen::Off);
        }
        let submitted = if status.busy { None } else { self.queues.submit_screen(machine) };
        let Some(screen) = submitted else { return Err(NoScreen::Busy) };
        let screen = timeout(MAX_SCREEN_WAIT, screen).await;
        screen.map_err(|_| NoScreen::Busy)?.unwrap_or(Err(NoScreen::Busy))
    }
}
