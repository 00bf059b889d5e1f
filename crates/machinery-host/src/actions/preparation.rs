//! A preparation under way: when it is useless, and how it is cancelled.
//!
//! ```text
//! running ─▶ ended
//!    └─ a stop, a cold start or a pause arrives; a restore has waited for 30 s ─▶ cancelled: the plugin's
//!       `stop`, repeated every 500 ms ─▶ ended
//!                                  └─ later than `timeouts.stop` ─▶ overdue: abandoned
//! ```
//!
//! A restore waits for a preparation under way, because it would have to do the same work.

use std::sync::Arc;
use std::time::Duration;

use machinery::State;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::context::ActionContext;
use super::message::Message;
use crate::fleet::Machine;
use crate::plugin::call::CallResult;

/// The reason for a preparation that is refused.
pub const USELESS: &str = "not prepared, because the machine is to be stopped or started cold";

/// The pause between two cancellations of one preparation.
const CANCEL_INTERVAL: Duration = Duration::from_millis(500);

/// Cancels a preparation under way once it is useless.
pub struct Cancellation {
    machine: Arc<Machine>,
    context: Arc<ActionContext>,
    /// Abandons the preparation.
    abandon: Arc<watch::Sender<bool>>,
    /// The time of the next cancellation, if there is to be one.
    next: Option<Instant>,
    /// The time of the first cancellation.
    first: Option<Instant>,
}

impl Cancellation {
    /// Returns the cancellation of a preparation of that machine.
    pub fn new(
        machine: Arc<Machine>,
        context: Arc<ActionContext>,
        abandon: Arc<watch::Sender<bool>>,
    ) -> Self {
        Cancellation { machine, context, abandon, next: None, first: None }
    }

    /// Takes note of a message that arrived during the preparation; `None` is the end of the host.
    pub fn consider(&mut self, message: Option<&Message>) {
        let from = message.map_or_else(|| Some(Instant::now()), Message::cancels_preparation_from);
        self.next = [self.next, from].into_iter().flatten().min();
    }

    /// Waits until the preparation should be cancelled.
    pub async fn due(&self) {
        match self.next {
            Some(time) => sleep_until(time).await,
            None => std::future::pending().await,
        }
    }

    /// Cancels the preparation, and abandons it if it has not ended long after the first cancellation.
    pub async fn cancel(&mut self) {
        let first = *self.first.get_or_insert_with(Instant::now);
        cancel_prepare(&self.machine, &self.context).await;
        if first.elapsed() >= self.context.timeouts().stop {
            self.abandon.send_replace(true);
        }
        // The plugin may not have begun the preparation when the first cancellation came.
        self.next = Some(Instant::now() + CANCEL_INTERVAL);
    }
}

/// Cancels the plugin's preparation. The interface uses `stop` for that.
async fn cancel_prepare(machine: &Arc<Machine>, context: &ActionContext) {
    if machine.status().state != State::Poweroff {
        // Somebody has started the machine, which ends the preparation. A stop would end that run.
        return;
    }
    let cancelled = machine.call(context.timeouts().stop, |machine, deadline| {
        machine.machinery.instance.stop(machine.name(), deadline)
    });
    match cancelled.await {
        // Usually the machine is off, and the plugin answers that.
        CallResult::Returned(answer) => {
            tracing::debug!(machine = machine.name(), ?answer, "preparation cancelled");
        }
        CallResult::Abandoned(_) => {
            tracing::warn!(machine = machine.name(), "the cancellation of a preparation has not returned");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lab::Lab;
    use super::super::message::Pause;
    use super::*;
    use tokio::time::{advance, timeout};

    fn cancellation(lab: &Lab) -> (Cancellation, watch::Receiver<bool>) {
        let abandon = Arc::new(watch::Sender::new(false));
        let abandoned = abandon.subscribe();
        (Cancellation::new(Arc::clone(&lab.machine), Arc::clone(&lab.context), abandon), abandoned)
    }

    #[tokio::test(start_paused = true)]
    async fn preparation_is_cancelled_again_until_it_is_overdue() {
        let lab = Lab::new("timeouts: {stop: 1}");
        let (mut cancellation, abandoned) = cancellation(&lab);
        assert!(timeout(Duration::from_secs(3600), cancellation.due()).await.is_err(), "nothing cancels it");
        cancellation.consider(Some(&Message::Pause(Pause::new().0)));
        let begun = Instant::now();
        for (number, is_overdue) in [(0, false), (1, false), (2, true)] {
            cancellation.due().await;
            assert_eq!(begun.elapsed(), number * CANCEL_INTERVAL);
            cancellation.cancel().await;
            assert_eq!((lab.plugin.take_calls(), *abandoned.borrow()), (vec!["stop".into()], is_overdue));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn preparation_is_cancelled_when_the_host_ends() {
        let lab = Lab::new("");
        let (mut cancellation, _) = cancellation(&lab);
        cancellation.consider(None);
        let begun = Instant::now();
        cancellation.due().await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        // A later message does not postpone it.
        advance(Duration::from_secs(1)).await;
        cancellation.consider(None);
        cancellation.due().await;
        assert_eq!(begun.elapsed(), Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn run_is_not_stopped_instead_of_a_preparation() {
        let lab = Lab::new("");
        lab.start_foreign_run();
        cancellation(&lab).0.cancel().await;
        assert!(lab.plugin.take_calls().is_empty());
    }
}
