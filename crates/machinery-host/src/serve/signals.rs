//! The signals that a host reacts to.

use machinery::{Error, Result};
use nix::sys::signal::SigHandler;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::actions::Ending;

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

impl Asked {
    /// Returns the consequence for the machines.
    pub fn ending(self) -> Ending {
        if self == Asked::Stop { Ending::Stop } else { Ending::HandOver }
    }

    /// Returns the request after a further one, while the host ends; none if the host has to end at once. A stop replaces
    /// a request that leaves machines running.
    pub fn followed_by(self, next: Asked) -> Option<Asked> {
        match (self, next) {
            (_, Asked::Replace) => Some(self),
            (Asked::HandOver | Asked::Replace, Asked::Stop) => Some(Asked::Stop),
            _ => None,
        }
    }
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

/// Ignores SIGUSR2, which otherwise ends a process that does not listen to it yet: this one, or the program that it executes
/// next.
pub fn ignore_replacement() {
    // SAFETY: no handler is installed, so no code runs in a signal's context.
    let ignored = unsafe { nix::sys::signal::signal(nix::sys::signal::SIGUSR2, SigHandler::SigIgn) };
    if let Err(error) = ignored {
        tracing::debug!(%error, "SIGUSR2 is not ignored");
    }
}

/// Listens to a signal.
///
/// # Errors
/// The kernel refuses.
pub fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|error| Error::environment(format!("cannot listen to signals: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_replaces_a_hand_over_and_a_second_stop_ends_at_once() {
        assert_eq!(Asked::Replace.followed_by(Asked::Replace), Some(Asked::Replace));
        assert_eq!(Asked::Replace.followed_by(Asked::Stop), Some(Asked::Stop));
        assert_eq!(Asked::HandOver.followed_by(Asked::Stop), Some(Asked::Stop));
        assert_eq!(Asked::Stop.followed_by(Asked::Replace), Some(Asked::Stop));
        assert_eq!(Asked::Stop.followed_by(Asked::Stop), None);
        assert_eq!(Asked::HandOver.followed_by(Asked::HandOver), None);
    }
}
