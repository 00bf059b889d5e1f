//! The machines of one host, and the resources that they claim.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::machine::Machine;
use crate::resources::Resource;

/// All machines. This list does not keep them alive.
#[derive(Default)]
pub struct Peers {
    machines: Mutex<Vec<Weak<Machine>>>,
    /// Locked while a machine decides whether it can be prepared.
    deciding: Mutex<()>,
}

/// Another machine, and the resource that both claim.
pub struct Rival {
    pub machine: Arc<Machine>,
    pub resource: Resource,
}

impl Peers {
    /// Adds a machine.
    pub fn add(&self, machine: &Arc<Machine>) {
        let mut machines = self.machines();
        machines.retain(|machine| machine.strong_count() > 0);
        machines.push(Arc::downgrade(machine));
    }

    /// Returns the other machines that claim a resource of this machine.
    pub fn rivals(&self, machine: &Machine) -> Vec<Rival> {
        let claimed = machine.resources();
        if claimed.is_empty() {
            return Vec::new();
        }
        let others: Vec<Arc<Machine>> = self.machines().iter().filter_map(Weak::upgrade).collect();
        let others = others.into_iter().filter(|other| !std::ptr::eq(&raw const **other, machine));
        let rival = |other: Arc<Machine>| {
            let is_claimed = |resource: &&Resource| claimed.iter().any(|own| own.clashes(resource));
            let resource = other.resources().iter().find(is_claimed)?.clone();
            Some(Rival { machine: other, resource })
        };
        others.filter_map(rival).collect()
    }

    /// Locks the decision whether a machine can be prepared: one machine at a time decides.
    pub fn decide(&self) -> MutexGuard<'_, ()> {
        self.deciding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn machines(&self) -> MutexGuard<'_, Vec<Weak<Machine>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
