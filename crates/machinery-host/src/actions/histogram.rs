//! A histogram of durations, from which operators read medians and the slowest in a hundred.
//!
//! Its buckets are the same for all actions, so that sums over machineries and hosts are right.

use std::time::Duration;

/// The upper bounds of the buckets, in seconds. A standby is restored in a millisecond, and a large snapshot in minutes.
/// The last bucket has no bound.
pub const BOUNDS: [f64; 22] = [
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0,
    50.0, 100.0, 200.0, 500.0, 1000.0,
];

/// A histogram of durations.
#[derive(Debug, Clone, Copy, Default)]
pub struct Histogram {
    counts: [u64; BOUNDS.len() + 1],
    /// The sum of all durations.
    pub total: Duration,
    /// The longest duration.
    pub max: Duration,
}

impl Histogram {
    /// Adds a duration.
    pub fn add(&mut self, took: Duration) {
        let bucket = BOUNDS.iter().position(|bound| took.as_secs_f64() <= *bound);
        self.counts[bucket.unwrap_or(BOUNDS.len())] += 1;
        self.total = self.total.saturating_add(took);
        self.max = self.max.max(took);
    }

    /// Returns the number of durations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Returns the buckets, each with its upper bound in seconds and its own count.
    pub fn buckets(&self) -> [(f64, u64); BOUNDS.len() + 1] {
        std::array::from_fn(|index| (upper_bound(index), self.counts[index]))
    }

    /// Returns the duration that this fraction of all durations does not exceed. It lies between the bounds of one bucket,
    /// as in Prometheus' `histogram_quantile`, and is never longer than the longest duration.
    pub fn quantile(&self, fraction: f64) -> Duration {
        let rank = fraction * self.count() as f64;
        let mut below = 0;
        for (index, count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            if (below + count) as f64 >= rank {
                let lower = index.checked_sub(1).map_or(0.0, upper_bound);
                let upper = upper_bound(index).min(self.max.as_secs_f64());
                let seconds = lower + (upper - lower) * (rank - below as f64) / *count as f64;
                return Duration::try_from_secs_f64(seconds)
                    .map_or(self.max, |quantile| quantile.min(self.max));
            }
            below += count;
        }
        self.max
    }
}

fn upper_bound(bucket: usize) -> f64 {
    BOUNDS.get(bucket).copied().unwrap_or(f64::INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(durations: impl IntoIterator<Item = u64>) -> Histogram {
        let mut histogram = Histogram::default();
        durations.into_iter().for_each(|took| histogram.add(Duration::from_millis(took)));
        histogram
    }

    #[test]
    fn duration_is_in_the_bucket_whose_bound_it_does_not_exceed() {
        let histogram = histogram([1, 2, 3, 2_000_000]);
        let filled = histogram.buckets().into_iter().filter(|(_, count)| *count > 0);
        assert_eq!(filled.collect::<Vec<_>>(), [(0.001, 1), (0.002, 1), (0.005, 1), (f64::INFINITY, 1)]);
        assert_eq!((histogram.count(), histogram.max), (4, Duration::from_secs(2000)));
    }

    #[test]
    fn quantile_is_within_the_bucket_of_its_rank() {
        let histogram = histogram((0..98).map(|_| 15).chain([300, 400]));
        let (median, slow) = (histogram.quantile(0.5), histogram.quantile(0.99));
        assert!(median > Duration::from_millis(10) && median <= Duration::from_millis(20), "{median:?}");
        assert!(slow > Duration::from_millis(200) && slow <= Duration::from_millis(400), "{slow:?}");
        assert_eq!(histogram.quantile(1.0), Duration::from_millis(400));
    }

    #[test]
    fn quantile_is_no_longer_than_the_longest_duration() {
        assert_eq!(histogram([]).quantile(0.5), Duration::ZERO);
        assert!(histogram([6]).quantile(0.99) <= Duration::from_millis(6));
        let beyond = histogram([3_000_000]).quantile(0.99);
        assert!(beyond > Duration::from_secs(1000) && beyond <= Duration::from_secs(3000), "{beyond:?}");
        let mut endless = Histogram::default();
        endless.add(Duration::MAX);
        assert!(endless.quantile(0.5) <= Duration::MAX);
    }
}
