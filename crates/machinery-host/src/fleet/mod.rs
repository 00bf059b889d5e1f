//! The machines of all machineries, and what is known of each.
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`machine`] | one machine: what it is, what it does, who has it |
//! | [`standing`] | who has a machine: locked, reserved, disabled |
//! | [`pool`] | giving machines to tasks, and which one to a task that names none |
//! | [`books`] | the standing of all machines, on disk, so that it outlives the host |
//! | [`services`] | what a plugin is given to report through |

pub mod books;
pub mod machine;
pub mod pool;
pub mod services;
pub mod standing;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use machinery::Capabilities;
use machinery::host::Instance;

pub use machine::Machine;

use crate::loader::PluginFile;

/// A loaded machinery.
pub struct Machinery {
    /// Its name in the `machineries` list.
    pub name: String,
    /// Its plugin's methods.
    pub instance: Arc<Instance>,
    /// Which of the optional ones are real.
    pub capabilities: Capabilities,
    /// The hypervisor's version, for people.
    pub version: String,
    /// The file its plugin was loaded from.
    pub plugin: PluginFile,
    /// Held while the plugin diagnoses machines.
    pub diagnosing: Arc<tokio::sync::Mutex<()>>,
}

/// All machineries and their machines. It is empty until they are loaded, and changes with the
/// configuration.
#[derive(Default)]
pub struct Fleet {
    /// Held while a machine is given to a task.
    giving: Mutex<()>,
    roll: RwLock<Arc<Roll>>,
}

/// Who is in the fleet at a time.
#[derive(Default)]
pub struct Roll {
    machineries: Vec<Arc<Machinery>>,
    machines: Vec<Arc<Machine>>,
    by_name: HashMap<String, Arc<Machine>>,
}

impl Fleet {
    /// Who is in it now.
    pub fn roll(&self) -> Arc<Roll> {
        Arc::clone(&self.roll.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts others in the place of those that are in it.
    pub fn set(&self, roll: Roll) {
        *self.roll.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(roll);
    }
}

impl Roll {
    /// These machineries, and their machines in the order of the configuration; names are unique.
    pub fn new(machineries: Vec<Arc<Machinery>>, machines: Vec<Arc<Machine>>) -> Self {
        let by_name =
            machines.iter().map(|machine| (machine.name().to_owned(), Arc::clone(machine))).collect();
        Roll { machineries, machines, by_name }
    }

    /// All machineries, as listed.
    pub fn machineries(&self) -> &[Arc<Machinery>] {
        &self.machineries
    }

    /// All machines.
    pub fn machines(&self) -> &[Arc<Machine>] {
        &self.machines
    }

    /// The machine of that name.
    pub fn find(&self, name: &str) -> Option<&Arc<Machine>> {
        self.by_name.get(name)
    }

    /// Whether that very machine is in it.
    pub fn is_member(&self, machine: &Arc<Machine>) -> bool {
        self.find(machine.name()).is_some_and(|same| Arc::ptr_eq(same, machine))
    }
}
