//! Calls that come back in time.
//!
//! A call into libvirt blocks until libvirtd answers, and nothing ends it early. So it runs in a
//! thread of its own, and whoever waits for it stops waiting at the deadline. The thread goes on until
//! libvirt lets it go: at the latest when keepalive finds the connection dead.

use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use machinery::{Deadline, Error, Result};

/// A call under way.
pub struct Call<T> {
    outcome: Receiver<Result<T>>,
}

impl<T: Send + 'static> Call<T> {
    /// Starts it.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<Self> {
        let (answer, outcome) = sync_channel(1);
        let run = move || {
            // Nobody may be waiting any more.
            let _ = answer.send(work());
        };
        thread::Builder::new()
            .name("libvirt-call".to_owned())
            .spawn(run)
            .map_err(|error| Error::environment(format!("cannot start a thread for libvirt: {error}")))?;
        Ok(Call { outcome })
    }

    /// Waits for its end, for that long at most; `None` if it goes on.
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

/// Calls and waits until the deadline; `waiting_for` says for what. A call that comes late is left
/// alone, so it must be one whose outcome does not matter then.
///
/// # Errors
/// The call's own; [`ErrorKind::Timeout`](machinery::ErrorKind::Timeout).
pub fn within<T: Send + 'static>(
    deadline: Deadline,
    waiting_for: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    deadline.check(waiting_for)?;
    let call = Call::start(work)?;
    call.wait(deadline.remaining()).unwrap_or_else(|| Err(deadline.timeout(waiting_for)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery::ErrorKind;
    use std::sync::mpsc::channel;

    #[test]
    fn a_call_that_comes_late_is_not_waited_for() {
        let (go, gone) = channel::<()>();
        let late = within(Deadline::after(Duration::from_millis(5)), "nothing", move || {
            let _ = gone.recv();
            Ok(())
        });
        assert_eq!(late.unwrap_err().kind(), ErrorKind::Timeout);
        drop(go);
        assert_eq!(within(Deadline::after(Duration::from_secs(10)), "it", || Ok(7)), Ok(7));
    }

    #[test]
    fn a_deadline_that_has_passed_starts_nothing() {
        let error =
            within(Deadline::after(Duration::ZERO), "it", || -> Result<()> { panic!("it was started") });
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Timeout);
    }

    #[test]
    fn a_call_that_panics_is_an_error() {
        let error =
            within(Deadline::after(Duration::from_secs(10)), "it", || -> Result<()> { panic!("as wanted") });
        assert_eq!(error.unwrap_err().kind(), ErrorKind::PluginMisbehaved);
    }
}
