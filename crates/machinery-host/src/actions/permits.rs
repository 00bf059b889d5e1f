//! The permits of restores and preparations.
//!
//! Each hypervisor has as many as any other. So a hypervisor that hangs uses up its own permits, and delays no machine of
//! another one. Most machineries have one hypervisor, and share one set of permits.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::prepare_permits::{PreparePermit, PreparePermits};
use crate::fleet::Machine;

/// Preparations that run at a time, at most: they take the processors of analyses that run.
const MAX_PREPARATIONS: usize = 2;

/// The permits of all hypervisors.
pub struct Permits {
    /// The number of restores of one hypervisor that may run at a time.
    restores: usize,
    /// None once the host ends.
    hypervisors: Mutex<Option<HashMap<Option<String>, Arc<Hypervisor>>>>,
}

/// The permits of one hypervisor. Those who wait get them in order of arrival.
struct Hypervisor {
    restores: Arc<Semaphore>,
    preparations: PreparePermits,
}

impl Permits {
    /// Returns permits for that many restores of each hypervisor.
    pub fn new(restores: usize) -> Self {
        let restores = restores.min(Semaphore::MAX_PERMITS);
        Permits { restores, hypervisors: Mutex::new(Some(HashMap::new())) }
    }

    /// Waits for a permit to restore the machine. Returns `None` when the host ends.
    pub async fn restore(&self, machine: &Machine) -> Option<OwnedSemaphorePermit> {
        let restores = Arc::clone(&self.of(machine)?.restores);
        restores.acquire_owned().await.ok()
    }

    /// Waits for a permit to prepare the machine. Returns `None` when the host ends.
    pub async fn prepare(&self, machine: &Arc<Machine>) -> Option<PreparePermit> {
        let hypervisor = self.of(machine)?;
        hypervisor.preparations.acquire(machine).await
    }

    /// Refuses all permits from now on.
    pub fn close(&self) {
        let hypervisors = self.hypervisors.lock().unwrap_or_else(PoisonError::into_inner).take();
        for hypervisor in hypervisors.iter().flat_map(HashMap::values) {
            hypervisor.restores.close();
            hypervisor.preparations.close();
        }
    }

    fn of(&self, machine: &Machine) -> Option<Arc<Hypervisor>> {
        let mut hypervisors = self.hypervisors.lock().unwrap_or_else(PoisonError::into_inner);
        let permits = || {
            Arc::new(Hypervisor {
                restores: Arc::new(Semaphore::new(self.restores)),
                preparations: PreparePermits::new(self.restores.min(MAX_PREPARATIONS)),
            })
        };
        Some(Arc::clone(
            hypervisors.as_mut()?.entry(machine.info().hypervisor.clone()).or_insert_with(permits),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::Events;
    use crate::fleet::fake_plugin::{FakePlugin, info};
    use machinery::MachineInfo;
    use std::time::Duration;
    use tokio::time::timeout;

    fn machine(name: &str, hypervisor: Option<&str>) -> Arc<Machine> {
        let machine = FakePlugin::default().machine(name, &Events::default());
        machine.set_info(MachineInfo { hypervisor: hypervisor.map(str::to_owned), ..info(name) });
        machine
    }

    #[tokio::test(start_paused = true)]
    async fn machine_gets_a_permit_when_those_of_another_hypervisor_are_used_up() {
        let permits = Permits::new(1);
        let [one, two] = ["one", "two"].map(|name| machine(name, None));
        let other = machine("other", Some("elsewhere"));
        let _restoring = permits.restore(&one).await.unwrap();
        let _preparing = permits.prepare(&one).await.unwrap();
        let second = Duration::from_secs(1);
        assert!(timeout(second, permits.restore(&two)).await.is_err());
        assert!(timeout(second, permits.prepare(&two)).await.is_err());
        let _restoring = timeout(second, permits.restore(&other)).await.unwrap().unwrap();
        let _preparing = timeout(second, permits.prepare(&other)).await.unwrap().unwrap();
        assert!(timeout(second, permits.restore(&other)).await.is_err());
        let (refused, ()) = tokio::join!(permits.restore(&other), async { permits.close() });
        assert!(refused.is_none() && permits.restore(&machine("new", Some("new"))).await.is_none());
    }
}
