//! Calls into a plugin while the host does not serve yet, or not at all: each on a thread of its own, and
//! given up when it takes too long. Those of a host that serves go through [`call`](crate::actions::call).

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

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
    let (answer, answered) = sync_channel(1);
    let at = what.to_owned();
    let begun = thread::Builder::new().name("plugin".to_owned()).spawn(move || {
        let _call = exit::Call::begin(&at);
        // Whoever asked may have given up.
        let _ = answer.send(work());
    });
    begun.map_err(|error| Error::environment(format!("cannot start a thread: {error}")))?;
    answered.recv_timeout(limit).map_err(|error| match error {
        RecvTimeoutError::Timeout => not_back(what, limit),
        RecvTimeoutError::Disconnected => Error::failed(format!("{what}: the host panicked")),
    })
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
