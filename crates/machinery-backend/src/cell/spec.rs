//! The description of a cell, and the names of its interfaces.

use std::ffi::OsStr;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

use machinery::{Error, Result};

use crate::hash::fnv1a;

/// The beginning of the names of all cells' interfaces on the host.
pub const INTERFACES: &str = "cm";
/// The interface inside the cell that leads to the host. No bridge or tap of a hypervisor's arguments has that name.
pub const UPLINK: &str = "uplink";

/// The description of a cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CellSpec {
    /// The name of the interface on the host: see [`interface_name`].
    pub interface: String,
    /// The machine's own address, which the host and Cuckoo use.
    pub address: Ipv4Addr,
    /// The address inside the snapshot. It may be the machine's own.
    pub guest: Ipv4Addr,
    /// The name of the bridge inside.
    pub bridge: String,
    /// The result server, which the guest reaches also if it is this host.
    pub result_server: Option<SocketAddrV4>,
}

/// Returns the name of a machine's interface on the host, which no other machine and no other folder has: 15 bytes, such
/// as `cm1f3a-09bc44d2`.
pub fn interface_name(folder: &Path, machine: &str) -> String {
    let hash = fnv1a([folder.as_os_str(), OsStr::new("\n"), OsStr::new(machine)]);
    format!("{}-{:08x}", prefix(folder), hash & 0xffff_ffff)
}

/// Returns the beginning of the names of a folder's interfaces.
pub fn prefix(folder: &Path) -> String {
    format!("{}{:04x}", INTERFACES, fnv1a([folder.as_os_str()]) & 0xffff)
}

/// Returns the part of an interface's name that the machines of a folder share.
pub fn prefix_of(interface: &str) -> Result<&str> {
    let is_hex =
        |text: &str, length| text.len() == length && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let parts = interface.strip_prefix(INTERFACES).and_then(|rest| rest.split_once('-'));
    match parts.filter(|(folder, machine)| is_hex(folder, 4) && is_hex(machine, 8)) {
        Some((folder, _)) => Ok(&interface[..INTERFACES.len() + folder.len()]),
        None => Err(Error::failed(format!("'{interface}' is no name of a cell's interface"))),
    }
}

/// Expects a name that the kernel, the rules and the paths of parameters take as it is.
pub fn expect_bridge_name(name: &str) -> Result<()> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let is_reserved = [UPLINK, "lo", "all", "default", ".", ".."].contains(&name);
    if (1..=15).contains(&name.len()) && name.bytes().all(is_plain) && !is_reserved {
        return Ok(());
    }
    Err(Error::configuration(format!("the bridge of an isolated network cannot have the name '{name}'"))
        .advice("Use at most 15 letters, digits, '-', '_' and '.'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_name_differs_by_folder_and_machine_and_never_changes() {
        let name = |folder, machine| interface_name(Path::new(folder), machine);
        assert_eq!(name("/cwd", "win10_1"), "cmf31c-aad78395");
        assert_ne!(name("/cwd", "win10_1"), name("/cwd", "win10_2"));
        assert_eq!(prefix_of(&name("/cwd", "win10_1")), prefix_of(&name("/cwd", "win10_2")));
        assert_ne!(prefix_of(&name("/cwd", "a")).unwrap(), prefix_of(&name("/other", "a")).unwrap());
    }

    #[test]
    fn interface_of_others_is_no_interface_of_a_cell() {
        for other in ["eth0", "cm0", "cm12-34", "cm1234-5678901x", "cm1234-56789012 "] {
            let refused = prefix_of(other).unwrap_err().to_string();
            assert!(refused.contains("is no name of a cell's interface"), "{refused}");
        }
    }
}
