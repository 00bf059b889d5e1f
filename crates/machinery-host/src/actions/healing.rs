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
        self.context.save(&self.machine).await;
        refused(Error::not_now("the machine runs, and the host has not started it"))
    }

    /// Puts the machine back into the pool after a try that has worked.
    pub(super) async fn record_healed(&self) {
        self.context.metrics.count_try(true);
        if self.machine.try_succeeded().is_some() {
            self.context.save(&self.machine).await;
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
        self.context.save(&self.machine).await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::lab::Lab;
    use super::*;
    use crate::config::Heal;
    use tokio::time::timeout;

    /// Returns a lab whose machine has failed.
    fn lab() -> Lab {
        let lab = Lab::new("");
        lab.machine.take_out(ErrorKind::Failed, "killed", Heal::Auto);
        lab
    }

    #[tokio::test(start_paused = true)]
    async fn try_is_due_at_its_time_and_never_for_a_healthy_machine() {
        let lab = lab();
        let executor = lab.executor();
        assert!(timeout(Duration::from_secs(4), executor.try_due()).await.is_err());
        executor.try_due().await;
        lab.machine.enable();
        assert!(timeout(Duration::from_secs(3600), executor.try_due()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn machine_is_back_in_the_pool_when_a_try_has_worked() {
        let lab = lab();
        lab.context.save(&lab.machine).await;
        lab.machine.take_out(ErrorKind::PluginPanicked, "panicked", Heal::Auto);
        lab.executor().execute(&Action::Heal).await.unwrap();
        assert_eq!(lab.plugin.take_calls(), ["restore_start", "stop"]);
        assert_eq!((lab.quarantine(), lab.machine.status().plugin_faults), (None, 0));
        assert!(!lab.machine.status().started_well && !lab.saved().contains("killed"));
        assert_eq!(lab.context.metrics.tries_and_healed(), (1, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn failed_try_counts_and_is_saved() {
        let lab = lab();
        lab.plugin.fail("restore_start", Error::failed("killed again"));
        lab.executor().execute(&Action::Heal).await.unwrap_err();
        assert_eq!(lab.quarantine().unwrap().tries, 1);
        assert!(lab.saved().contains("killed again") && lab.machine.status().errors.is_empty());
        assert_eq!(lab.context.metrics.tries_and_healed(), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn try_that_the_plugin_postpones_counts_and_one_that_was_not_made_does_not() {
        let lab = lab();
        lab.plugin.fail("restore_start", Error::not_now("no space"));
        lab.executor().execute(&Action::Heal).await.unwrap_err();
        assert_eq!(lab.quarantine().unwrap().tries, 1);
        lab.machine.set_diagnosis(Some(&Error::environment("no disk")), Vec::new());
        tokio::time::advance(Duration::from_secs(3600)).await;
        lab.executor().execute(&Action::Heal).await.unwrap_err();
        let quarantine = lab.quarantine().unwrap();
        assert_eq!((quarantine.tries, quarantine.next_try_in()), (1, 30));
        assert_eq!(lab.context.metrics.tries_and_healed(), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn run_of_somebody_else_is_not_ended_by_a_try() {
        let lab = lab();
        lab.plugin.set_state("m", State::Running);
        lab.executor().execute(&Action::Heal).await.unwrap_err();
        assert!(lab.plugin.take_calls().is_empty());
        assert!(lab.quarantine().unwrap().is_left_alone && lab.saved().contains("is_left_alone"));
        assert_eq!(lab.machine.status().state, State::Running);
    }

    #[tokio::test(start_paused = true)]
    async fn run_of_an_earlier_try_is_ended_by_the_next_one() {
        let lab = lab();
        lab.start_own_run();
        lab.executor().execute(&Action::Heal).await.unwrap();
        assert_eq!(lab.plugin.take_calls(), ["stop", "restore_start", "stop"]);
    }
}
