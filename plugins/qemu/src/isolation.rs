//! The network of a machine whose runs are isolated: each run is in a [cell](machinery_backend::cell) of its own.
//!
//! ```text
//! open_network ─▶ cell ─▶ start: QEMU runs in its namespace, its taps are in the cell's bridge ─▶ QEMU has ended
//!                  │ reload, shutdown                                                              │ close_network
//!                  └──────────────────────────────▶ closed ◀───────────────────────────────────────┘
//! ```
//!
//! QEMU holds the namespace of its cell. A later host that adopts the run knows the cell by the name of its interface.

use std::collections::BTreeSet;
use std::fs::DirEntry;
use std::net::Ipv4Addr;
use std::path::Path;

use machinery::{Error, Result};
use machinery_backend::cell::{self, CellSpec};
use machinery_backend::jail::JailMode;

use crate::config::{Isolation, MachineFiles};
use crate::machineinfo::NAME;
use crate::options::Options;
use crate::passed::BRIDGE;
use crate::resources::Resource;

/// The folder of the kernel with the host's interfaces.
const INTERFACES: &str = "/sys/class/net";

/// Removes the host's rules for the cells of that folder, unless a run that is left to the next host needs them.
pub fn remove_table(folder: &Path) {
    let interface = cell::interface_name(folder, "");
    let (prefix, _) = interface.split_once('-').unwrap_or_default();
    let mut entries = Path::new(INTERFACES).read_dir().into_iter().flatten().flatten();
    let is_cell = |entry: DirEntry| entry.file_name().to_string_lossy().starts_with(prefix);
    if cell::missing().is_some() || entries.any(is_cell) {
        return;
    }
    if let Err(error) = cell::remove_table(folder) {
        tracing::warn!(%error, "the rules for isolated networks remain");
    }
}

/// Reports whether the interface of the machine's cell exists, if it has one. Somebody may have removed it.
pub fn has_interface(files: &MachineFiles) -> bool {
    let exists = |isolation: &Isolation| Path::new(INTERFACES).join(&isolation.interface).exists();
    files.isolation.as_ref().is_none_or(exists)
}

/// Returns the description of the machine's cell; none if its network is the operator's.
pub fn spec_of(files: &MachineFiles) -> Option<CellSpec> {
    let isolation = files.isolation.as_ref()?;
    let bridge = networks(files).find_map(|(_, options)| options.get("br").map(str::to_owned));
    Some(CellSpec {
        interface: isolation.interface.clone(),
        address: isolation.address,
        guest: isolation.guest,
        bridge: bridge.unwrap_or_else(|| BRIDGE.to_owned()),
        result_server: isolation.result_server,
    })
}

/// Expects that the machine's runs can be isolated, if the operator wants that.
///
/// # Errors
/// The arguments have no tap or another network; the machine has no jail; this host can make no cell.
pub fn expect_isolated(files: &MachineFiles) -> Result<()> {
    if files.isolation.is_none() {
        return Ok(());
    }
    let advice = "Use -netdev bridge or -netdev tap, or remove network: isolated (clones need it)";
    let (mut taps, mut bridges) = (0, BTreeSet::new());
    for (argument, options) in networks(files) {
        match options.get("type").unwrap_or_default() {
            "bridge" => {
                taps += 1;
                bridges.insert(options.get("br").unwrap_or(BRIDGE).to_owned());
            }
            "tap" if !options.has("fd") && !options.has("fds") => taps += 1,
            "nic" | "none" => {}
            _ => {
                let reason = format!("its network is isolated, and its start_args have {argument}");
                return Err(Error::configuration(reason).advice(advice));
            }
        }
    }
    if taps == 0 {
        let reason = "its network is isolated, and its start_args have no tap";
        return Err(Error::configuration(reason).advice(advice));
    }
    if bridges.len() > 1 {
        let names = bridges.into_iter().collect::<Vec<_>>().join(", ");
        let reason =
            format!("its network is isolated and has one bridge, and its start_args have several: {names}");
        return Err(Error::configuration(reason).advice("Give all of its network cards the same br="));
    }
    if files.jail == JailMode::Off {
        let reason = "its network is isolated, and its jail is off: the jail brings QEMU into its network";
        return Err(
            Error::configuration(reason).advice("Set jail: auto for the machine in machinery-host.yaml")
        );
    }
    cell::expect_supported()
}

/// Expects that the files that QEMU makes are the machine's own, if other machines have the same arguments. All other files
/// are the same for these machines, because they have one template.
///
/// # Errors
/// A file or a socket that QEMU makes has the same path for all of these machines, or another file has not.
pub fn expect_own_files(files: &MachineFiles) -> Result<()> {
    if !files.is_shared {
        return Ok(());
    }
    let unnamed = MachineFiles { start_args: files.start_args.without_name(files.folder()), ..files.clone() };
    let has_name = |path: &Path| path.to_string_lossy().contains(NAME);
    if let Some(path) = unnamed.start_args.opened().paths().find(|path| has_name(path)) {
        let reason = "other machines share its template, and each would have another file of its start_args";
        return Err(Error::configuration(format!("{reason}: {}", path.display())).advice(format!(
            "Name one file for all of them: {NAME} is for files and sockets that a run makes"
        )));
    }
    let resources = Resource::of(&unnamed);
    let is_common = |resource: &&Resource| {
        let path = resource.file().or_else(|| resource.socket());
        path.is_some_and(|path| !has_name(path))
    };
    match resources.iter().find(is_common) {
        None => Ok(()),
        Some(resource) => Err(Error::configuration(format!(
            "other machines share its files, and its start_args make {resource} for each of them"
        ))
        .advice(format!("Put {NAME} into the name, which is replaced by the name of the machine"))),
    }
}

/// Expects that the address of an isolated machine is not taken by this host, whose addresses are given with the lengths of
/// their networks' prefixes.
///
/// # Errors
/// The host itself has the address, or uses it for all hosts of a network.
pub fn expect_free_address(address: Ipv4Addr, host: &[(Ipv4Addr, u8)]) -> Result<()> {
    let why = host.iter().find_map(|(own, length)| {
        let inner = u32::MAX.checked_shr(u32::from(*length)).unwrap_or(0);
        let (network, broadcast) = (own.to_bits() & !inner, own.to_bits() | inner);
        match address.to_bits() {
            _ if address == *own => Some("this host has it".to_owned()),
            // Networks with the prefixes 31 and 32 have only hosts.
            bits if inner > 1 && [network, broadcast].contains(&bits) => {
                let network = Ipv4Addr::from_bits(network);
                Some(format!("it is no address of a host in this host's network {network}/{length}"))
            }
            _ => None,
        }
    });
    match why {
        None => Ok(()),
        Some(why) => Err(Error::configuration(format!("its address {address} cannot be used: {why}"))
            .advice("Give the machine an address that nothing on this host uses")),
    }
}

/// Returns the network options of the arguments, with their texts.
fn networks(files: &MachineFiles) -> impl Iterator<Item = (String, Options)> {
    let options = files.start_args.options();
    options
        .filter(|(name, _)| matches!(*name, "netdev" | "nic" | "net"))
        .map(|(name, value)| (format!("-{name} {value}"), Options::parse(value, "type")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::isolated_machine_in;
    use crate::machineinfo::StartArgs;

    fn machine(args: &[&str]) -> MachineFiles {
        let folder = tempfile::tempdir().unwrap();
        MachineFiles {
            start_args: StartArgs::in_folder(args.iter().map(|&arg| arg.to_owned()), folder.path()),
            ..isolated_machine_in(folder.path(), "m")
        }
    }

    #[test]
    fn isolated_machine_is_refused_when_its_arguments_have_no_tap_or_another_network() {
        let why = |args: &[&str]| expect_isolated(&machine(args)).err().map(|error| error.to_string());
        let user = why(&["-netdev", "user,id=n", "-device", "e1000,netdev=n"]).unwrap();
        assert!(user.contains("its start_args have -netdev user,id=n"), "{user}");
        assert!(why(&["-nodefaults"]).unwrap().contains("no tap"));
        assert!(why(&["-netdev", "tap,id=n,fd=3"]).unwrap().contains("fd=3"));
        let mixed = why(&["-netdev", "tap,id=n,ifname=t", "-nic", "user"]).unwrap();
        assert!(mixed.contains("-nic user"), "{mixed}");
        let two = ["-netdev", "bridge,id=a,br=br1", "-netdev", "bridge,id=b,br=br1", "-nic", "bridge"];
        assert!(why(&two).unwrap().contains("have several: br0, br1"));
        for tap in [["-netdev", "bridge,id=n,br=br1"], ["-nic", "tap,ifname=tap0,script=no"]] {
            let why = why(&tap).unwrap_or_default();
            assert!(!why.contains("start_args"), "{why}");
        }
        let off = MachineFiles { jail: JailMode::Off, ..machine(&["-nic", "tap"]) };
        assert!(expect_isolated(&off).unwrap_err().to_string().contains("its jail is off"));
        assert_eq!(expect_isolated(&MachineFiles { isolation: None, ..machine(&["-nic", "user"]) }), Ok(()));
    }

    #[test]
    fn address_is_refused_when_it_is_the_hosts_or_that_of_all_hosts_of_its_network() {
        let of = |address: &str| address.parse::<Ipv4Addr>().unwrap();
        let host = [(of("192.168.30.1"), 24), (of("10.0.0.4"), 31), (of("10.9.9.9"), 32)];
        let why =
            |address: &str| expect_free_address(of(address), &host).err().map(|error| error.to_string());
        assert!(why("192.168.30.1").unwrap().contains("this host has it"));
        for all in ["192.168.30.0", "192.168.30.255"] {
            assert!(why(all).unwrap().contains("this host's network 192.168.30.0/24"), "{all}");
        }
        for free in ["192.168.30.110", "192.168.31.255", "10.0.0.5", "10.9.9.8"] {
            assert_eq!(why(free), None, "{free}");
        }
    }

    #[test]
    fn cell_has_the_bridge_of_the_arguments() {
        let bridge = |args: &[&str]| spec_of(&machine(args)).unwrap().bridge;
        assert_eq!(bridge(&["-netdev", "bridge,id=n,br=virbr7"]), "virbr7");
        assert_eq!(bridge(&["-netdev", "tap,id=n,ifname=tap0"]), "br0");
    }

    #[test]
    fn file_of_several_machines_is_refused_unless_it_has_the_name_of_each() {
        let why = |args: &[&str]| expect_own_files(&machine(args)).err().map(|error| error.to_string());
        let log = why(&["-serial", "file:serial.log"]).unwrap();
        assert!(log.contains("serial.log (-serial file:serial.log)") && log.contains("%MACHINE%"), "{log}");
        assert!(why(&["-vnc", "unix:vnc.sock"]).is_some());
        assert_eq!(why(&["-serial", "file:%MACHINE%.log", "-vnc", "unix:%MACHINE%/vnc.sock"]), None);
        for read in [
            ["-kernel", "%MACHINE%.kernel"],
            ["-cdrom", "%MACHINE%.iso"],
            ["-readconfig", "%MACHINE%.cfg"],
            ["-drive", "file=%MACHINE%.qcow2,if=virtio"],
            ["-drive", "if=pflash,file=%MACHINE%.fd"],
        ] {
            let refused = why(&read).unwrap_or_default();
            assert!(
                refused.contains("share its template") && refused.contains("%MACHINE%."),
                "{read:?} {refused}"
            );
        }
        assert_eq!(why(&["-vnc", ":1"]), None, "a port is in the machine's own network");
        assert_eq!(expect_own_files(&MachineFiles { is_shared: false, ..machine(&["-D", "log"]) }), Ok(()));
    }
}
