//! The description of a machine for the sandbox.

use serde::{Deserialize, Serialize};

use crate::config::MachineConfig;

/// A machine, as the sandbox sees it. The names of the fields are those of Cuckoo3's `Machine`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Unique over all machineries.
    pub name: String,
    /// The hypervisor's name for the machine.
    pub label: String,
    /// The guest's address.
    pub ip: String,
    /// The operating system's family, lowercase.
    pub platform: String,
    /// The operating system's version.
    pub os_version: String,
    /// The software that is installed in the guest.
    pub tags: Vec<String>,
    /// The snapshot that every analysis starts from.
    pub snapshot: Option<String>,
    /// Lowercase, `amd64` unless configured.
    pub architecture: String,
    /// The network interface on which the machine's traffic can be captured.
    pub interface: Option<String>,
    /// The TCP port of Cuckoo's agent in the guest.
    pub agent_port: u16,
    /// Lowercase, with colons.
    pub mac_address: Option<String>,
    /// The confinement of the machine's hypervisor, for people; none if the machinery does not confine it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jail: Option<String>,
    /// True if the machine has a [`console`](crate::Machinery::console), because its operator has enabled it.
    #[serde(default)]
    pub console: bool,
    /// True if each run has a network of its own. The interface exists only from
    /// [`open_network`](crate::Machinery::open_network) until [`close_network`](crate::Machinery::close_network).
    #[serde(default)]
    pub own_network: bool,
    /// The machine whose snapshot this clone starts from; none for a machine that is no clone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_of: Option<String>,
    /// The hypervisor of this machine, such as its address, if the machinery has several; none for its main one. A label
    /// is unique within its hypervisor, and the host restores the machines of each hypervisor independently of the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<String>,
}

impl MachineInfo {
    /// Creates the info from the shared keys of a machine, and the values that only its machinery knows.
    /// `interface` is the machinery's, for machines without their own.
    pub fn new(
        name: &str,
        config: &MachineConfig,
        label: String,
        snapshot: Option<String>,
        interface: &str,
    ) -> Self {
        MachineInfo {
            name: name.to_owned(),
            label,
            ip: config.ip.clone(),
            platform: config.platform.clone(),
            os_version: config.os_version.clone(),
            tags: config.tags.clone(),
            snapshot,
            architecture: config.architecture.clone(),
            interface: Some(config.interface.clone().unwrap_or_else(|| interface.to_owned())),
            agent_port: config.agent_port,
            mac_address: config.mac_address.clone(),
            jail: None,
            console: false,
            own_network: false,
            clone_of: None,
            hypervisor: None,
        }
    }

    /// Returns the values that must be unique among the machines of a machinery, as (key, value). A machine in a network of
    /// its own may have the MAC address of another, and a machine of another hypervisor the label.
    pub fn unique(&self) -> Vec<(&'static str, Option<&str>)> {
        vec![
            ("label", Some(self.label.as_str()).filter(|_| self.hypervisor.is_none())),
            ("ip", Some(&self.ip)),
            ("mac_address", self.mac_address.as_deref().filter(|_| !self.own_network)),
        ]
    }
}
