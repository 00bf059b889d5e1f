//! Stops a run of the host that lasts longer than `max_run`.

use std::future::pending;

use machinery::Error;
use tokio::time::sleep_until;

use super::executor::ActionExecutor;
use super::failure::Failure;

impl ActionExecutor {
    /// Waits until the present run has lasted longer than `max_run`, if the host has started it.
    pub async fn overrun(&self) {
        let Some(limit) = self.context.settings().max_run else { return pending().await };
        match self.machine.own_run_to_end() {
            Some(begun) => sleep_until(begun + limit).await,
            None => pending().await,
        }
    }

    /// Stops the present run, which has lasted too long.
    pub(super) async fn stop_overrun(&mut self) -> Result<(), Failure> {
        let Some(limit) = self.context.settings().max_run else { return Ok(()) };
        let reason = format!("the run has lasted longer than max_run ({} s)", limit.as_secs_f64());
        let machine = self.machine.name();
        tracing::warn!(machine, reason, "the run is stopped");
        self.machine.add_error(&Error::failed(&*reason).machine(machine).to_string());
        self.machine.end_run_for(reason);
        Ok(self.stop_own().await?)
    }
}
