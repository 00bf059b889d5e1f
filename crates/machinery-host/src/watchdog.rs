//! systemd's watchdog: the host proves that it answers, and systemd restarts a host that does not.
//!
//! ```text
//! half of WATCHDOG_USEC ─▶ prove: the runtime, a thread for a call, the locks of the manager ─▶ WATCHDOG=1 ─▶ again
//!                                        └─ does not return: no WATCHDOG=1, and systemd kills the host
//! ```
//!
//! Without `WATCHDOG_USEC` no timer runs. Source: sd_watchdog_enabled(3).
//!
//! The proof waits for nothing that may last: an action, a reload, or the disk. Work that lasts is no reason to end
//! all running analyses.

use std::sync::Arc;
use std::time::Duration;

use machinery::{Error, Result};
use tokio::time::sleep;

use crate::manager::Manager;

/// Proves again and again that the host answers, and reports that. Returns when a proof fails.
pub async fn run<F: Future<Output = Result<()>>>(
    interval: Duration,
    mut prove: impl FnMut() -> F,
    report: impl Fn(),
) -> Error {
    loop {
        if let Err(error) = prove().await {
            return error;
        }
        report();
        sleep(interval / 2).await;
    }
}

/// Proves that the host answers: its runtime runs a task, which gets a thread, and the thread gets each lock that a
/// request needs.
///
/// # Errors
/// The host is broken.
pub async fn prove(manager: Arc<Manager>) -> Result<()> {
    let task = tokio::spawn(async move {
        let locks = tokio::task::spawn_blocking(move || manager.pass_all_locks());
        locks.await
    });
    let broken = |error| Error::failed(format!("the host does not answer: {error}"));
    task.await.map_err(broken)?.map_err(broken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::{pending, ready};
    use std::pin::pin;
    use std::sync::mpsc;
    use tokio::time::{Instant, timeout};

    use crate::manager::lab::manager;

    const INTERVAL: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn proof_returns_when_the_locks_are_free_and_not_while_one_is_held() {
        let (_folder, fleet, manager) = manager();
        prove(Arc::clone(&manager)).await.unwrap();
        let ((hold, held), (release, released)) = (mpsc::channel(), mpsc::channel::<()>());
        let holder = std::thread::spawn(move || {
            fleet.hold_allocation_lock(|| {
                hold.send(()).unwrap();
                released.recv().unwrap();
            });
        });
        held.recv().unwrap();
        let mut proof = pin!(prove(manager));
        assert!(timeout(Duration::from_millis(200), &mut proof).await.is_err());
        release.send(()).unwrap();
        holder.join().unwrap();
        proof.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn watchdog_reports_at_half_the_interval_while_the_host_answers() {
        let (reports, begun) = (Cell::new(0), Instant::now());
        let report = || reports.set(reports.get() + 1);
        let watchdog = run(INTERVAL, || ready(Ok(())), report);
        assert!(timeout(10 * INTERVAL - Duration::from_secs(1), watchdog).await.is_err());
        assert_eq!((reports.get(), begun.elapsed().as_secs()), (20, 599));
    }

    #[tokio::test(start_paused = true)]
    async fn watchdog_reports_nothing_more_when_the_host_hangs() {
        let (reports, proofs) = (Cell::new(0), Cell::new(0));
        let proof = async |count: u32| if count > 3 { pending().await } else { Ok(()) };
        let prove = || {
            proofs.set(proofs.get() + 1);
            proof(proofs.get())
        };
        let watchdog = run(INTERVAL, prove, || reports.set(reports.get() + 1));
        assert!(timeout(100 * INTERVAL, watchdog).await.is_err());
        assert_eq!((reports.get(), proofs.get()), (3, 4));
    }

    #[tokio::test(start_paused = true)]
    async fn watchdog_ends_when_a_proof_fails() {
        let error = run(INTERVAL, || ready(Err(Error::failed("broken"))), || ()).await;
        assert_eq!(error.reason(), "broken");
    }
}
