//! The rules of the quarantine: which failure a machine recovers from by itself, and when that is tried.
//!
//! ```text
//! failure ─▶ consequence ─▶ disable: only an operator enables the machine
//!                      └──▶ quarantine ─▶ try, after 5 s, 30 s, 2 min, then every 10 min ─▶ healed
//!                               ▲                                        └─ failed ─┐
//!                               └───────────────────────────────────────────────────┘
//! ```

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use machinery::ErrorKind;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::config::Heal;

/// The pauses before the first tries. Later tries have the last one.
const PAUSES: [Duration; 4] =
    [Duration::from_secs(5), Duration::from_secs(30), Duration::from_secs(120), Duration::from_secs(600)];

/// The number of plugin faults in a row that disables a machine.
const MAX_PLUGIN_FAULTS: u32 = 3;

/// The consequence of a failure that takes a machine out of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consequence {
    /// Only an operator enables the machine.
    Disable,
    /// The host tries the machine until it works.
    Quarantine,
}

/// Returns the consequence of a failure of this kind. `plugin_faults` is the number of plugin faults in a row, with
/// this one.
pub fn consequence(kind: ErrorKind, plugin_faults: u32, heal: Heal) -> Consequence {
    let lasts = match kind {
        ErrorKind::Configuration => true,
        kind => is_plugin_fault(kind) && plugin_faults >= MAX_PLUGIN_FAULTS,
    };
    if lasts || heal == Heal::Off { Consequence::Disable } else { Consequence::Quarantine }
}

/// Reports whether the plugin's code is at fault. An abandoned call has the kind of a misbehaving plugin.
pub fn is_plugin_fault(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::PluginPanicked | ErrorKind::PluginMisbehaved)
}

/// Returns the pause before the next try, after this number of failed ones.
pub fn pause_after(tries: u32) -> Duration {
    let index = usize::try_from(tries).unwrap_or(usize::MAX).min(PAUSES.len() - 1);
    PAUSES[index]
}

/// Returns the present time in seconds since 1970.
pub fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// The quarantine of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    /// The latest failure.
    pub reason: String,
    /// The time of the first failure, in seconds since 1970.
    #[serde(default)]
    pub since: u64,
    /// The number of failed tries.
    #[serde(default)]
    pub tries: u32,
    /// True if somebody else has started the machine since. A try would discard the changes of that run, so there is
    /// none before an operator enables the machine.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_left_alone: bool,
    /// The time of the next try. A new host determines it anew.
    #[serde(skip, default = "Instant::now")]
    pub next_try: Instant,
}

impl Quarantine {
    /// Returns the quarantine of a machine that has failed now.
    pub fn new(reason: &str) -> Self {
        let next_try = Instant::now() + pause_after(0);
        let (reason, since) = (reason.to_owned(), unix_now());
        Quarantine { reason, since, tries: 0, is_left_alone: false, next_try }
    }

    /// Returns the quarantine that an earlier host has saved. Its tries are kept, and the next one is soon.
    #[must_use]
    pub fn resumed(self) -> Self {
        Quarantine { next_try: Instant::now() + pause_after(0), ..self }
    }

    /// Counts a failed try.
    pub fn count_failed_try(&mut self, reason: &str) {
        self.tries = self.tries.saturating_add(1);
        self.reason = reason.to_owned();
        self.postpone();
    }

    /// Postpones the next try without counting one.
    pub fn postpone(&mut self) {
        self.next_try = Instant::now() + pause_after(self.tries);
    }

    /// Begins anew: the machine's configuration has changed.
    pub fn restart(&mut self) {
        (self.tries, self.next_try) = (0, Instant::now());
    }

    /// Returns the seconds until the next try, rounded up. The try may have to wait longer: for the end of a lock, of
    /// a run, or of an earlier call.
    pub fn next_try_in(&self) -> u64 {
        let left = self.next_try.saturating_duration_since(Instant::now());
        left.as_secs() + u64::from(left.subsec_nanos() > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    #[test]
    fn failure_disables_when_it_cannot_heal_by_itself() {
        let auto = |kind, faults| consequence(kind, faults, Heal::Auto);
        assert_eq!(auto(ErrorKind::Configuration, 0), Consequence::Disable);
        for kind in [ErrorKind::PluginPanicked, ErrorKind::PluginMisbehaved] {
            for (faults, expected) in
                [(1, Consequence::Quarantine), (2, Consequence::Quarantine), (3, Consequence::Disable)]
            {
                assert_eq!(auto(kind, faults), expected, "{kind:?} {faults}");
            }
        }
        for kind in [
            ErrorKind::Failed,
            ErrorKind::Timeout,
            ErrorKind::Environment,
            ErrorKind::UnexpectedState,
            ErrorKind::NotNow,
            ErrorKind::Interrupted,
        ] {
            // An accident after two plugin faults is no third one.
            assert_eq!(auto(kind, 3), Consequence::Quarantine, "{kind:?}");
            assert_eq!(consequence(kind, 0, Heal::Off), Consequence::Disable, "{kind:?}");
        }
        assert_eq!(consequence(ErrorKind::PluginPanicked, 1, Heal::Off), Consequence::Disable);
    }

    #[tokio::test(start_paused = true)]
    async fn pause_grows_with_each_failed_try_up_to_ten_minutes() {
        let mut quarantine = Quarantine::new("first");
        assert_eq!((quarantine.next_try_in(), quarantine.tries), (5, 0));
        advance(Duration::from_millis(4001)).await;
        assert_eq!(quarantine.next_try_in(), 1);
        advance(Duration::from_secs(60)).await;
        assert_eq!(quarantine.next_try_in(), 0);
        for (tries, expected) in [(1, 30), (2, 120), (3, 600), (4, 600), (5, 600)] {
            quarantine.count_failed_try("again");
            assert_eq!((quarantine.tries, quarantine.next_try_in()), (tries, expected));
        }
        assert_eq!(quarantine.reason, "again");
        quarantine.tries = u32::MAX;
        quarantine.count_failed_try("again");
        assert_eq!((quarantine.tries, quarantine.next_try_in()), (u32::MAX, 600));
    }

    #[tokio::test(start_paused = true)]
    async fn quarantine_is_tried_at_once_when_the_configuration_has_changed() {
        let mut quarantine = Quarantine::new("x");
        quarantine.count_failed_try("y");
        quarantine.postpone();
        quarantine.is_left_alone = true;
        assert_eq!((quarantine.tries, quarantine.next_try_in()), (1, 30));
        quarantine.restart();
        assert_eq!((quarantine.tries, quarantine.next_try_in()), (0, 0));
        assert!(quarantine.is_left_alone, "the run of somebody else goes on");
    }

    #[tokio::test(start_paused = true)]
    async fn quarantine_is_tried_soon_with_its_tries_when_a_new_host_reads_it() {
        let mut saved = Quarantine::new("x");
        (0..4).for_each(|_| saved.count_failed_try("y"));
        let text = serde_json::to_string(&saved).unwrap();
        assert!(!text.contains("next_try"), "{text}");
        let read = serde_json::from_str::<Quarantine>(&text).unwrap().resumed();
        assert_eq!((read.tries, read.since, read.next_try_in()), (4, saved.since, 5));
        assert_eq!(read.reason, "y");
    }

    #[test]
    fn quarantine_begins_at_the_present_time() {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let (before, quarantine) = (now(), Quarantine::new("x"));
        assert!((before..=now()).contains(&quarantine.since), "{}", quarantine.since);
    }
}
