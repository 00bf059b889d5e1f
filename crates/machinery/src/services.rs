//! The way back: what a plugin can tell its host.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{RestoreReadiness, State};

/// The reason for a [`State::Poweroff`] of a guest that powered itself off. This is no accident: the host
/// neither warns of it nor records it as an error.
pub const GUEST_POWERED_OFF: &str = "the guest powered itself off";

/// The host's side of [`Host`]; a host implements it, plugins never see it.
pub trait HostServices: Send + Sync + 'static {
    /// A line for the log.
    fn log(&self, record: LogRecord);
    /// A machine changed state by itself.
    fn state_changed(&self, machine: &str, state: State, reason: &str);
    /// How far a long action is: 0.0 to 1.0.
    fn progress(&self, machine: &str, fraction: f64);
    /// A step of an action took that long.
    fn step(&self, machine: &str, step: &str, took: Duration);
    /// How ready a machine is for its next restore.
    fn ready(&self, machine: &str, ready: &RestoreReadiness);
    /// A machine should be prepared again, and why.
    fn preparation_invalidated(&self, machine: &str, reason: &str);
    /// Records above this level are thrown away, so they need not be made.
    fn max_level(&self) -> LogLevel;
}

/// The services of the host, as a plugin sees them. Cheap to clone, callable from any thread,
/// harmless after the host has ended.
///
/// The log has no method here: use `tracing`'s macros, whose events arrive in the host's log with
/// their fields.
#[derive(Clone)]
pub struct Host {
    services: Arc<dyn HostServices>,
}

impl Host {
    /// Services that a host implements.
    pub fn new(services: Arc<dyn HostServices>) -> Self {
        Host { services }
    }

    /// Services that listen to nobody: for a plugin's own unit tests.
    pub fn detached() -> Self {
        Host::new(Arc::new(Nobody))
    }

    /// Reports that the machine changed its state by itself, and why; also during an action. An empty reason
    /// means that the host has ordered the state. The host warns of a machine that failed or ended for a
    /// reason, and records that reason as an error, unless it is [`GUEST_POWERED_OFF`].
    pub fn state_changed(&self, machine: &str, state: State, reason: &str) {
        self.services.state_changed(machine, state, reason);
    }

    /// Tells how far a long action on the machine is: 0.0 to 1.0.
    pub fn progress(&self, machine: &str, fraction: f64) {
        self.services.progress(machine, fraction.clamp(0.0, 1.0));
    }

    /// Tells how long a step of the action under way took; the host's log and metrics have it.
    pub fn step(&self, machine: &str, step: &str, took: Duration) {
        self.services.step(machine, step, took);
    }

    /// Tells how ready the machine is for its next restore, whenever that changes.
    pub fn ready(&self, machine: &str, ready: &RestoreReadiness) {
        self.services.ready(machine, ready);
    }

    /// Tells that what [`prepare`](crate::Machinery::prepare) made is gone by itself, and why. The host
    /// prepares the machine again when there is nothing else to do with it, unless that happens again
    /// and again.
    pub fn preparation_invalidated(&self, machine: &str, reason: &str) {
        self.services.preparation_invalidated(machine, reason);
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

/// How much a log line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something is odd, and went on.
    Warn,
    /// What an operator wants to know.
    Info,
    /// What a developer wants to know.
    Debug,
    /// Everything.
    Trace,
}

/// One line of a plugin's log, with its fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogRecord {
    /// How much it matters.
    pub level: LogLevel,
    /// The module it comes from.
    pub target: String,
    /// The text.
    pub message: String,
    /// The fields, by name.
    pub fields: serde_json::Map<String, serde_json::Value>,
}

struct Nobody;

impl HostServices for Nobody {
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

/// Whether a path can be handed across the interface: it is text there.
pub(crate) fn path_text(path: &Path) -> crate::Result<&str> {
    path.to_str().ok_or_else(|| {
        crate::Error::configuration(format!("the path {} is not valid UTF-8", path.display()))
            .advice("Use a path of plain letters")
    })
}
