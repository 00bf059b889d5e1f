//! Stops a run of the host that lasts longer than `max_run`.

use std::future::pending;

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
        self.machine.add_error(&self.machine.error(&reason));
        self.machine.end_run_for(reason.clone());
        Ok(self.stop_own(&reason).await?)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Action;
    use super::super::lab::Lab;
    use tokio::time::{Instant, timeout};

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn run_is_too_long_when_it_has_lasted_max_run() {
        let lab = Lab::new("max_run: 60");
        lab.start_own_run();
        let (begun, mut executor) = (Instant::now(), lab.executor());
        executor.overrun().await;
        assert_eq!(begun.elapsed(), Duration::from_secs(60));
        executor.execute(&Action::StopOverrun).await.unwrap();
        let errors = lab.machine.status().errors;
        assert!(errors[0].contains("longer than max_run (60 s)"), "{errors:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn run_is_never_too_long_when_it_is_not_the_hosts_or_has_no_limit() {
        let lab = Lab::new("max_run: 60");
        lab.start_foreign_run();
        assert!(timeout(HOUR, lab.executor().overrun()).await.is_err());
        let lab = Lab::new("");
        lab.start_own_run();
        assert!(timeout(HOUR, lab.executor().overrun()).await.is_err());
    }
}
