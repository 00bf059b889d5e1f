//! A loaded machinery.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use machinery::Capabilities;
use machinery::host::Instance;

use crate::plugin::search::PluginFile;

/// A loaded machinery.
pub struct Machinery {
    /// The name in the `machineries` list.
    pub name: String,
    /// The plugin's methods.
    pub instance: Arc<Instance>,
    /// The optional methods that the plugin implements.
    pub capabilities: Capabilities,
    /// The hypervisor's version, for people.
    pub version: String,
    /// The file that the plugin was loaded from.
    pub plugin: PluginFile,
    /// See [`diagnosing`](Machinery::diagnosing).
    pub diagnosing: Diagnosing,
    /// See [`adopts`](Machinery::adopts).
    pub adopts: AtomicBool,
    /// The losses of the machinery's runs.
    pub losses: Losses,
}

/// A lock for each hypervisor of the machinery.
pub type Diagnosing = Mutex<HashMap<Option<String>, Arc<tokio::sync::Mutex<()>>>>;

/// The number of losses since the start of the host.
#[derive(Debug, Default)]
pub struct Losses {
    /// The captures that have failed or have lost packets.
    pub captures: AtomicU64,
    /// The errors of tasks' runs.
    pub run_errors: AtomicU64,
}

impl Machinery {
    /// Returns the lock that is held while the plugin diagnoses machines of that hypervisor.
    pub fn diagnosing(&self, hypervisor: Option<&String>) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.diagnosing.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(locks.entry(hypervisor.cloned()).or_default())
    }

    /// Reports whether the next host adopts the runs of this one: the plugin supports it, and the configuration does not
    /// forbid it.
    pub fn adopts(&self) -> bool {
        self.adopts.load(Ordering::SeqCst)
    }
}
