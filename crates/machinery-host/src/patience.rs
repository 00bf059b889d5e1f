//! Calls into a plugin while the host does not serve yet, or not at all: each on a thread of its own, and
//! given up when it takes too long. Those of a host that serves go through [`call`](crate::actions::call).
//!
//! A library whose initialiser does not return keeps the dynamic linker locked, and every thread that makes
//! its first thread-local with a destructor waits for that lock. So whoever waits here uses none, which rules
//! out the channels of `std`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use machinery::host::panic_message;
use machinery::{Error, Result};

use crate::exit;

/// Gives what `work` gives, if it does so within that time. Else it goes on, and nobody listens.
///
/// # Errors
/// It has not come back.
pub fn within<T, F>(limit: Duration, what: &str, work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let answer = Arc::new((Mutex::new(None), Condvar::new()));
    let (at, answered) = (what.to_owned(), Arc::clone(&answer));
    let begun = thread::Builder::new().name("plugin".to_owned()).spawn(move || {
        let _call = exit::Call::begin(&at);
        let given = catch_unwind(AssertUnwindSafe(work));
        *answered.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(given);
        answered.1.notify_all();
    });
    begun.map_err(|error| Error::environment(format!("cannot start a thread: {error}")))?;
    let given = answer.0.lock().unwrap_or_else(PoisonError::into_inner);
    let waited = answer.1.wait_timeout_while(given, limit, |given| given.is_none());
    match waited.unwrap_or_else(PoisonError::into_inner).0.take() {
        Some(Ok(given)) => Ok(given),
        Some(Err(panic)) => {
            Err(Error::failed(format!("{what}: the host panicked: {}", panic_message(panic))))
        }
        None => Err(not_back(what, limit)),
    }
}

/// The error for a call that was given up.
pub fn not_back(what: &str, limit: Duration) -> Error {
    Error::misbehaved(format!("{what}: the plugin did not come back within {limit:?}")).advice(
        "Look at its lines in the log for what it waits for; how long it may take is `timeouts` in machinery-host.yaml",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery::ErrorKind;

    #[test]
    fn who_does_not_come_back_is_not_waited_for() {
        assert_eq!(within(Duration::from_secs(60), "adding", || 1 + 1).unwrap(), 2);
        let error = within(Duration::from_millis(10), "parking", thread::park).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PluginMisbehaved);
        assert!(
            error.to_string().starts_with("parking: the plugin did not come back within 10ms"),
            "{error}"
        );
    }
}
