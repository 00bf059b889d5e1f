//! The readiness of a machine for its next restore, as it is reported to the host.

use std::sync::{Mutex, MutexGuard};

use machinery::{Host, Readiness, RestoreReadiness};

use crate::sync::lock;

/// The readiness of one machine. It remembers the readiness without a standby, which holds again once a
/// standby is used or discarded.
#[derive(Debug)]
pub struct ReadinessReport {
    host: Host,
    machine: String,
    without_standby: Mutex<RestoreReadiness>,
}

impl ReadinessReport {
    /// Creates the report of a machine, which is plain for now.
    pub fn new(host: &Host, machine: &str) -> Self {
        ReadinessReport { host: host.clone(), machine: machine.to_owned(), without_standby: Mutex::default() }
    }

    /// Reports the readiness without a standby to the host.
    pub fn report(&self) {
        self.host.ready(&self.machine, &self.without_standby());
    }

    /// Reports this readiness to the host.
    pub fn report_as(&self, readiness: &RestoreReadiness) {
        self.host.ready(&self.machine, readiness);
    }

    /// Returns the readiness without a standby.
    pub fn without_standby(&self) -> RestoreReadiness {
        self.lock().clone()
    }

    /// Returns the readiness with a standby that holds so much memory.
    pub fn with_standby(&self, memory: u64) -> RestoreReadiness {
        let disk = self.lock().disk;
        RestoreReadiness { mode: Readiness::Standby, reason: String::new(), memory, disk }
    }

    /// Notes that the machine has a template of that size on disk.
    pub fn set_instant(&self, disk: u64) {
        *self.lock() = RestoreReadiness { mode: Readiness::Instant, disk, ..RestoreReadiness::default() };
    }

    /// Notes that the machine has no template, and why.
    pub fn set_plain(&self, reason: &str) {
        *self.lock() = RestoreReadiness { reason: reason.to_owned(), ..RestoreReadiness::default() };
    }

    /// Notes why the machine is not more ready.
    pub fn set_reason(&self, reason: String) {
        self.lock().reason = reason;
    }

    fn lock(&self) -> MutexGuard<'_, RestoreReadiness> {
        lock(&self.without_standby)
    }
}
