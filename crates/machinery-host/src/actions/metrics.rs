//! How often each action was done, how long it and its steps took, since the host was started.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

/// How many are counted apart, at most. Steps have few names, unless a plugin makes up new ones for ever.
const MOST: usize = 1000;

/// The counts of all machineries.
#[derive(Debug, Default)]
pub struct Metrics(Mutex<BTreeMap<Key, Tally>>);

/// What is counted together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    machinery: String,
    action: &'static str,
    /// One of the action's steps, as its plugin calls it; none is the whole action.
    step: Option<String>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    count: u64,
    failed: u64,
    total: Duration,
    longest: Duration,
}

impl Tally {
    fn add(&mut self, took: Duration, failed: bool) {
        self.count += 1;
        self.failed += u64::from(failed);
        self.total = self.total.saturating_add(took);
        self.longest = self.longest.max(took);
    }
}

impl Metrics {
    /// Counts an action, which took that long with these steps.
    pub fn count(
        &self,
        machinery: &str,
        action: &'static str,
        took: Duration,
        steps: &[(String, Duration)],
        failed: bool,
    ) {
        let key = |step| Key { machinery: machinery.to_owned(), action, step };
        let mut tallies = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tallies.entry(key(None)).or_default().add(took, failed);
        for (step, took) in steps {
            if tallies.len() >= MOST && !tallies.contains_key(&key(Some(step.clone()))) {
                continue;
            }
            tallies.entry(key(Some(step.clone()))).or_default().add(*took, false);
        }
    }

    /// All of them, times in milliseconds.
    pub fn to_json(&self) -> Value {
        let tallies = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let one = |(key, tally): (&Key, &Tally)| {
            json!({
                "machinery": key.machinery,
                "action": key.action,
                "step": key.step,
                "count": tally.count,
                "failed": tally.failed,
                "total_ms": milliseconds(tally.total),
                "longest_ms": milliseconds(tally.longest),
            })
        };
        tallies.iter().map(one).collect()
    }
}

/// As people read times here.
pub fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_and_their_steps_are_counted() {
        let metrics = Metrics::default();
        let ms = Duration::from_millis;
        metrics.count("qemu", "restore_start", ms(30), &[("spawn".into(), ms(20))], false);
        metrics.count("qemu", "restore_start", ms(50), &[("spawn".into(), ms(10))], true);
        metrics.count("kvm", "stop", ms(5), &[], false);
        let told = metrics.to_json();
        let told = told.as_array().unwrap();
        assert_eq!(told.len(), 3);
        assert_eq!(told[1]["step"], Value::Null);
        assert_eq!((&told[1]["count"], &told[1]["failed"]), (&json!(2), &json!(1)));
        assert_eq!((&told[2]["total_ms"], &told[2]["longest_ms"]), (&json!(30.0), &json!(20.0)));
    }

    #[test]
    fn a_plugin_that_makes_up_steps_and_times_costs_little() {
        let metrics = Metrics::default();
        for step in 0..2 * MOST {
            metrics.count("x", "stop", Duration::MAX, &[(step.to_string(), Duration::MAX)], false);
        }
        assert_eq!(metrics.to_json().as_array().unwrap().len(), MOST);
    }
}
