//! The time limits of the calls into plugins.

use std::time::Duration;

use machinery::Result;
use machinery::config::checked;
use serde::{Deserialize, Deserializer};

/// The time limit of each call into a plugin. The file gives seconds. The defaults of Cuckoo3's four actions
/// are Cuckoo3's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// For [`Machinery::restore_start`](machinery::Machinery::restore_start).
    #[serde(deserialize_with = "seconds")]
    pub restore_start: Duration,
    /// For [`Machinery::norestore_start`](machinery::Machinery::norestore_start).
    #[serde(deserialize_with = "seconds")]
    pub norestore_start: Duration,
    /// For [`Machinery::stop`](machinery::Machinery::stop).
    #[serde(deserialize_with = "seconds")]
    pub stop: Duration,
    /// For [`Machinery::acpi_stop`](machinery::Machinery::acpi_stop).
    #[serde(deserialize_with = "seconds")]
    pub acpi_stop: Duration,
    /// For [`Machinery::dump_memory`](machinery::Machinery::dump_memory).
    #[serde(deserialize_with = "seconds")]
    pub dump_memory: Duration,
    /// For [`Machinery::screenshot`](machinery::Machinery::screenshot).
    #[serde(deserialize_with = "seconds")]
    pub screenshot: Duration,
    /// For [`Machinery::prepare`](machinery::Machinery::prepare).
    #[serde(deserialize_with = "seconds")]
    pub prepare: Duration,
    /// For [`Machinery::reload`](machinery::Machinery::reload).
    #[serde(deserialize_with = "seconds")]
    pub reload: Duration,
    /// For [`Machinery::state`](machinery::Machinery::state).
    #[serde(deserialize_with = "seconds")]
    pub state: Duration,
    /// For [`Machinery::load`](machinery::Machinery::load), which may remove leftovers or wait for its
    /// hypervisor, and for [`Machinery::check`](machinery::Machinery::check).
    #[serde(deserialize_with = "seconds")]
    pub load: Duration,
    /// For [`Machinery::shutdown`](machinery::Machinery::shutdown).
    #[serde(deserialize_with = "seconds")]
    pub shutdown: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            restore_start: Duration::from_secs(180),
            norestore_start: Duration::from_secs(60),
            stop: Duration::from_secs(60),
            acpi_stop: Duration::from_secs(120),
            dump_memory: Duration::from_secs(3600),
            screenshot: Duration::from_secs(30),
            prepare: Duration::from_secs(1800),
            reload: Duration::from_secs(120),
            state: Duration::from_secs(20),
            load: Duration::from_secs(600),
            shutdown: Duration::from_secs(30),
        }
    }
}

/// The longest time limit, in seconds: a day.
const MAX_TIMEOUT: f64 = 86_400.0;

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    checked(deserializer, |text| {
        let seconds = text.parse().ok().filter(|seconds| *seconds > 0.0 && *seconds <= MAX_TIMEOUT);
        seconds.map(Duration::from_secs_f64).ok_or_else(|| {
            format!("{text} is not a time limit: give seconds, more than 0 and at most 86400 (a day)")
        })
    })
}
