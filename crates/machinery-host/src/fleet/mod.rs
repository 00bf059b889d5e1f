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
use std::sync::{Arc, Mutex};

use machinery::Capabilities;
use machinery::host::Instance;

pub use machine::Machine;

/// A loaded machinery.
pub struct Machinery {
    /// Its name in the `machineries` list.
    pub name: String,
    /// Its plugin's methods.
    pub instance: Instance,
    /// Which of the optional ones are real.
    pub capabilities: Capabilities,
    /// The hypervisor's version, for people.
    pub version: String,
}

/// All machines, in the order of the configuration.
pub struct Fleet {
    machines: Vec<Arc<Machine>>,
    /// Held while a machine is given to a task.
    giving: Mutex<()>,
    by_name: HashMap<String, Arc<Machine>>,
}

impl Fleet {
    /// The fleet of these machines, whose names are unique.
    pub fn new(machines: Vec<Arc<Machine>>) -> Self {
        let by_name =
            machines.iter().map(|machine| (machine.info.name.clone(), Arc::clone(machine))).collect();
        Fleet { machines, giving: Mutex::new(()), by_name }
    }

    /// All of them.
    pub fn machines(&self) -> &[Arc<Machine>] {
        &self.machines
    }

    /// The machine of that name.
    pub fn find(&self, name: &str) -> Option<&Arc<Machine>> {
        self.by_name.get(name)
    }
}
