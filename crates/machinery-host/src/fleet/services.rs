//! What a plugin is given to report through.

use std::sync::Arc;
use std::time::Duration;

use machinery::{HostServices, LogLevel, LogRecord, RestoreReadiness, State};

use super::{Fleet, Machine};
use crate::logging;

/// What one plugin is given as its host. It may call before the fleet is complete and after the
/// host has ended; then it is not heard.
pub struct Services {
    machinery: String,
    fleet: Arc<Fleet>,
}

impl Services {
    /// The services for that machinery's plugin.
    pub fn new(machinery: &str, fleet: Arc<Fleet>) -> Self {
        Services { machinery: machinery.to_owned(), fleet }
    }

    /// A plugin may only speak of its own machines.
    fn machine(&self, name: &str) -> Option<Arc<Machine>> {
        let roll = self.fleet.roll();
        let own = roll.find(name).filter(|machine| machine.machinery.name == self.machinery).cloned();
        if own.is_none() && !roll.machineries().is_empty() {
            tracing::warn!(
                machinery = self.machinery,
                machine = name,
                "the plugin speaks of a machine it does not have"
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
            machine.relapsed(reason);
        }
    }

    fn max_level(&self) -> LogLevel {
        logging::max_level()
    }
}
