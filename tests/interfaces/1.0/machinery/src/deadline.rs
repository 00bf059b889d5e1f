//! The time a call may take.

use std::time::{Duration, Instant};

use crate::{Error, Result};

/// The moment by which a call has to return. A call that cannot make it returns
/// [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) rather than coming late.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    /// A deadline that ends `limit` from now.
    pub fn after(limit: Duration) -> Self {
        // A limit beyond what the clock can tell (centuries) is as good as a day.
        let now = Instant::now();
        let at = now.checked_add(limit).unwrap_or(now + Duration::from_secs(86_400));
        Deadline { at, limit }
    }

    /// What is left of it; zero once it has passed.
    pub fn remaining(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Whether it has passed.
    pub fn passed(self) -> bool {
        self.remaining().is_zero()
    }

    /// How long it was when it was set.
    pub fn limit(self) -> Duration {
        self.limit
    }

    /// The sooner of this deadline and one that ends `limit` from now: for a step that gets a share
    /// of the whole.
    pub fn within(self, limit: Duration) -> Deadline {
        if self.remaining() <= limit { self } else { Deadline::after(limit) }
    }

    /// The error for a call that did not make it; `waiting_for` says what did not happen.
    pub fn timeout(self, waiting_for: &str) -> Error {
        Error::timeout(format!("waited {} for {waiting_for}", seconds(self.limit)))
    }

    /// An error once the deadline has passed; `waiting_for` says what did not happen.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) when the deadline has passed.
    pub fn check(self, waiting_for: &str) -> Result<()> {
        if self.passed() { Err(self.timeout(waiting_for)) } else { Ok(()) }
    }
}

fn seconds(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds >= 10.0 { format!("{seconds:.0} s") } else { format!("{seconds:.1} s") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn a_step_never_gets_more_than_the_whole() {
        let whole = Deadline::after(Duration::from_secs(1));
        assert!(whole.within(Duration::from_secs(60)).remaining() <= Duration::from_secs(1));
        assert!(whole.within(Duration::ZERO).passed());
    }

    #[test]
    fn a_passed_deadline_is_a_timeout() {
        let error = Deadline::after(Duration::ZERO).check("the guest to run").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        assert!(error.to_string().contains("the guest to run"), "{error}");
        assert!(Deadline::after(Duration::MAX).check("anything").is_ok());
    }
}
