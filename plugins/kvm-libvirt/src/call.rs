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

use std::sync::atomic::{AtomicIsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use machinery::{Deadline, Error, Result};
use machinery_backend::sync::{lock, wait_while};

/// The maximum number of abandoned calls to one libvirtd that are still under way.
pub const MAX_ABANDONED: isize = 32;

/// The calls to one libvirtd: the number of abandoned ones that are still under way.
#[derive(Debug, Clone, Default)]
pub struct Calls(Arc<AtomicIsize>);

/// A call under way. Dropping it before its end abandons it: its thread goes on.
pub struct Call<T>(Arc<Progress<T>>);

/// The progress of a call, which its thread and its caller share.
struct Progress<T> {
    state: Mutex<CallState<T>>,
    changed: Condvar,
    calls: Calls,
}

struct CallState<T> {
    /// `None` while the call is under way, and after a panic.
    outcome: Option<Result<T>>,
    has_returned: bool,
    is_abandoned: bool,
    is_interrupted: bool,
}

/// Records that a call has returned when it is dropped, in a panic too.
struct ReturnGuard<T>(Arc<Progress<T>>);

impl<T> Drop for ReturnGuard<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.has_returned = true;
        if state.is_abandoned {
            self.0.calls.0.fetch_sub(1, Ordering::SeqCst);
        }
        drop(state);
        self.0.changed.notify_all();
    }
}

impl<T> Drop for Call<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        if !state.has_returned {
            state.is_abandoned = true;
            self.0.calls.0.fetch_add(1, Ordering::SeqCst);
        }
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
        let state =
            CallState { outcome: None, has_returned: false, is_abandoned: false, is_interrupted: false };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        let call = Call(Arc::new(Progress { state, changed, calls: self.clone() }));
        let guard = ReturnGuard(Arc::clone(&call.0));
        let run = move || {
            let outcome = work();
            lock(&guard.0.state).outcome = Some(outcome);
            drop(guard);
        };
        // A thread that cannot be started drops the guard, so the call counts as returned.
        spawn("libvirt-call", run)?;
        Ok(call)
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
        self.wait_while(limit, |state| !state.has_returned)
    }

    /// Waits as [`wait`](Call::wait) does, until the [`interrupter`](Call::interrupter) is called.
    pub fn wait_unless_interrupted(&self, limit: Duration) -> Option<Result<T>> {
        self.wait_while(limit, |state| !state.has_returned && !state.is_interrupted)
    }

    fn wait_while(&self, limit: Duration, condition: impl Fn(&CallState<T>) -> bool) -> Option<Result<T>> {
        let (progress, deadline) = (&*self.0, Deadline::after(limit));
        let mut state =
            wait_while(&progress.changed, lock(&progress.state), deadline, |state| condition(state));
        let panicked =
            || Err(Error::misbehaved("a call into libvirt has panicked: this is a bug of the plugin"));
        state.has_returned.then(|| state.outcome.take().unwrap_or_else(panicked))
    }
}

impl<T: Send + 'static> Call<T> {
    /// Returns a function that ends [`wait_unless_interrupted`](Call::wait_unless_interrupted). The call goes on.
    pub fn interrupter(&self) -> impl Fn() + Send + 'static {
        let progress = Arc::clone(&self.0);
        move || {
            lock(&progress.state).is_interrupted = true;
            progress.changed.notify_all();
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
    fn wait_ends_when_it_is_interrupted_and_the_call_goes_on() {
        let (go, gone) = channel::<()>();
        let call = Calls::default().start(move || Ok(gone.recv().is_err())).unwrap();
        let interrupt = call.interrupter();
        let interrupting = thread::spawn(interrupt);
        assert_eq!(call.wait_unless_interrupted(Duration::from_secs(600)), None);
        assert_eq!(call.wait(Duration::from_millis(5)), None);
        interrupting.join().unwrap();
        drop(go);
        assert_eq!(call.wait(Duration::from_secs(60)), Some(Ok(true)));
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
