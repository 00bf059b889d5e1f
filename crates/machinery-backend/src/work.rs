//! The work of one machine: the operation under way and the data, under one lock.
//!
//! ```text
//!          ┌── begin(Starting) ───▶ starting ───┐
//!          ├── begin(Stopping) ───▶ stopping ───┤
//!   idle ──┼── begin(Preparing) ──▶ preparing ──┼── the value of `begin` is dropped ──▶ idle
//!          └── begin(Discarding) ─▶ discarding ─┘
//! ```
//!
//! One operation at a time is under way. A preparation and the end of a standby are *hidden*: the host regards the machine
//! as powered off. Another action waits for hidden work instead of being refused, and usually cancels a preparation
//! first. The data, such as the run and the standby, is the author's; the lock is held to look and to change, and never
//! while waiting, so that `state` returns at any time.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use machinery::{Deadline, Error, Result};

use crate::sync::{lock, wait_while};

/// An operation on a machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Operation {
    /// Nothing is under way.
    #[default]
    Idle,
    /// A start.
    Starting,
    /// The end of a run.
    Stopping,
    /// A preparation of the next restore.
    Preparing,
    /// The end of a standby.
    Discarding,
}

impl Operation {
    /// Reports whether the host regards the machine as powered off meanwhile.
    pub fn is_hidden(self) -> bool {
        matches!(self, Operation::Preparing | Operation::Discarding)
    }
}

/// The work of one machine: the operation under way and the data.
#[derive(Debug, Default)]
pub struct Work<T> {
    state: Mutex<WorkState<T>>,
    /// Wakes the threads that wait for a change.
    changed: Condvar,
}

/// The operation under way and the data of a machine. It derefs to the data.
#[derive(Debug, Default)]
pub struct WorkState<T> {
    operation: Operation,
    cancellation: Cancellation,
    data: T,
}

impl<T> WorkState<T> {
    /// Returns the operation under way.
    pub fn operation(&self) -> Operation {
        self.operation
    }
}

impl<T> Deref for WorkState<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.data
    }
}

impl<T> DerefMut for WorkState<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.data
    }
}

impl<T> Work<T> {
    /// Creates the work of a machine that is idle.
    pub fn new(data: T) -> Arc<Self> {
        let state = WorkState { operation: Operation::Idle, cancellation: Cancellation::default(), data };
        Arc::new(Work { state: Mutex::new(state), changed: Condvar::new() })
    }

    /// Locks the operation and the data. Call [`notify`](Work::notify) after a change that others wait for.
    pub fn lock(&self) -> MutexGuard<'_, WorkState<T>> {
        lock(&self.state)
    }

    /// Locks the operation and the data as soon as no operation is under way. The thread that handles the end of a run
    /// calls it: the operation under way decides first about the run.
    pub fn lock_when_idle(&self) -> MutexGuard<'_, WorkState<T>> {
        let busy = |state: &mut WorkState<T>| state.operation != Operation::Idle;
        self.changed.wait_while(self.lock(), busy).unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the threads that wait for a change.
    pub fn notify(&self) {
        self.changed.notify_all();
    }

    /// Waits while `condition` is true, at most until the deadline.
    pub fn wait_while(
        &self,
        deadline: Deadline,
        condition: impl Fn(&WorkState<T>) -> bool,
    ) -> MutexGuard<'_, WorkState<T>> {
        wait_while(&self.changed, self.lock(), deadline, |state| condition(state))
    }

    /// Begins an operation after the hidden work that is under way. `enter` looks at the data under the same lock: it
    /// refuses the operation, or takes what the operation needs. The operation ends when the returned value is dropped.
    ///
    /// # Errors
    /// The hidden work does not end in time; another operation is under way; `enter` refuses.
    pub fn begin<V>(
        self: &Arc<Self>,
        operation: Operation,
        deadline: Deadline,
        enter: impl FnOnce(&mut T) -> Result<V>,
    ) -> Result<(UnderWay<T>, V)> {
        let mut state = self.wait_while(deadline, |state| state.operation.is_hidden());
        if state.operation.is_hidden() {
            return Err(deadline.timeout("the preparation or the standby to end"));
        }
        if state.operation != Operation::Idle {
            return Err(Error::unexpected_state("another action on the machine is under way"));
        }
        let entered = enter(&mut state.data)?;
        state.operation = operation;
        state.cancellation = Cancellation::default();
        let under_way = UnderWay { work: Arc::clone(self), cancellation: state.cancellation.clone() };
        Ok((under_way, entered))
    }

    /// Cancels the preparation, if one is under way; returns whether there was one. It does not wait for the end of the
    /// preparation: the next [`begin`](Work::begin) does.
    pub fn cancel_preparation(&self) -> bool {
        let state = self.lock();
        let cancellation = (state.operation == Operation::Preparing).then(|| state.cancellation.clone());
        // The end of a process or a domain may need the lock.
        drop(state);
        cancellation.inspect(Cancellation::cancel).is_some()
    }
}

/// An operation that is under way until this value is dropped.
#[derive(Debug)]
pub struct UnderWay<T> {
    work: Arc<Work<T>>,
    cancellation: Cancellation,
}

impl<T> UnderWay<T> {
    /// Locks the operation and the data.
    pub fn lock(&self) -> MutexGuard<'_, WorkState<T>> {
        self.work.lock()
    }

    /// Continues as another operation: a stop that finds only a standby discards it.
    pub fn continue_as(&mut self, operation: Operation) {
        self.lock().operation = operation;
        self.work.notify();
    }

    /// Returns the cancellation of this operation.
    pub fn cancellation(&self) -> &Cancellation {
        &self.cancellation
    }

    /// Changes the data, unless the operation was cancelled: a cancellation before this refuses it, and a later one finds
    /// the change.
    ///
    /// # Errors
    /// The operation was cancelled. The data is unchanged.
    pub fn commit(&self, change: impl FnOnce(&mut T)) -> Result<()> {
        let mut state = self.lock();
        self.cancellation.ensure_wanted()?;
        change(&mut state.data);
        Ok(())
    }
}

impl<T> Drop for UnderWay<T> {
    fn drop(&mut self) {
        self.lock().operation = Operation::Idle;
        self.work.notify();
    }
}

/// The cancellation of an operation.
#[derive(Clone, Default)]
pub struct Cancellation(Arc<CancelState>);

#[derive(Default)]
struct CancelState {
    cancelled: AtomicBool,
    /// Ends what the operation waits for.
    end: Mutex<Option<Box<dyn Fn() + Send>>>,
}

impl Cancellation {
    /// Cancels the operation, and ends what it waits for.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
        if let Some(end) = &*lock(&self.0.end) {
            end();
        }
    }

    /// Sets the function that ends what the operation waits for from now on, such as a process that loads. It runs at
    /// once if the operation is cancelled already.
    pub fn on_cancel(&self, end: impl Fn() + Send + 'static) {
        let mut slot = lock(&self.0.end);
        if self.is_cancelled() {
            end();
        }
        *slot = Some(Box::new(end));
    }

    /// Reports whether the operation is cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Expects that the operation is not cancelled.
    ///
    /// # Errors
    /// It is: [`ErrorKind::Interrupted`](machinery::ErrorKind::Interrupted).
    pub fn ensure_wanted(&self) -> Result<()> {
        if self.is_cancelled() { Err(Cancellation::error()) } else { Ok(()) }
    }

    /// The error of a preparation that was cancelled.
    pub fn error() -> Error {
        Error::interrupted("the preparation was cancelled by another action on the machine")
    }
}

impl fmt::Debug for Cancellation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cancellation").field("cancelled", &self.is_cancelled()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery::ErrorKind;
    use std::thread;
    use std::time::Duration;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(60))
    }

    #[test]
    fn second_operation_is_refused_while_one_is_under_way() {
        let work = Work::new(1);
        let (starting, ()) = work.begin(Operation::Starting, soon(), |_| Ok(())).unwrap();
        let refused = work.begin(Operation::Stopping, soon(), |_| Ok(())).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::UnexpectedState);
        drop(starting);
        assert_eq!(work.lock().operation(), Operation::Idle);
    }

    #[test]
    fn operation_is_not_under_way_when_it_is_refused() {
        let work = Work::new(1);
        let refused = work.begin(Operation::Starting, soon(), |_| Err::<(), _>(Error::failed("no")));
        assert_eq!(refused.unwrap_err().to_string(), "no");
        assert_eq!(work.lock().operation(), Operation::Idle);
    }

    #[test]
    fn start_waits_for_a_cancelled_preparation() {
        let work = Work::new(0);
        let (preparing, ()) = work.begin(Operation::Preparing, soon(), |_| Ok(())).unwrap();
        let (ended, end) = std::sync::mpsc::channel();
        preparing.cancellation().on_cancel(move || ended.send(()).unwrap());
        let preparation = thread::spawn(move || {
            end.recv().unwrap();
            preparing.commit(|data| *data = 1).unwrap_err()
        });
        assert!(work.cancel_preparation());
        let (_starting, data) = work.begin(Operation::Starting, soon(), |data| Ok(*data)).unwrap();
        assert_eq!(data, 0, "a cancelled preparation changes nothing");
        assert_eq!(preparation.join().unwrap().kind(), ErrorKind::Interrupted);
        assert!(!work.cancel_preparation(), "a start is no preparation");
    }

    #[test]
    fn action_times_out_when_a_preparation_does_not_end() {
        let work = Work::new(0);
        let (_preparing, ()) = work.begin(Operation::Preparing, soon(), |_| Ok(())).unwrap();
        let late = Deadline::after(Duration::from_millis(5));
        let error = work.begin(Operation::Stopping, late, |_| Ok(())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
    }

    #[test]
    fn end_of_a_run_is_handled_when_the_operation_under_way_has_ended() {
        let work = Work::new(0);
        let (starting, ()) = work.begin(Operation::Starting, soon(), |_| Ok(())).unwrap();
        let other = Arc::clone(&work);
        let end = thread::spawn(move || **other.lock_when_idle());
        starting.commit(|data| *data = 1).unwrap();
        drop(starting);
        assert_eq!(end.join().unwrap(), 1);
    }

    #[test]
    fn end_runs_at_once_when_the_operation_is_cancelled_already() {
        let cancellation = Cancellation::default();
        cancellation.cancel();
        let (ended, end) = std::sync::mpsc::channel();
        cancellation.on_cancel(move || ended.send(()).unwrap());
        end.recv().unwrap();
    }
}
