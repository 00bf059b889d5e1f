//! Waits for what no event reports, such as a file that disappears, or a port that closes.

use std::thread;
use std::time::{Duration, Instant};

/// The limit of a wait, on a loaded computer.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The time between two looks.
const INTERVAL: Duration = Duration::from_millis(10);

/// Waits until the condition holds.
///
/// # Panics
/// With `failure`, if it does not hold in time.
#[track_caller]
pub fn wait_until(failure: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < TIMEOUT, "after {TIMEOUT:?}: {failure}");
        thread::sleep(INTERVAL);
    }
}
