//! The signals that a host reacts to.

use machinery::{Error, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The request in a signal, or of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// To end with all of its machines.
    Stop,
    /// To end, and to leave its machines to the next host.
    HandOver,
    /// To execute its program again, which adopts its machines.
    Replace,
}

/// The signals that end the host.
pub struct EndSignals {
    terminate: Signal,
    interrupt: Signal,
    replace: Signal,
    hands_over: bool,
}

impl EndSignals {
    /// Listens to the signals. `hands_over` is about SIGTERM.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn new(hands_over: bool) -> Result<Self> {
        Ok(EndSignals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            replace: listen(SignalKind::user_defined2())?,
            hands_over,
        })
    }

    /// Waits for the next of these signals.
    pub async fn received(&mut self) -> Asked {
        let (signal, asked) = tokio::select! {
            _ = self.terminate.recv() => ("SIGTERM", if self.hands_over { Asked::HandOver } else { Asked::Stop }),
            _ = self.interrupt.recv() => ("SIGINT", Asked::Stop),
            _ = self.replace.recv() => ("SIGUSR2", Asked::Replace),
        };
        match asked {
            Asked::Stop => tracing::info!(signal, "asked to end: machines are stopped"),
            Asked::HandOver | Asked::Replace => tracing::info!(signal, "machines are left to the next host"),
        }
        asked
    }
}

/// Listens to a signal.
///
/// # Errors
/// The kernel refuses.
pub fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|error| Error::environment(format!("cannot listen to signals: {error}")))
}
