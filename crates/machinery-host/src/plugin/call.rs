//! The bounded call into a plugin.
//!
//! ```text
//! start ─▶ running ─▶ returned: the result, or the host's own panic as an error
//!             └─ timeout, or cancelled ─▶ abandoned: the thread goes on, and nobody waits for it
//! ```
//!
//! Every call has a thread of its own, because a plugin may block for ever. A host that serves waits with
//! [`call`], which takes the thread from the runtime's pool. A host that loads plugins waits with
//! [`call_blocking`], which starts a thread.
//!
//! A library whose initialiser does not return keeps the dynamic linker locked. Every thread that makes its first
//! thread-local with a destructor waits for that lock. So [`call_blocking`] uses a condition variable, which
//! needs no thread-local; the channels of `std` do.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use machinery::host::panic_message;
use machinery::{Deadline, Error, Result};
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::exit;

/// A plugin returns by its deadline. A call that is later than this is abandoned.
pub const GRACE: Duration = Duration::from_secs(2);
/// The maximum number of calls that [`call_all`] makes at a time.
const MAX_PARALLEL_CALLS: usize = 16;

/// The end of a call.
pub enum CallResult<T> {
    /// The plugin returned.
    Returned(Result<T>),
    /// The plugin has not returned, and the call still runs.
    Abandoned(AbandonedCall),
}

/// A call that still runs, although nobody waits for it any more.
pub struct AbandonedCall(Arc<dyn Finish>);

impl AbandonedCall {
    /// Reports whether the call has ended after all.
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }

    /// Waits until the call has ended.
    pub async fn finished(&self) {
        while !self.is_finished() {
            self.0.ended().notified().await;
        }
    }
}

/// Calls `work` with `limit` as its deadline, and abandons the call two seconds later, or as soon as
/// `cancelled` ends. `what` names the plugin and its method, for the log.
pub async fn call<T: Send + 'static>(
    what: &str,
    limit: Duration,
    cancelled: impl Future<Output = ()>,
    work: impl FnOnce(Deadline) -> Result<T> + Send + 'static,
) -> CallResult<T> {
    // The deadline includes the wait for a thread, so a call that was abandoned meanwhile never begins.
    let deadline = Deadline::after(limit);
    let (running, job) = prepare(what, move || {
        deadline.check("a free thread")?;
        work(deadline)
    });
    tokio::task::spawn_blocking(job);
    tokio::select! {
        () = running.notify.notified() => {}
        () = sleep(limit + GRACE) => {}
        () = cancelled => {}
    }
    // The plugin may have returned while this task waited for its cancellation.
    let result = running.lock().take();
    result.map_or_else(|| CallResult::Abandoned(AbandonedCall(running)), CallResult::Returned)
}

/// Calls `work` and blocks until it returns, for `limit` at most. `what` names the plugin and its method.
///
/// # Errors
/// No thread can be started, the host panicked, or `work` has not returned within `limit`.
pub fn call_blocking<T: Send + 'static>(
    limit: Duration,
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let running = start(what, work)?;
    let waited = running.returned.wait_timeout_while(running.lock(), limit, |result| result.is_none());
    let result = waited.unwrap_or_else(PoisonError::into_inner).0.take();
    result.unwrap_or_else(|| Err(timed_out(what, limit)))
}

/// Calls `work` for each item, in order, and blocks until all calls have returned. A call may take `limit`, and
/// all calls together `all`. A call that takes longer is abandoned with its thread, and the next calls get another
/// thread.
pub fn call_each<I: Send + Sync + 'static, T: Send + 'static>(
    what: &str,
    items: Vec<I>,
    limit: Duration,
    all: Duration,
    work: impl Fn(&I) -> Result<T> + Send + Sync + 'static,
) -> Vec<Result<T>> {
    let end = Instant::now() + all;
    let shared = Arc::new((items, work));
    let count = shared.0.len();
    let mut results = Vec::new();
    while results.len() < count {
        let limit = (limit + GRACE).min(end.saturating_duration_since(Instant::now()));
        if limit.is_zero() {
            results.push(Err(timed_out(what, limit)));
            continue;
        }
        let (shared, first) = (Arc::clone(&shared), results.len());
        let (sender, receiver) = sync_channel(0);
        let running = start(what, move || {
            let (items, work) = &*shared;
            // The receiver has gone if a call was abandoned.
            items[first..].iter().map(work).try_for_each(|result| sender.send(result)).ok();
            Ok(())
        });
        results.extend(std::iter::from_fn(|| receiver.recv_timeout(limit).ok()));
        if results.len() < count {
            results.push(Err(running.err().unwrap_or_else(|| timed_out(what, limit))));
        }
    }
    results
}

/// Calls `work` for each item as [`call_each`] does, on several threads at a time. Returns the results in the order of
/// the items.
pub fn call_all<T: Send + 'static>(
    what: &str,
    items: Vec<String>,
    limit: Duration,
    all: Duration,
    work: impl Fn(&String) -> Result<T> + Clone + Send + Sync + 'static,
) -> Vec<Result<T>> {
    let share = items.len().div_ceil(MAX_PARALLEL_CALLS).max(1);
    thread::scope(|scope| {
        let call_share = |share: &[String]| {
            let (names, work) = (share.to_vec(), work.clone());
            let thread = thread::Builder::new().name("calls".to_owned());
            let started = thread.spawn_scoped(scope, move || call_each(what, names, limit, all, work));
            (share.len(), started)
        };
        let shares: Vec<_> = items.chunks(share).map(call_share).collect();
        let results = shares.into_iter().flat_map(|(count, started)| {
            let returned = started.ok().and_then(|thread| thread.join().ok());
            let failed = || Error::failed(format!("{what}: the host could not call the plugin"));
            returned.unwrap_or_else(|| (0..count).map(|_| Err(failed())).collect())
        });
        results.collect()
    })
}

/// Returns the error of a call that was abandoned after `limit`.
pub fn timed_out(what: &str, limit: Duration) -> Error {
    Error::misbehaved(format!("{what}: the plugin did not return within {limit:?}")).advice(
        "Look in the log for the plugin's last lines; `timeouts` in machinery-host.yaml sets the limits",
    )
}

/// A call under way. Its thread shares it with the caller.
struct RunningCall<T> {
    result: Mutex<Option<Result<T>>>,
    /// Wakes a thread that waits.
    returned: Condvar,
    /// Wakes a task that waits.
    notify: Notify,
}

impl<T> RunningCall<T> {
    // The result is whole after each statement, so poison means nothing.
    fn lock(&self) -> MutexGuard<'_, Option<Result<T>>> {
        self.result.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, result: Result<T>) {
        *self.lock() = Some(result);
        self.returned.notify_all();
        self.notify.notify_one();
    }
}

trait Finish: Send + Sync {
    fn is_finished(&self) -> bool;
    /// Returns what is notified at the end.
    fn ended(&self) -> &Notify;
}

impl<T: Send> Finish for RunningCall<T> {
    /// Nobody takes the result of an abandoned call.
    fn is_finished(&self) -> bool {
        self.lock().is_some()
    }

    fn ended(&self) -> &Notify {
        &self.notify
    }
}

/// Returns a call of `work`, and the job that runs it. The guard in a plugin turns the plugin's panics into
/// errors, so a panic here is the host's own.
fn prepare<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> (Arc<RunningCall<T>>, impl FnOnce() + Send + 'static) {
    let running =
        Arc::new(RunningCall { result: Mutex::new(None), returned: Condvar::new(), notify: Notify::new() });
    let (at, on_thread) = (what.to_owned(), Arc::clone(&running));
    let job = move || {
        let call = exit::Call::begin(&at);
        let result = catch_unwind(AssertUnwindSafe(work));
        drop(call);
        on_thread.finish(result.unwrap_or_else(|panic| {
            Err(Error::failed(format!("{at}: the host panicked: {}", panic_message(panic))))
        }));
    };
    (running, job)
}

/// Starts `work` on a new thread.
fn start<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<Arc<RunningCall<T>>> {
    let (running, job) = prepare(what, work);
    match thread::Builder::new().name("plugin".to_owned()).spawn(job) {
        Ok(_) => Ok(running),
        Err(error) => Err(Error::environment(format!("{what}: cannot start a thread: {error}"))
            .advice("Raise the limit of threads of the host's user or service")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery::ErrorKind;
    use std::future::{pending, ready};
    use std::sync::mpsc;

    #[test]
    fn call_blocking_returns_the_result_or_a_timeout() {
        assert_eq!(call_blocking(Duration::from_secs(60), "adding", || Ok(1 + 1)).unwrap(), 2);
        let error = call_blocking(Duration::from_millis(10), "parking", || {
            thread::park();
            Ok(())
        })
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PluginMisbehaved);
        assert!(error.to_string().starts_with("parking: the plugin did not return within 10ms"), "{error}");
    }

    #[test]
    fn call_blocking_reports_the_hosts_own_panic() {
        let error = call_blocking(Duration::from_secs(60), "adding", || -> Result<()> { panic!("broken") });
        assert!(error.unwrap_err().to_string().contains("adding: the host panicked: broken"));
    }

    #[tokio::test]
    async fn call_is_abandoned_when_it_is_cancelled_and_finishes_later() {
        let (release, released) = mpsc::channel();
        let work = move |_| {
            released.recv().unwrap();
            Ok(())
        };
        let CallResult::Abandoned(call) = call("waiting", Duration::from_secs(60), ready(()), work).await
        else {
            panic!("it returned");
        };
        assert!(!call.is_finished());
        release.send(()).unwrap();
        call.finished().await;
        assert!(call.is_finished());
        call.finished().await;
    }

    #[test]
    fn call_is_not_abandoned_when_it_has_returned_before_its_cancellation_ends() {
        let one_thread =
            tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).enable_time().build();
        // Its job follows that of the call.
        let cancelled = async {
            let (send, after) = mpsc::channel();
            tokio::task::spawn_blocking(move || send.send(()));
            after.recv().unwrap();
        };
        let call = call("adding", Duration::from_secs(60), cancelled, |_| Ok(1 + 1));
        let called = one_thread.unwrap().block_on(call);
        assert!(matches!(called, CallResult::Returned(Ok(2))));
    }

    #[test]
    fn call_each_goes_on_with_the_next_item_when_a_call_is_abandoned() {
        let (release, released) = mpsc::channel::<()>();
        let released = Mutex::new(released);
        let work = move |item: &u32| {
            if *item == 2 {
                // Fails once the test has ended.
                let _ = released.lock().unwrap().recv();
            }
            Ok(item * 10)
        };
        let results = call_each("counting", vec![1, 2, 3], Duration::ZERO, Duration::from_secs(60), work);
        drop(release);
        assert_eq!((results[0].as_ref(), results[2].as_ref(), results.len()), (Ok(&10), Ok(&30), 3));
        assert!(
            results[1].as_ref().unwrap_err().to_string().starts_with("counting: the plugin did not return")
        );
    }

    #[tokio::test]
    async fn call_passes_its_deadline_and_returns_the_result() {
        let limit = Duration::from_secs(60);
        let called = call("asking", limit, pending(), |deadline| Ok(deadline.remaining())).await;
        let CallResult::Returned(Ok(remaining)) = called else { panic!("it did not return") };
        assert!(remaining > Duration::ZERO && remaining <= limit);
    }

    #[test]
    fn calls_on_several_threads_have_their_results_in_the_order_of_the_items() {
        let items: Vec<String> = (0..3 * MAX_PARALLEL_CALLS).map(|number| number.to_string()).collect();
        let work = |item: &String| if item == "7" { Err(Error::failed("no")) } else { Ok(item.clone()) };
        let limit = Duration::from_secs(60);
        let results = call_all("x", items.clone(), limit, limit, work);
        let values: Vec<_> =
            results.into_iter().map(|result| result.unwrap_or_else(|_| "7".into())).collect();
        assert_eq!(values, items);
    }
}
