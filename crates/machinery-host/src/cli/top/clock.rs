//! The present time: of the day for ages, and steady for periods.

use std::time::Instant;

use crate::fleet::quarantine::unix_now;

/// A moment.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// The seconds since 1970.
    pub unix: u64,
    /// The same moment of a clock that nobody sets.
    pub instant: Instant,
}

impl Now {
    /// Returns the present moment.
    pub fn present() -> Self {
        Now { unix: unix_now(), instant: Instant::now() }
    }
}
