//! A limit for things that a guest or a process can cause as often as it likes, such as lines of the log.

use std::time::{Duration, Instant};

/// Admits a number of things at once, and then one after each interval.
#[derive(Debug)]
pub struct RateLimit {
    interval: Duration,
    /// The time that the admitted things may be ahead of the clock.
    ahead: Duration,
    /// The time by which the admitted things are paid for.
    paid_until: Option<Instant>,
}

/// The default is for lines of the log: 20 at once, and then one a second.
impl Default for RateLimit {
    fn default() -> Self {
        RateLimit::new(20, Duration::from_secs(1))
    }
}

impl RateLimit {
    /// Admits `at_once` things at once, and then one after each interval.
    pub fn new(at_once: u32, interval: Duration) -> Self {
        RateLimit { interval, ahead: interval.saturating_mul(at_once.saturating_sub(1)), paid_until: None }
    }

    /// Reports whether one more is admitted now, and counts it then.
    pub fn admits(&mut self) -> bool {
        self.admits_at(Instant::now())
    }

    fn admits_at(&mut self, now: Instant) -> bool {
        let paid_until = self.paid_until.map_or(now, |until| until.max(now));
        let admits = paid_until.duration_since(now) <= self.ahead;
        if admits {
            self.paid_until = Some(paid_until + self.interval);
        }
        admits
    }
}

/// Lines of the log, of which too many are left out and counted.
#[derive(Debug, Default)]
pub struct LogLimit {
    rate: RateLimit,
    suppressed: u64,
}

impl LogLimit {
    /// Returns the number of lines that were left out before this one, if this one may be logged.
    pub fn admit(&mut self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&mut self, now: Instant) -> Option<u64> {
        if self.rate.admits_at(now) {
            return Some(self.take_suppressed());
        }
        self.suppressed += 1;
        None
    }

    /// Returns the number of lines that were left out since the last one, and forgets it.
    pub fn take_suppressed(&mut self) -> u64 {
        std::mem::take(&mut self.suppressed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_is_admitted_and_then_one_in_each_interval() {
        let (mut limit, begun) = (RateLimit::default(), Instant::now());
        let mut count = |millis| {
            let now = begun + Duration::from_millis(millis);
            (0..1000).filter(|_| limit.admits_at(now)).count()
        };
        assert_eq!([count(0), count(999), count(1000), count(3500)], [20, 0, 1, 2]);
        assert_eq!(count(100_000), 20);
    }

    #[test]
    fn flood_of_lines_logs_few_a_minute_and_counts_the_others() {
        let (mut limit, begun) = (LogLimit::default(), Instant::now());
        // 19,000 a second, as a guest has made QEMU print them.
        let admitted = (0..60_000)
            .flat_map(|millis| [millis; 19])
            .filter_map(|millis| limit.admit_at(begun + Duration::from_millis(millis)));
        let admitted: Vec<u64> = admitted.collect();
        // Each of them may have a second line about those left out.
        assert_eq!(admitted.len(), 20 + 59);
        assert_eq!(admitted.iter().sum::<u64>() + limit.take_suppressed(), 60_000 * 19 - 79);
    }
}
