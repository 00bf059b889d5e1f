//! The deadline of a call.

use std::time::{Duration, Instant};

use crate::{Error, Result};

/// The time by which a call has to return. A call that cannot finish by then returns
/// [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) instead of returning late.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    /// Creates a deadline that passes `limit` from now.
    pub fn after(limit: Duration) -> Self {
        // The clock cannot represent a limit of centuries; one day is long enough.
        let now = Instant::now();
        let at = now.checked_add(limit).unwrap_or(now + Duration::from_secs(86_400));
        Deadline { at, limit }
    }

    /// Returns the remaining time; zero once the deadline has passed.
    pub fn remaining(self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Returns the remaining time, and one millisecond once the deadline has passed: for a function that refuses zero or
    /// takes it as for ever, such as [`set_read_timeout`](std::os::unix::net::UnixStream::set_read_timeout).
    pub fn left(self) -> Duration {
        self.remaining().max(Duration::from_millis(1))
    }

    /// Reports whether the deadline has passed.
    pub fn passed(self) -> bool {
        self.remaining().is_zero()
    }

    /// Returns the whole time that the deadline was created with.
    pub fn limit(self) -> Duration {
        self.limit
    }

    /// Returns the earlier of this deadline and one that passes `limit` from now, for a step with its own limit.
    pub fn within(self, limit: Duration) -> Deadline {
        if self.remaining() <= limit { self } else { Deadline::after(limit) }
    }

    /// Returns the timeout error of a call; `waiting_for` names the event that did not happen.
    pub fn timeout(self, waiting_for: &str) -> Error {
        Error::timeout(format!("waited {} for {waiting_for}", seconds(self.limit)))
    }

    /// Fails once the deadline has passed; `waiting_for` names the event that did not happen.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) if the deadline has passed.
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
    fn within_never_exceeds_the_whole_deadline() {
        let whole = Deadline::after(Duration::from_secs(1));
        assert!(whole.within(Duration::from_secs(60)).remaining() <= Duration::from_secs(1));
        assert!(whole.within(Duration::ZERO).passed());
    }

    #[test]
    fn left_is_never_zero() {
        assert_eq!(Deadline::after(Duration::ZERO).left(), Duration::from_millis(1));
        assert!(Deadline::after(Duration::from_secs(60)).left() > Duration::from_secs(1));
    }

    #[test]
    fn check_is_a_timeout_when_the_deadline_has_passed() {
        let error = Deadline::after(Duration::ZERO).check("the guest to run").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Timeout);
        assert!(error.to_string().contains("the guest to run"), "{error}");
        assert!(Deadline::after(Duration::MAX).check("anything").is_ok());
    }
}
