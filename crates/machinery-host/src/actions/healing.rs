//! Tries a machine in quarantine: a full restore and a stop.
//!
//! A try is idle work of the machine's worker, and no client can request it. A request that arrives meanwhile waits,
//! as behind any action.

use std::future::pending;

use machinery::{Error, ErrorKind, State};
use tokio::time::sleep_until;

use super::Action;
use super::executor::ActionExecutor;
use super::failure::{Failure, refused};

impl ActionExecutor {
    /// Waits until the machine is to be tried, if it is in quarantine and nobody needs it.
    pub async fn try_due(&self) {
        let Some(at) = self.machine.next_try() else { return pending().await };
        // A machine whose plugin is still busy with it cannot be tried.
        self.calls.abandoned_call_ended().await;
        sleep_until(at).await;
    }

    /// Restores and stops the machine.
    pub(super) async fn heal(&mut self) -> Result<(), Failure> {
        // Before the look at the machine, because the wait has no limit.
        let permit = self.permit(&Action::RestoreStart).await?;
        let state = self.calls.query_state().await?;
        if state != State::Poweroff && !self.machine.status().own_run {
            return Err(self.refuse_foreign_run(state).await);
        }
        self.end_run_in(state).await?;
        self.start_off(&Action::RestoreStart, permit).await?;
        Ok(self.stop().await?)
    }

    /// Refuses a try on a machine that somebody else runs: it would discard the changes of that run.
    async fn refuse_foreign_run(&self, state: State) -> Failure {
        self.machine.set_answered(state, self.machine.status().reports);
        self.machine.leave_alone();
        self.context.save_pool(&self.machine).await;
        refused(Error::not_now("the machine runs, and the host has not started it"))
    }

    /// Puts the machine back into the pool after a try that has worked.
    pub(super) async fn record_healed(&self) {
        self.context.metrics.count_try(true);
        if self.machine.try_succeeded().is_some() {
            self.context.save_pool(&self.machine).await;
        }
    }

    /// Records a try that has failed, and when the next one is.
    pub(super) async fn record_failed_try(&self, kind: ErrorKind, counts: bool, reason: &str) {
        if !counts && kind != ErrorKind::NotNow {
            // Nothing was tried, because the host ends, or the plugin cannot use the machine now.
            tracing::info!(machine = self.machine.name(), reason, "not tried");
            return self.machine.postpone_try();
        }
        self.context.metrics.count_try(false);
        self.machine.try_failed(kind, reason, self.context.settings().heal);
        self.context.save_pool(&self.machine).await;
    }
}
