//! Records an action that has ended: in the log, in the metrics, in the machine's errors, and in the pool.

use std::time::Duration;

use machinery::{Readiness, Result};

use super::executor::ActionExecutor;
use super::failure::Failure;
use super::metrics::{Ended, milliseconds};
use super::{Action, ActionResult};

impl ActionExecutor {
    /// Logs and counts an action that has ended, and takes the machine out of the pool where the failure demands it.
    pub(super) async fn record(
        &self,
        action: &Action,
        took: Duration,
        mode: Option<Readiness>,
        result: Result<(), Failure>,
    ) -> ActionResult {
        let (machine, name) = (self.machine.name(), action.name());
        let failed = result.as_ref().is_err_and(|failure| !failure.is_harmless());
        let steps = self.count(name, mode, took, failed);
        let took_ms = milliseconds(took);
        let harmless = result.is_err() && !failed;
        let Err(Failure { reason, disable }) = result else {
            tracing::info!(machine, action = name, took_ms, steps, "done");
            self.record_success(action).await;
            return Ok(());
        };
        let kind = reason.kind();
        let reason = reason.action(name).machine(machine).to_string();
        if *action == Action::Heal {
            self.record_failed_try(kind, disable, &reason).await;
            return Err(reason);
        } else if harmless {
            tracing::info!(machine, action = name, took_ms, steps, reason, "not done");
        } else if matches!(action, Action::Prepare(_)) && !disable {
            // The next restore works without a preparation, and the plugin has reported the readiness.
            tracing::warn!(machine, took_ms, steps, reason, "not prepared");
        } else {
            tracing::error!(machine, action = name, took_ms, steps, reason, "failed");
            self.machine.add_error(&reason);
        }
        if disable {
            self.context.take_out(&self.machine, kind, &reason).await;
        }
        Err(reason)
    }

    async fn record_success(&self, action: &Action) {
        match action {
            Action::RestoreStart | Action::NorestoreStart => self.machine.set_started_well(),
            Action::Heal => self.record_healed().await,
            _ => return,
        }
        self.machine.reset_plugin_faults();
    }

    /// Counts an action in the metrics, and returns its steps as text.
    fn count(&self, action: &'static str, mode: Option<Readiness>, took: Duration, failed: bool) -> String {
        let (machinery, steps) = (&self.machine.machinery.name, self.machine.status().steps);
        self.context.metrics.count(Ended { machinery, action, mode, took, steps: &steps, failed });
        let text = steps.iter().map(|(step, took)| format!("{step} {:.1}", milliseconds(*took)));
        text.collect::<Vec<_>>().join(", ")
    }
}
