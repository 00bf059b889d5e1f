//! QEMU's events, and the waits for them.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use machinery::{Deadline, Error, Result};
use serde_json::Value;

/// An event of QEMU.
#[derive(Debug, Clone)]
pub struct Event {
    pub name: String,
    pub data: Value,
}

/// Waits for the first event for which `pick` returns a value. `what` names the event in errors.
///
/// # Errors
/// QEMU ends, or the deadline passes.
pub fn wait<T>(
    events: &Receiver<Event>,
    deadline: Deadline,
    what: &str,
    pick: impl Fn(&Event) -> Option<T>,
) -> Result<T> {
    wait_with_progress(events, deadline, what, || (), pick)
}

/// The interval of progress reports.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// Waits like [`wait`], and calls `report` at intervals.
///
/// # Errors
/// As [`wait`].
pub fn wait_with_progress<T>(
    events: &Receiver<Event>,
    deadline: Deadline,
    what: &str,
    report: impl Fn(),
    pick: impl Fn(&Event) -> Option<T>,
) -> Result<T> {
    loop {
        match events.recv_timeout(PROGRESS_INTERVAL.min(deadline.remaining())) {
            Ok(event) => {
                if let Some(picked) = pick(&event) {
                    return Ok(picked);
                }
            }
            Err(RecvTimeoutError::Timeout) if deadline.remaining().is_zero() => {
                return Err(deadline.timeout(what));
            }
            Err(RecvTimeoutError::Timeout) => report(),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::failed(format!("QEMU ended while waiting for {what}")));
            }
        }
    }
}
