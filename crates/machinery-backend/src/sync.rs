//! Locks and waits.
//!
//! A panic during a lock poisons it. Each statement of this workspace that holds a lock leaves the guarded value
//! whole, so poison means nothing and is ignored.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use machinery::Deadline;

/// Locks the value, also after a panic of another thread.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits while `condition` is true, at most until the deadline. The caller looks at the value to learn which of the
/// two has ended the wait.
pub fn wait_while<'a, T>(
    changed: &Condvar,
    guard: MutexGuard<'a, T>,
    deadline: Deadline,
    condition: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    let waited = changed.wait_timeout_while(guard, deadline.remaining(), condition);
    waited.unwrap_or_else(PoisonError::into_inner).0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn wait_ends_when_the_value_changes() {
        let shared = Arc::new((Mutex::new(0), Condvar::new()));
        let other = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            *lock(&other.0) = 1;
            other.1.notify_all();
        });
        let deadline = Deadline::after(Duration::from_secs(60));
        assert_eq!(*wait_while(&shared.1, lock(&shared.0), deadline, |value| *value == 0), 1);
        thread.join().unwrap();
    }

    #[test]
    fn wait_ends_when_the_deadline_passes() {
        let (value, changed) = (Mutex::new(0), Condvar::new());
        let deadline = Deadline::after(Duration::from_millis(5));
        assert_eq!(*wait_while(&changed, lock(&value), deadline, |value| *value == 0), 0);
        assert!(deadline.passed());
    }

    #[test]
    fn lock_works_when_another_thread_has_panicked_with_it() {
        let value = Arc::new(Mutex::new(1));
        let other = Arc::clone(&value);
        let panicked = thread::spawn(move || {
            let _guard = other.lock().unwrap();
            panic!("on purpose");
        });
        assert!(panicked.join().is_err());
        assert_eq!(*lock(&value), 1);
    }
}
