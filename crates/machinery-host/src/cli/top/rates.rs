//! The counts and durations of actions from the host's `metrics`, and the actions of the last minute.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The period of a rate.
const MINUTE: Duration = Duration::from_secs(60);

/// The machinery, the action and the mode of a restore.
type Key = [String; 3];

/// An action of a machinery, and its figures since the start of the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Figures {
    /// The machinery, the action and the mode of a restore.
    pub key: Key,
    /// The number of actions.
    pub count: u64,
    /// The number of failures.
    pub failed: u64,
    /// The median, the 99th percentile and the longest duration, in milliseconds.
    pub times: [f64; 3],
}

/// The latest figures, and the counts of the last minute.
#[derive(Debug, Default)]
pub struct Rates {
    figures: Vec<Figures>,
    /// The counts, the oldest first. The first one is at least a minute old, if there is one.
    counts: VecDeque<(Instant, HashMap<Key, u64>)>,
}

impl Rates {
    /// Takes the host's answer to `metrics`. Returns whether there are new failures.
    pub fn update(&mut self, answer: &Value, at: Instant) -> bool {
        let actions =
            answer["metrics"].as_array().into_iter().flatten().filter(|entry| entry["step"].is_null());
        let figures: Vec<Figures> = actions.map(figures).collect();
        let failed = |figures: &[Figures]| figures.iter().map(|figures| figures.failed).sum::<u64>();
        let has_failures = failed(&figures) > failed(&self.figures);
        let counts = figures.iter().map(|figures| (figures.key.clone(), figures.count)).collect();
        self.figures = figures;
        self.counts.push_back((at, counts));
        while self.counts.get(1).is_some_and(|(since, _)| at.saturating_duration_since(*since) >= MINUTE) {
            self.counts.pop_front();
        }
        has_failures
    }

    /// Forgets the counts of another host.
    pub fn clear(&mut self) {
        *self = Rates::default();
    }

    /// Returns the figures of each action with the number in the last minute, the most frequent first. Before a minute
    /// has passed, the number is since the first update.
    pub fn last_minute(&self, at: Instant) -> Vec<(&Figures, u64)> {
        let is_before = |(since, _): &&(Instant, _)| at.saturating_duration_since(*since) >= MINUTE;
        let base = self.counts.iter().rev().find(is_before).or(self.counts.front());
        let before = |key: &Key| base.and_then(|(_, counts)| counts.get(key)).copied().unwrap_or(0);
        let figures = self.figures.iter();
        let mut all: Vec<_> =
            figures.map(|figures| (figures, figures.count.saturating_sub(before(&figures.key)))).collect();
        all.sort_by_key(|(figures, recent)| std::cmp::Reverse((*recent, figures.count)));
        all
    }
}

fn figures(entry: &Value) -> Figures {
    let number = |key: &str| entry[key].as_u64().unwrap_or(0);
    Figures {
        key: ["machinery", "action", "mode"].map(|key| entry[key].as_str().unwrap_or("").to_owned()),
        count: number("count"),
        failed: number("failed"),
        times: ["p50_ms", "p99_ms", "max_ms"].map(|key| entry[key].as_f64().unwrap_or(0.0)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn answer(stops: u64, restores: u64, failed: u64) -> Value {
        let entry = |action: &str, step: Option<&str>, count: u64| {
            json!({"machinery": "qemu", "action": action, "mode": null, "step": step, "count": count, "failed": failed,
                "p50_ms": 1.5, "p99_ms": 7.0, "max_ms": 9.0})
        };
        json!({"metrics": [entry("stop", None, stops), entry("stop", Some("quit"), 99), entry("restore_start", None, restores)]})
    }

    #[test]
    fn actions_of_the_last_minute_are_counted_and_the_most_frequent_is_first() {
        let (mut rates, begin) = (Rates::default(), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        let recent = |rates: &Rates, at| {
            let all = rates.last_minute(at);
            all.iter().map(|(figures, recent)| (figures.key[1].clone(), *recent)).collect::<Vec<_>>()
        };
        rates.update(&answer(100, 50, 0), at(0));
        assert_eq!(recent(&rates, at(0)), [("stop".to_owned(), 0), ("restore_start".to_owned(), 0)]);
        rates.update(&answer(101, 53, 0), at(30));
        assert_eq!(recent(&rates, at(40)), [("restore_start".to_owned(), 3), ("stop".to_owned(), 1)]);
        rates.update(&answer(101, 54, 0), at(70));
        assert_eq!(recent(&rates, at(95))[0], ("restore_start".to_owned(), 1));
        assert_eq!(recent(&rates, at(200)), [("stop".to_owned(), 0), ("restore_start".to_owned(), 0)]);
        assert!(rates.counts.len() <= 3);
    }

    #[test]
    fn update_reports_new_failures_only() {
        let (mut rates, at) = (Rates::default(), Instant::now());
        assert!(!rates.update(&answer(1, 1, 0), at));
        assert!(rates.update(&answer(2, 1, 1), at));
        assert!(!rates.update(&answer(3, 1, 1), at));
        rates.clear();
        assert!(rates.last_minute(at).is_empty());
    }
}
