//! The services of the host that a plugin can call.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{RestoreReadiness, State};

/// The reason for a [`State::Poweroff`] of a guest that powered itself off. The host neither logs a warning for it
/// nor records an error.
pub const GUEST_POWERED_OFF: &str = "the guest powered itself off";

/// The host's side of [`Host`]. A host implements it; plugins do not see it.
pub trait HostServices: Send + Sync + 'static {
    /// Writes a line to the log.
    fn log(&self, record: LogRecord);
    /// Reports that a machine changed its state by itself.
    fn state_changed(&self, machine: &str, state: State, reason: &str);
    /// Reports the progress of a long action: 0.0 to 1.0.
    fn progress(&self, machine: &str, fraction: f64);
    /// Reports the duration of a step of an action.
    fn step(&self, machine: &str, step: &str, took: Duration);
    /// Reports a machine's readiness for its next restore.
    fn ready(&self, machine: &str, ready: &RestoreReadiness);
    /// Reports that a machine has lost its preparation, and the reason.
    fn preparation_invalidated(&self, machine: &str, reason: &str);
    /// Asks for a preparation of a machine, which can be better than the last one, and gives the reason. A host without
    /// preparations ignores it.
    fn preparation_wanted(&self, _machine: &str, _reason: &str) {}
    /// Returns the highest level that the host logs. It discards records above this level.
    fn max_level(&self) -> LogLevel;
}

/// The services of the host, as a plugin sees them. A plugin can clone it cheaply and call it from any thread. Calls
/// after the end of the host have no effect.
///
/// The log has no method: use `tracing`'s macros. Their events arrive in the host's log with their fields.
#[derive(Clone)]
pub struct Host {
    services: Arc<dyn HostServices>,
}

impl Host {
    /// Creates the plugin's view of a host's services.
    pub fn new(services: Arc<dyn HostServices>) -> Self {
        Host { services }
    }

    /// Creates services that discard every call, for a plugin's own unit tests.
    pub fn detached() -> Self {
        Host::new(Arc::new(NoServices))
    }

    /// Reports that the machine changed its state by itself, and the reason; also during an action. An empty reason
    /// means that the host has requested the state. If a machine failed or ended for a reason, the host logs a
    /// warning and records the reason as an error, unless it is [`GUEST_POWERED_OFF`].
    pub fn state_changed(&self, machine: &str, state: State, reason: &str) {
        self.services.state_changed(machine, state, reason);
    }

    /// Reports the progress of a long action on the machine: 0.0 to 1.0.
    pub fn progress(&self, machine: &str, fraction: f64) {
        self.services.progress(machine, fraction.clamp(0.0, 1.0));
    }

    /// Reports the duration of a step of the current action, for the host's log and metrics.
    pub fn step(&self, machine: &str, step: &str, took: Duration) {
        self.services.step(machine, step, took);
    }

    /// Reports the machine's readiness for its next restore, whenever it changes.
    pub fn ready(&self, machine: &str, ready: &RestoreReadiness) {
        self.services.ready(machine, ready);
    }

    /// Reports that the machine has lost its preparation by itself, and the reason. The host prepares the machine
    /// again when it is idle, unless it loses its preparation repeatedly.
    pub fn preparation_invalidated(&self, machine: &str, reason: &str) {
        self.services.preparation_invalidated(machine, reason);
    }

    /// Asks the host to prepare the machine when it is idle: its preparation can be better than it is, for that reason. A
    /// host before interface 1.1 ignores it.
    pub fn preparation_wanted(&self, machine: &str, reason: &str) {
        self.services.preparation_wanted(machine, reason);
    }

    pub(crate) fn services(&self) -> &Arc<dyn HostServices> {
        &self.services
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Host")
    }
}

/// The level of a log record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something is unexpected, but work continues.
    Warn,
    /// Information for operators.
    Info,
    /// Information for developers.
    Debug,
    /// All details.
    Trace,
}

/// One line of a plugin's log, with its fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogRecord {
    /// The level.
    pub level: LogLevel,
    /// The module that logged it.
    pub target: String,
    /// The message.
    pub message: String,
    /// The fields, by name.
    pub fields: serde_json::Map<String, serde_json::Value>,
}

struct NoServices;

impl HostServices for NoServices {
    fn log(&self, _: LogRecord) {}
    fn state_changed(&self, _: &str, _: State, _: &str) {}
    fn progress(&self, _: &str, _: f64) {}
    fn step(&self, _: &str, _: &str, _: Duration) {}
    fn ready(&self, _: &str, _: &RestoreReadiness) {}
    fn preparation_invalidated(&self, _: &str, _: &str) {}
    fn max_level(&self) -> LogLevel {
        LogLevel::Error
    }
}

/// Returns the path as text, as it crosses the interface.
pub(crate) fn path_text(path: &Path) -> crate::Result<&str> {
    path.to_str().ok_or_else(|| {
        crate::Error::configuration(format!("the path {} is not valid UTF-8", path.display()))
            .advice("Use a path that is valid UTF-8")
    })
}
