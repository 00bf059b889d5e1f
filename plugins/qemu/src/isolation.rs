//! The network of a machine whose runs are isolated: each run is in a [cell](machinery_backend::cell) of its own.
//!
//! ```text
//! open_network ─▶ cell ─▶ start: QEMU runs in its namespace, its taps are in the cell's bridge ─▶ QEMU has ended
//!                  │ reload, shutdown                                                              │ close_network
//!                  └──────────────────────────────▶ closed ◀───────────────────────────────────────┘
//! ```
//!
//! QEMU holds the namespace of its cell. A later host that adopts the run knows the cell by the name of its interface.

use std::fs::DirEntry;
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
    let mut taps = 0;
    for (argument, options) in networks(files) {
        match options.get("type").unwrap_or_default() {
            "bridge" => taps += 1,
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
    if files.jail == JailMode::Off {
        let reason = "its network is isolated, and its jail is off: the jail brings QEMU into its network";
        return Err(
            Error::configuration(reason).advice("Set jail: auto for the machine in machinery-host.yaml")
        );
    }
    cell::expect_supported()
}

/// Expects that the files that QEMU makes are the machine's own, if other machines have the same arguments.
///
/// # Errors
/// A file or a socket has the same path for all of these machines.
pub fn expect_own_files(files: &MachineFiles) -> Result<()> {
    if !files.is_shared {
        return Ok(());
    }
    let unnamed = MachineFiles { start_args: files.start_args.without_name(files.folder()), ..files.clone() };
    let resources = Resource::of(&unnamed);
    let is_common = |resource: &&Resource| {
        let path = resource.file().or_else(|| resource.socket());
        path.is_some_and(|path| !path.to_string_lossy().contains(NAME))
    };
    match resources.iter().find(is_common) {
        None => Ok(()),
        Some(resource) => Err(Error::configuration(format!(
            "other machines share its files, and its start_args make {resource} for each of them"
        ))
        .advice(format!("Put {NAME} into the name, which is replaced by the name of the machine"))),
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
        for tap in [["-netdev", "bridge,id=n,br=br1"], ["-nic", "tap,ifname=tap0,script=no"]] {
            let why = why(&tap).unwrap_or_default();
            assert!(!why.contains("start_args"), "{why}");
        }
        let off = MachineFiles { jail: JailMode::Off, ..machine(&["-nic", "tap"]) };
        assert!(expect_isolated(&off).unwrap_err().to_string().contains("its jail is off"));
        assert_eq!(expect_isolated(&MachineFiles { isolation: None, ..machine(&["-nic", "user"]) }), Ok(()));
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
        assert_eq!(why(&["-vnc", ":1"]), None, "a port is in the machine's own network");
        assert_eq!(expect_own_files(&MachineFiles { is_shared: false, ..machine(&["-D", "log"]) }), Ok(()));
    }
}
