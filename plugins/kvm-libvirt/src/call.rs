//! Calls into libvirt with a timeout.
//!
//! A call into libvirt blocks until libvirtd answers, and no function ends it early. So it runs in a thread
//! of its own, and the caller stops waiting at the deadline. The thread goes on until the call returns: at
//! the latest when keepalive finds the connection dead. A connection that is still being opened has no
//! keepalive, so with a libvirtd that hangs such a thread may never end. At most [`MAX_ABANDONED`] abandoned
//! calls to one libvirtd may be under way; then no further call starts until some return. Each libvirtd has
//! its own [`Calls`], so a libvirtd that hangs never uses up the calls to another one.
//!
//! ```text
//!   under way ── the call returns ──▶ RETURNED
//!       └────── the caller drops it ──▶ ABANDONED ── the call returns ──▶ counted no longer
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicIsize, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use machinery::{Deadline, Error, Result};

/// The maximum number of abandoned calls to one libvirtd that are still under way.
pub const MAX_ABANDONED: isize = 32;

/// The calls to one libvirtd: the number of abandoned ones that are still under way.
#[derive(Debug, Clone, Default)]
pub struct Calls(Arc<AtomicIsize>);

/// A call under way. Dropping it before its end abandons it: its thread goes on.
pub struct Call<T> {
    outcome: Receiver<Result<T>>,
    progress: Arc<Progress>,
}

/// Records whether a call has returned or was abandoned, whichever came first.
struct Progress {
    outcome: AtomicU8,
    calls: Calls,
}

const RETURNED: u8 = 1;
const ABANDONED: u8 = 2;

impl Progress {
    fn returned(&self) {
        if self.outcome.swap(RETURNED, Ordering::SeqCst) == ABANDONED {
            self.calls.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn abandoned(&self) {
        if self.outcome.swap(ABANDONED, Ordering::SeqCst) != RETURNED {
            self.calls.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Records that a call has returned when it is dropped, in a panic too.
struct ReturnGuard(Arc<Progress>);

impl Drop for ReturnGuard {
    fn drop(&mut self) {
        self.0.returned();
    }
}

impl<T> Drop for Call<T> {
    fn drop(&mut self) {
        self.progress.abandoned();
    }
}

impl Calls {
    /// Starts a call in a thread of its own.
    ///
    /// # Errors
    /// The thread cannot be started, or too many abandoned calls have not returned.
    pub fn start<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<Call<T>> {
        let abandoned = self.0.load(Ordering::SeqCst);
        if abandoned >= MAX_ABANDONED {
            let reason = format!("libvirtd hangs: {abandoned} earlier calls have not returned");
            return Err(Error::environment(reason)
                .advice("Look at libvirtd's log, and restart libvirtd (systemctl restart libvirtd)"));
        }
        let (answer, outcome) = sync_channel(1);
        let progress = Arc::new(Progress { outcome: AtomicU8::new(0), calls: self.clone() });
        let guard = ReturnGuard(Arc::clone(&progress));
        let run = move || {
            let outcome = work();
            drop(guard);
            // The caller may have stopped waiting.
            let _ = answer.send(outcome);
        };
        spawn("libvirt-call", run)?;
        Ok(Call { outcome, progress })
    }

    /// Calls `work` and waits until the deadline; `waiting_for` names the result in the error of a timeout. A call
    /// that times out is abandoned, so use this only for calls whose late outcome does not matter.
    ///
    /// # Errors
    /// The call fails; [`ErrorKind::Timeout`](machinery::ErrorKind::Timeout).
    pub fn call_with_timeout<T: Send + 'static>(
        &self,
        deadline: Deadline,
        waiting_for: &str,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        deadline.check(waiting_for)?;
        let call = self.start(work)?;
        call.wait(deadline.remaining()).unwrap_or_else(|| Err(deadline.timeout(waiting_for)))
    }
}

impl<T> Call<T> {
    /// Waits for the call's outcome, at most for `limit`; returns `None` if the call is still under way.
    pub fn wait(&self, limit: Duration) -> Option<Result<T>> {
        match self.outcome.recv_timeout(limit) {
            Ok(outcome) => Some(outcome),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                Some(Err(Error::misbehaved("a call into libvirt has panicked: this is a bug of the plugin")))
            }
        }
    }
}

/// Starts a thread.
///
/// # Errors
/// The system cannot start another thread.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(work);
    thread
        .map(drop)
        .map_err(|error| Error::environment(format!("cannot start a thread for libvirt: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery::ErrorKind;
    use std::sync::mpsc::channel;

    #[test]
    fn call_is_abandoned_when_the_deadline_passes() {
        let (go, gone) = channel::<()>();
        let calls = Calls::default();
        let late = calls.call_with_timeout(Deadline::after(Duration::from_millis(5)), "nothing", move || {
            let _ = gone.recv();
            Ok(())
        });
        assert_eq!(late.unwrap_err().kind(), ErrorKind::Timeout);
        drop(go);
        assert_eq!(calls.call_with_timeout(Deadline::after(Duration::from_secs(10)), "it", || Ok(7)), Ok(7));
    }

    #[test]
    fn calls_are_refused_when_too_many_to_their_libvirtd_were_abandoned() {
        let (calls, others) = (Calls::default(), Calls::default());
        let (go, gone) = channel::<()>();
        let gone = Arc::new(std::sync::Mutex::new(gone));
        let hang = || {
            let gone = Arc::clone(&gone);
            calls.call_with_timeout(Deadline::after(Duration::from_millis(1)), "nothing", move || {
                let _ = gone.lock().unwrap().recv();
                Ok(())
            })
        };
        let refused = (0..=MAX_ABANDONED * 2)
            .filter_map(|_| hang().err())
            .find(|error| error.kind() != ErrorKind::Timeout);
        assert!(refused.unwrap().to_string().contains("libvirtd hangs"));
        assert!(calls.0.load(Ordering::SeqCst) <= MAX_ABANDONED + 1);
        assert_eq!(others.call_with_timeout(Deadline::after(Duration::from_secs(10)), "it", || Ok(8)), Ok(8));
        drop(go);
        while calls.0.load(Ordering::SeqCst) > 0 {
            thread::yield_now();
        }
        assert_eq!(calls.call_with_timeout(Deadline::after(Duration::from_secs(10)), "it", || Ok(7)), Ok(7));
    }

    #[test]
    fn call_is_not_started_when_the_deadline_has_passed() {
        let error =
            Calls::default().call_with_timeout(Deadline::after(Duration::ZERO), "it", || -> Result<()> {
                panic!("it was started")
            });
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Timeout);
    }

    #[test]
    fn call_returns_an_error_when_it_panics() {
        let error = Calls::default().call_with_timeout(
            Deadline::after(Duration::from_secs(10)),
            "it",
            || -> Result<()> { panic!("as wanted") },
        );
        assert_eq!(error.unwrap_err().kind(), ErrorKind::PluginMisbehaved);
    }
}
