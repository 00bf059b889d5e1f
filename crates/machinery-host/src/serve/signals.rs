//! The signals to the host.
//!
//! ```text
//! execution ─▶ early: only recorded ─▶ serving: received ─▶ about to execute again: blocked ─▶ execution
//! ```
//!
//! While the host loads, it adopts guests. A signal that ended it there would leave them without a host, so it is
//! recorded, and obeyed once the host serves. A second signal ends the process at once. Signals stay blocked
//! and pending from one program to the next. Source: execve(2), signal(7).

use std::io::Read;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use machinery::{Error, Result};
use nix::sys::signal::{self as nix_signal, SigHandler, SigSet};
use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::low_level::pipe;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
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

    /// Returns the request after a further signal, while the host ends; none if the host has to end at once. A stop
    /// replaces a request that leaves machines running.
    pub fn followed_by(self, next: Asked) -> Option<Asked> {
        match (self, next) {
            (Asked::HandOver | Asked::Replace, Asked::Stop) => Some(Asked::Stop),
            (Asked::Replace, Asked::HandOver) => Some(Asked::HandOver),
            _ => None,
        }
    }
}

/// The signals to the host, before it serves.
pub struct EarlySignals {
    terminate: StdUnixStream,
    interrupt: StdUnixStream,
    hangup: StdUnixStream,
    /// End the process at a second signal.
    impatient: Vec<SigId>,
}

impl EarlySignals {
    /// Records the signals from now on, and those that were sent to an earlier program of this process. SIGUSR2, which
    /// would end the process, is ignored until the host serves.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn record() -> Result<Self> {
        let recorded = || -> std::io::Result<Self> {
            let mut impatient = Vec::new();
            for number in [SIGTERM, SIGINT] {
                let once = Arc::new(AtomicBool::new(false));
                impatient.push(flag::register_conditional_shutdown(number, 1, Arc::clone(&once))?);
                impatient.push(flag::register(number, once)?);
            }
            let (terminate, interrupt, hangup) = (recorder(SIGTERM)?, recorder(SIGINT)?, recorder(SIGHUP)?);
            ignore_replacement()?;
            all_signals().thread_unblock()?;
            Ok(EarlySignals { terminate, interrupt, hangup, impatient })
        };
        recorded().map_err(|error| no_signals(&error))
    }

    /// Returns all signals from the begin of the record on. Call it on a thread of the runtime.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn while_serving(self, hands_over: bool) -> Result<(EndSignals, Hangup)> {
        self.impatient.into_iter().for_each(|id| {
            signal_hook::low_level::unregister(id);
        });
        let stream = |recorded| UnixStream::from_std(recorded).map_err(|error| no_signals(&error));
        let (terminate, interrupt) = (stream(self.terminate)?, stream(self.interrupt)?);
        Ok((EndSignals { terminate, interrupt, hands_over }, Hangup(stream(self.hangup)?)))
    }
}

/// Returns a stream that gets a byte at each signal of that number.
fn recorder(number: i32) -> std::io::Result<StdUnixStream> {
    let (reader, writer) = StdUnixStream::pair()?;
    reader.set_nonblocking(true)?;
    pipe::register(number, writer)?;
    Ok(reader)
}

/// The signals that ask for a reload.
pub struct Hangup(UnixStream);

impl Hangup {
    /// Waits for the next one. Returns false if there is none any more.
    pub async fn received(&mut self) -> bool {
        self.0.read_u8().await.is_ok()
    }
}

/// The signals that end the host, while it serves.
pub struct EndSignals {
    terminate: UnixStream,
    interrupt: UnixStream,
    hands_over: bool,
}

impl EndSignals {
    /// Waits for the next of these signals.
    pub async fn next(&mut self) -> Asked {
        let by_terminate = self.by_terminate();
        let (signal, asked) = tokio::select! {
            _ = self.terminate.read_u8() => ("SIGTERM", by_terminate),
            _ = self.interrupt.read_u8() => ("SIGINT", Asked::Stop),
        };
        match asked {
            Asked::Stop => tracing::info!(signal, "asked to end: machines are stopped"),
            Asked::HandOver | Asked::Replace => {
                tracing::info!(signal, "asked to end: machines are left to the next host")
            }
        }
        asked
    }

    /// Returns the record of the signals that nobody waits for any more.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn into_late(self) -> Result<LateSignals> {
        let stream = |stream: UnixStream| stream.into_std().map_err(|error| no_signals(&error));
        Ok(LateSignals { terminate: stream(self.terminate)?, interrupt: stream(self.interrupt)? })
    }

    fn by_terminate(&self) -> Asked {
        if self.hands_over { Asked::HandOver } else { Asked::Stop }
    }
}

/// The signals that end the host, after it has served.
pub struct LateSignals {
    terminate: StdUnixStream,
    interrupt: StdUnixStream,
}

impl LateSignals {
    /// Leaves all later signals to the program that this process executes next. Sends it a stop if that was asked, or if a
    /// signal has come since the host has stopped to wait for them.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn leave_to_next_program(mut self, stop: bool) -> std::io::Result<()> {
        all_signals().thread_block()?;
        ignore_replacement()?;
        let mut byte = [0];
        let has_come =
            |stream: &mut StdUnixStream, byte: &mut [u8]| stream.read(byte).is_ok_and(|count| count > 0);
        // With `serve --handover`, SIGTERM is no stop.
        if stop || has_come(&mut self.interrupt, &mut byte) {
            nix_signal::raise(nix_signal::SIGINT)?;
        }
        if has_come(&mut self.terminate, &mut byte) {
            nix_signal::raise(nix_signal::SIGTERM)?;
        }
        Ok(())
    }
}

fn all_signals() -> SigSet {
    [nix_signal::SIGTERM, nix_signal::SIGINT, nix_signal::SIGHUP].into_iter().collect()
}

fn ignore_replacement() -> nix::Result<()> {
    // SAFETY: no handler is installed, so no code runs in a signal's context.
    unsafe { nix_signal::signal(nix_signal::SIGUSR2, SigHandler::SigIgn) }.map(drop)
}

/// Listens to a signal.
///
/// # Errors
/// The kernel refuses.
pub fn listen(kind: SignalKind) -> Result<Signal> {
    signal(kind).map_err(|error| no_signals(&error))
}

fn no_signals(error: &std::io::Error) -> Error {
    Error::environment(format!("cannot listen to signals: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_replaces_a_hand_over_and_a_second_stop_ends_at_once() {
        assert_eq!(Asked::Replace.followed_by(Asked::Stop), Some(Asked::Stop));
        assert_eq!(Asked::HandOver.followed_by(Asked::Stop), Some(Asked::Stop));
        assert_eq!(Asked::Replace.followed_by(Asked::HandOver), Some(Asked::HandOver));
        assert_eq!(Asked::Stop.followed_by(Asked::Stop), None);
        assert_eq!(Asked::HandOver.followed_by(Asked::HandOver), None);
    }
}
