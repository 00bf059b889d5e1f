//! The rights of a confined process. Everything else is denied.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The rights of a confined process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Files and folders that the process may read, besides the system's programs and libraries.
    pub read: Vec<PathBuf>,
    /// Files that the process may write, and folders below which it may create, write and remove files.
    pub write: Vec<PathBuf>,
    /// Folders in which the process may make Unix sockets. It may connect to any Unix socket then that its user reaches.
    pub sockets: Vec<PathBuf>,
    /// Devices that the process may use, such as `/dev/kvm`.
    pub devices: Vec<PathBuf>,
    /// Descriptors that the process inherits, besides 0, 1 and 2.
    pub descriptors: Vec<i32>,
    /// The network that the process may use.
    pub network: Network,
    /// TCP ports that the process may listen on.
    pub listen: Vec<u16>,
    /// Variables that the process gets besides `PATH` and `LANG`.
    pub environment: Vec<(String, String)>,
    /// True if the process may start other programs.
    pub spawn: bool,
    /// The limits of the process.
    pub limits: Limits,
    /// Layer B: the user of the process. The host has to be root.
    pub user: Option<User>,
    /// Layer B: true if the process gets a network namespace of its own, which is empty.
    pub own_network: bool,
    /// Layer B: the descriptor of the network namespace that the process enters, instead of one of its own. The process
    /// does not keep it.
    pub network_namespace: Option<i32>,
    /// Layer C: the cgroup that the process joins, as the path of its folder.
    pub cgroup: Option<PathBuf>,
}

/// The network that a process may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// No socket at all, except those that the process inherits.
    #[default]
    None,
    /// Sockets of IPv4 and IPv6 that listen on the ports of the policy, and connect nowhere by TCP.
    Listen,
    /// Sockets of every family: for a program that captures packets.
    Any,
    /// Sockets of IPv4 and IPv6: for a hypervisor that translates its guest's connections by itself.
    Internet,
}

/// The limits of a process. Source: getrlimit(2).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// The maximum size of a file that the process writes, in bytes.
    pub file_size: Option<u64>,
    /// The maximum memory, in bytes. The cgroup of layer C has this limit.
    pub memory: Option<u64>,
    /// The maximum number of processes and threads of the process's user. Only for a user of its own.
    pub processes: Option<u64>,
}

/// A user that belongs to one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// The number of the user.
    pub uid: u32,
    /// The number of its group.
    pub gid: u32,
    /// Further groups, such as that of `/dev/kvm`.
    #[serde(default)]
    pub groups: Vec<u32>,
}
