//! The section `machineries: {qemu: …}` of `machinery-host.yaml`, as types.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use machinery::config::null_as_default;
use machinery::parse_bytes;
use machinery_backend::Standby;
use machinery_backend::jail::{JailMode, UserRange};
use serde::Deserialize;

use super::clones::{CloneAddresses, Clones};

/// Keys that were renamed, with their new names. The old names are accepted for one release.
pub const RENAMED: [(&str, &str); 3] = [
    ("template_dir", "instant_dir"),
    ("template_space", "instant_space_limit"),
    ("standby_memory", "standby_memory_limit"),
];

/// This machinery's section of `machinery-host.yaml`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Section {
    /// Keeps the overlays after a stop, for inspection.
    pub keep_disposable_disks: bool,
    instant: InstantMode,
    /// The folder of the templates; by default in the plugin's cache folder.
    #[serde(alias = "template_dir")]
    pub instant_dir: Option<PathBuf>,
    #[serde(alias = "template_space", deserialize_with = "parse_bytes")]
    pub instant_space_limit: Option<u64>,
    standby: Standby,
    #[serde(alias = "standby_memory", deserialize_with = "parse_bytes")]
    pub standby_memory_limit: Option<u64>,
    /// The memory that automatic standbys leave free, in bytes.
    #[serde(deserialize_with = "parse_bytes")]
    pub standby_memory_reserve: Option<u64>,
    /// True if machines have a console.
    console: bool,
    pub jail: JailMode,
    /// The users of the machines, where the host is root.
    pub jail_users: UserRange,
    network: NetworkMode,
    /// Other values for single machines.
    #[serde(deserialize_with = "null_as_default")]
    pub machines: BTreeMap<String, MachineSection>,
}

/// The mode of restores.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InstantMode {
    /// Restores are instant where that is possible.
    #[default]
    Auto,
    /// As `Auto`: this machinery leaves out no machine that can have a template.
    On,
    /// Each restore reads the whole snapshot.
    Off,
}

/// The network of a machine's runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// The bridge or tap that the operator has made.
    #[default]
    Operator,
    /// A cell: each run has a network of its own.
    Isolated,
}

/// The options of one machine of `qemu.yaml`, and of its clones.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MachineSection {
    instant: Option<InstantMode>,
    standby: Option<Standby>,
    console: Option<bool>,
    jail: Option<JailMode>,
    /// Allows a run to write to files or devices that the next run finds changed.
    pub allow_shared_writes: bool,
    /// Accepts arguments that are not in the list of safe ones.
    pub unsafe_start_args: bool,
    pub network: Option<NetworkMode>,
    /// The machines that replace this one.
    pub clones: Option<Clones>,
    /// The addresses of the clones, if `clones` is a number.
    pub clone_ips: Option<CloneAddresses>,
    /// The address inside the snapshot, if it differs from the machine's `ip`.
    pub guest_ip: Option<Ipv4Addr>,
}

/// The preparations of a machine's restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrepareOptions {
    pub instant: bool,
    pub standby: Standby,
}

impl Section {
    /// Returns the options of a machine: its own, else those of all machines.
    pub fn prepare_options(&self, machine: &str) -> PrepareOptions {
        let own = self.machines.get(machine);
        let instant = own.and_then(|own| own.instant).unwrap_or(self.instant) != InstantMode::Off;
        PrepareOptions { instant, standby: own.and_then(|own| own.standby).unwrap_or(self.standby) }
    }

    /// Reports whether each run of a machine has a network of its own. Clones need one.
    pub fn is_isolated(&self, machine: &str) -> bool {
        let own = self.machines.get(machine);
        let has_clones = own.is_some_and(|own| own.clones.is_some());
        has_clones || own.and_then(|own| own.network).unwrap_or(self.network) == NetworkMode::Isolated
    }

    /// Reports whether a machine has a console: by its own option, else by that of all machines.
    pub fn has_console(&self, machine: &str) -> bool {
        self.machines.get(machine).and_then(|own| own.console).unwrap_or(self.console)
    }

    /// Returns the confinement of a machine: its own, else that of all machines.
    pub fn jail_of(&self, machine: &str) -> JailMode {
        self.machines.get(machine).and_then(|own| own.jail).unwrap_or(self.jail)
    }
}
