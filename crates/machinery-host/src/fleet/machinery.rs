//! A loaded machinery.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
    /// Held while the plugin diagnoses machines.
    pub diagnosing: Arc<tokio::sync::Mutex<()>>,
    /// See [`adopts`](Machinery::adopts).
    pub adopts: AtomicBool,
}

impl Machinery {
    /// Reports whether the next host adopts the runs of this one: the plugin supports it, and the configuration does not
    /// forbid it.
    pub fn adopts(&self) -> bool {
        self.adopts.load(Ordering::SeqCst)
    }
}
