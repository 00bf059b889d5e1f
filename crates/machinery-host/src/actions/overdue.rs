//! Notices an action that takes longer than all of its calls into the plugin may: its worker is stuck in the host
//! itself, for example in a disk that does not answer.
//!
//! The clock stops while a restore waits for its permit, which has no limit.

use std::future::pending;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// The extra time of an action before it is overdue.
pub const OVERDUE_GRACE: Duration = Duration::from_secs(10);

/// The clock of the action under way.
#[derive(Debug, Default)]
pub struct ActionClock {
    overdue_at: watch::Sender<Option<Instant>>,
    limit: Duration,
}

impl ActionClock {
    /// Starts the clock of an action, whose calls into the plugin end within `limit`. Returns what waits until the
    /// action is overdue.
    pub fn start(&mut self, limit: Duration) -> Overdue {
        self.limit = limit;
        self.restart();
        Overdue(self.overdue_at.subscribe())
    }

    /// Stops the clock: the action waits for something without a limit.
    pub fn stop(&self) {
        self.overdue_at.send_replace(None);
    }

    /// Starts the clock again from the beginning.
    pub fn restart(&self) {
        self.overdue_at.send_replace(Some(Instant::now() + self.limit + OVERDUE_GRACE));
    }
}

/// Waits until an action is overdue.
pub struct Overdue(watch::Receiver<Option<Instant>>);

impl Overdue {
    /// Waits until the action is overdue.
    pub async fn wait(mut self) {
        loop {
            let at = *self.0.borrow_and_update();
            tokio::select! {
                biased;
                changed = self.0.changed() => if changed.is_err() { pending::<()>().await },
                () = wait_until(at) => return,
            }
        }
    }
}

async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn action_is_overdue_after_its_limit_and_the_grace() {
        let (begun, mut clock) = (Instant::now(), ActionClock::default());
        clock.start(LIMIT).wait().await;
        assert_eq!(begun.elapsed(), LIMIT + OVERDUE_GRACE);
    }

    #[tokio::test(start_paused = true)]
    async fn action_is_not_overdue_while_it_waits_without_a_limit() {
        let (begun, mut clock) = (Instant::now(), ActionClock::default());
        let overdue = tokio::spawn(clock.start(LIMIT).wait());
        let waits = Duration::from_secs(3600);
        tokio::time::sleep(Duration::from_secs(50)).await;
        clock.stop();
        tokio::time::sleep(waits).await;
        assert!(!overdue.is_finished());
        clock.restart();
        overdue.await.unwrap();
        assert_eq!(begun.elapsed(), Duration::from_secs(50) + waits + LIMIT + OVERDUE_GRACE);
    }
}
