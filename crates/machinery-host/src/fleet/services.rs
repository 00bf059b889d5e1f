//! The host services that a plugin calls to report states, progress, readiness and log lines.

use std::sync::Arc;
use std::time::Duration;

use machinery::{HostServices, LogLevel, LogRecord, RestoreReadiness, State};

use super::{Fleet, Machine};
use crate::logging;

/// The host services of one plugin. Calls before the fleet is complete, or after the host has ended, are
/// ignored.
pub struct Services {
    machinery: String,
    fleet: Arc<Fleet>,
}

impl Services {
    /// Returns the services for that machinery's plugin.
    pub fn new(machinery: &str, fleet: Arc<Fleet>) -> Self {
        Services { machinery: machinery.to_owned(), fleet }
    }

    /// Returns the machine, if it is the plugin's own.
    fn machine(&self, name: &str) -> Option<Arc<Machine>> {
        let roster = self.fleet.roster();
        let own = roster.find(name).filter(|machine| machine.machinery.name == self.machinery).cloned();
        if own.is_none() && !roster.machineries().is_empty() {
            tracing::warn!(
                machinery = self.machinery,
                machine = name,
                "the plugin reports about a machine that it does not have"
            );
        }
        own
    }
}

impl HostServices for Services {
    fn log(&self, record: LogRecord) {
        logging::from_plugin(&self.machinery, &record);
    }

    fn state_changed(&self, machine: &str, state: State, reason: &str) {
        if let Some(machine) = self.machine(machine) {
            tracing::debug!(machine = machine.name(), %state, reason, "state reported");
            machine.set_reported(state, reason);
        }
    }

    fn progress(&self, machine: &str, fraction: f64) {
        if let Some(machine) = self.machine(machine) {
            machine.progress(fraction);
        }
    }

    fn step(&self, machine: &str, step: &str, took: Duration) {
        if let Some(machine) = self.machine(machine) {
            machine.add_step(step, took);
        }
    }

    fn ready(&self, machine: &str, ready: &RestoreReadiness) {
        if let Some(machine) = self.machine(machine) {
            machine.set_ready(ready);
        }
    }

    fn preparation_invalidated(&self, machine: &str, reason: &str) {
        if let Some(machine) = self.machine(machine) {
            machine.preparation_lost(reason);
        }
    }

    fn max_level(&self) -> LogLevel {
        logging::max_level()
    }
}
