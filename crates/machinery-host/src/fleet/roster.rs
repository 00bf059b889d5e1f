//! The machines of all machineries.
//!
//! A [`Roster`] never changes. A reload replaces the roster of the [`Fleet`], so whoever has one sees a
//! consistent list.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::{Machine, Machinery};

/// All machineries and their machines. The fleet is empty until they are loaded.
#[derive(Default)]
pub struct Fleet {
    /// Held while a machine is allocated to a task.
    pub(super) allocation_lock: Mutex<()>,
    roster: RwLock<Arc<Roster>>,
}

/// The machineries and machines at one moment.
#[derive(Default)]
pub struct Roster {
    machineries: Vec<Arc<Machinery>>,
    machines: Vec<Arc<Machine>>,
    by_name: HashMap<String, Arc<Machine>>,
}

impl Fleet {
    /// Returns the present roster.
    pub fn roster(&self) -> Arc<Roster> {
        Arc::clone(&self.roster.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces the roster.
    pub fn set(&self, roster: Roster) {
        *self.roster.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(roster);
    }

    /// Holds the lock of the allocation of machines until `released` returns, as a deadlock would.
    #[cfg(test)]
    pub fn hold_allocation_lock(&self, released: impl FnOnce()) {
        let _held = self.allocation_lock.lock().unwrap_or_else(PoisonError::into_inner);
        released();
    }

    /// Takes and releases the lock of the allocation of machines.
    pub fn pass_allocation_lock(&self) {
        drop(self.allocation_lock.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Returns the machine of that name.
    pub fn find(&self, name: &str) -> Option<Arc<Machine>> {
        self.roster().find(name).cloned()
    }
}

impl Roster {
    /// Returns a roster of these machineries and their machines, in the order of the configuration. Names are
    /// unique.
    pub fn new(machineries: Vec<Arc<Machinery>>, machines: Vec<Arc<Machine>>) -> Self {
        let by_name =
            machines.iter().map(|machine| (machine.name().to_owned(), Arc::clone(machine))).collect();
        Roster { machineries, machines, by_name }
    }

    /// Returns all machineries, as listed.
    pub fn machineries(&self) -> &[Arc<Machinery>] {
        &self.machineries
    }

    /// Returns all machines.
    pub fn machines(&self) -> &[Arc<Machine>] {
        &self.machines
    }

    /// Returns the machine of that name.
    pub fn find(&self, name: &str) -> Option<&Arc<Machine>> {
        self.by_name.get(name)
    }

    /// Reports whether the roster has this very machine, not only one of its name.
    pub fn has(&self, machine: &Arc<Machine>) -> bool {
        self.find(machine.name()).is_some_and(|same| Arc::ptr_eq(same, machine))
    }
}
