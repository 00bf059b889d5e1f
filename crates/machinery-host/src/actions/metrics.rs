//! Counts and durations of actions and their steps, since the start of the host.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

/// The number of entries that are counted, at most. A plugin may invent names of steps without end.
const MAX_ENTRIES: usize = 1000;

/// The counts of all machineries.
#[derive(Debug, Default)]
pub struct Metrics {
    tallies: Mutex<BTreeMap<Key, Tally>>,
    tries: AtomicU64,
    healed: AtomicU64,
}

/// The actions or steps that one entry counts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    machinery: String,
    action: &'static str,
    /// The plugin's name for one of the action's steps. `None` is the whole action.
    step: Option<String>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    count: u64,
    failed: u64,
    total: Duration,
    max: Duration,
}

impl Tally {
    fn add(&mut self, took: Duration, failed: bool) {
        self.count += 1;
        self.failed += u64::from(failed);
        self.total = self.total.saturating_add(took);
        self.max = self.max.max(took);
    }
}

impl Metrics {
    /// Counts an action and its steps.
    pub fn count(
        &self,
        machinery: &str,
        action: &'static str,
        took: Duration,
        steps: &[(String, Duration)],
        failed: bool,
    ) {
        let key = |step| Key { machinery: machinery.to_owned(), action, step };
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        tallies.entry(key(None)).or_default().add(took, failed);
        for (step, took) in steps {
            if tallies.len() >= MAX_ENTRIES && !tallies.contains_key(&key(Some(step.clone()))) {
                continue;
            }
            tallies.entry(key(Some(step.clone()))).or_default().add(*took, false);
        }
    }

    /// Counts a try to heal a machine, and whether it has worked.
    pub fn count_try(&self, healed: bool) {
        self.tries.fetch_add(1, Ordering::Relaxed);
        self.healed.fetch_add(u64::from(healed), Ordering::Relaxed);
    }

    /// Returns the numbers of tries and of healed machines.
    pub fn tries_and_healed(&self) -> (u64, u64) {
        (self.tries.load(Ordering::Relaxed), self.healed.load(Ordering::Relaxed))
    }

    /// Returns all entries, with times in milliseconds.
    pub fn to_json(&self) -> Value {
        let tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        let one = |(key, tally): (&Key, &Tally)| {
            json!({
                "machinery": key.machinery,
                "action": key.action,
                "step": key.step,
                "count": tally.count,
                "failed": tally.failed,
                "total_ms": milliseconds(tally.total),
                "max_ms": milliseconds(tally.max),
            })
        };
        tallies.iter().map(one).collect()
    }
}

/// Returns a duration in milliseconds, with three digits after the point.
pub fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_count_actions_and_their_steps() {
        let metrics = Metrics::default();
        let ms = Duration::from_millis;
        metrics.count("qemu", "restore_start", ms(30), &[("spawn".into(), ms(20))], false);
        metrics.count("qemu", "restore_start", ms(50), &[("spawn".into(), ms(10))], true);
        metrics.count("kvm", "stop", ms(5), &[], false);
        let entries = metrics.to_json();
        let entries = entries.as_array().unwrap();
        assert_eq!(entries.len(), 3);
        assert_eq!(entries[1]["step"], Value::Null);
        assert_eq!((&entries[1]["count"], &entries[1]["failed"]), (&json!(2), &json!(1)));
        assert_eq!((&entries[2]["total_ms"], &entries[2]["max_ms"]), (&json!(30.0), &json!(20.0)));
    }

    #[test]
    fn metrics_are_bounded_when_a_plugin_invents_steps_and_times() {
        let metrics = Metrics::default();
        for step in 0..2 * MAX_ENTRIES {
            metrics.count("x", "stop", Duration::MAX, &[(step.to_string(), Duration::MAX)], false);
        }
        assert_eq!(metrics.to_json().as_array().unwrap().len(), MAX_ENTRIES);
    }

    #[test]
    fn metrics_count_tries_and_healed_machines() {
        let metrics = Metrics::default();
        for healed in [false, true, false] {
            metrics.count_try(healed);
        }
        assert_eq!(metrics.tries_and_healed(), (3, 1));
    }
}
