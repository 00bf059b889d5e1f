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

    fn preparation_wanted(&self, machine: &str, reason: &str) {
        if let Some(machine) = self.machine(machine) {
            tracing::info!(machine = machine.name(), reason, "its next restore is prepared again");
            machine.notify_idle_work();
        }
    }

    fn max_level(&self) -> LogLevel {
        logging::max_level()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Events;
    use crate::fleet::Roster;
    use crate::fleet::fake_plugin::FakePlugin;
    use tokio::time::timeout;

    #[tokio::test(start_paused = true)]
    async fn reports_change_only_the_plugins_own_machine() {
        let (fleet, second) = (Arc::new(Fleet::default()), Duration::from_secs(1));
        let machine = FakePlugin::default().machine("m", &Events::default());
        fleet.set(Roster::new(vec![Arc::clone(&machine.machinery)], vec![Arc::clone(&machine)]));
        let (own, foreign) = (Services::new("fake", Arc::clone(&fleet)), Services::new("other", fleet));
        let report = |services: &Services| {
            services.step("m", "spawn", second);
            services.state_changed("m", State::Running, "");
            services.preparation_invalidated("m", "QEMU was killed");
        };
        report(&foreign);
        let status = machine.status();
        assert_eq!((status.state, status.steps.len()), (State::Poweroff, 0));
        assert!(timeout(Duration::ZERO, machine.idle_work()).await.is_err());
        report(&own);
        let status = machine.status();
        assert_eq!((status.state, status.steps), (State::Running, vec![("spawn".to_owned(), second)]));
        assert!(timeout(Duration::ZERO, machine.idle_work()).await.is_ok(), "it is prepared again");
    }
}
