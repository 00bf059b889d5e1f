//! Counts and durations of actions and their steps, since the start of the host. The request `metrics` and the exporter
//! read the same record.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use machinery::Readiness;
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::histogram::Histogram;

/// The number of entries that are counted, at most. A plugin may invent names of steps without end.
const MAX_ENTRIES: usize = 1000;

/// The counts of all machineries.
#[derive(Debug, Default)]
pub struct Metrics {
    tallies: Mutex<BTreeMap<Key, Tally>>,
    tries: AtomicU64,
    healed: AtomicU64,
    changed: Notify,
}

/// An action that has ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended<'a> {
    /// The machinery of the machine.
    pub machinery: &'a str,
    /// The name of the action.
    pub action: &'static str,
    /// The mode of a restore: the one that the machine was ready for. `None` for other actions.
    pub mode: Option<Readiness>,
    /// The duration.
    pub took: Duration,
    /// The steps, and their durations.
    pub steps: &'a [(String, Duration)],
    /// True if the action has failed.
    pub failed: bool,
}

/// The actions or steps that one entry counts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The machinery.
    pub machinery: String,
    /// The name of the action.
    pub action: &'static str,
    /// The mode of a restore.
    pub mode: Option<Readiness>,
    /// The plugin's name for one of the action's steps. `None` is the whole action.
    pub step: Option<String>,
}

/// The count and the durations of an action or a step.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// The durations.
    pub durations: Histogram,
    /// The number of failures.
    pub failed: u64,
}

impl Tally {
    fn add(&mut self, took: Duration, failed: bool) {
        self.durations.add(took);
        self.failed += u64::from(failed);
    }
}

impl Metrics {
    /// Counts an action and its steps.
    pub fn count(&self, ended: Ended<'_>) {
        let Ended { machinery, action, mode, took, steps, failed } = ended;
        let key = |step| Key { machinery: machinery.to_owned(), action, mode, step };
        let mut tallies = self.lock();
        tallies.entry(key(None)).or_default().add(took, failed);
        for (step, took) in steps {
            if tallies.len() >= MAX_ENTRIES && !tallies.contains_key(&key(Some(step.clone()))) {
                continue;
            }
            tallies.entry(key(Some(step.clone()))).or_default().add(*took, false);
        }
        drop(tallies);
        self.set_changed();
    }

    /// Wakes whoever waits for a change.
    pub fn set_changed(&self) {
        self.changed.notify_one();
    }

    /// Waits for a change since the last one.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Returns a copy of all entries.
    pub fn entries(&self) -> BTreeMap<Key, Tally> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Tally>> {
        self.tallies.lock().unwrap_or_else(PoisonError::into_inner)
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
        let one = |(key, Tally { durations, failed }): (&Key, &Tally)| {
            json!({
                "machinery": key.machinery,
                "action": key.action,
                "mode": key.mode,
                "step": key.step,
                "count": durations.count(),
                "failed": failed,
                "total_ms": milliseconds(durations.total),
                "p50_ms": milliseconds(durations.quantile(0.5)),
                "p99_ms": milliseconds(durations.quantile(0.99)),
                "max_ms": milliseconds(durations.max),
            })
        };
        self.entries().iter().map(one).collect()
    }
}

/// Returns a duration in milliseconds, with three digits after the point.
pub fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended<'a>(action: &'static str, took: Duration, steps: &'a [(String, Duration)]) -> Ended<'a> {
        Ended { machinery: "qemu", action, mode: None, took, steps, failed: false }
    }

    #[test]
    fn metrics_count_actions_and_their_steps() {
        let metrics = Metrics::default();
        let ms = Duration::from_millis;
        metrics.count(ended("restore_start", ms(30), &[("spawn".into(), ms(20))]));
        metrics.count(Ended { failed: true, ..ended("restore_start", ms(50), &[("spawn".into(), ms(10))]) });
        metrics.count(Ended { machinery: "kvm", ..ended("stop", ms(5), &[]) });
        let entries = metrics.to_json();
        let entries = entries.as_array().unwrap();
        assert_eq!(entries.len(), 3);
        assert_eq!(entries[1]["step"], Value::Null);
        assert_eq!((&entries[1]["count"], &entries[1]["failed"]), (&json!(2), &json!(1)));
        assert_eq!((&entries[2]["total_ms"], &entries[2]["max_ms"]), (&json!(30.0), &json!(20.0)));
        assert_eq!(entries[2]["p50_ms"], json!(10.0));
    }

    #[test]
    fn restores_of_each_mode_are_counted_apart() {
        let metrics = Metrics::default();
        for mode in [Readiness::Plain, Readiness::Standby, Readiness::Standby] {
            metrics.count(Ended { mode: Some(mode), ..ended("restore_start", Duration::ZERO, &[]) });
        }
        let entries = metrics.to_json();
        assert_eq!((&entries[0]["mode"], &entries[0]["count"]), (&json!("plain"), &json!(1)));
        assert_eq!((&entries[1]["mode"], &entries[1]["count"]), (&json!("standby"), &json!(2)));
    }

    #[test]
    fn metrics_are_bounded_when_a_plugin_invents_steps_and_times() {
        let metrics = Metrics::default();
        for step in 0..2 * MAX_ENTRIES {
            metrics.count(ended("stop", Duration::MAX, &[(step.to_string(), Duration::MAX)]));
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
