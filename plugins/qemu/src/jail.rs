//! The policy of a machine's jail, from its arguments: the rights of its QEMU.
//!
//! Everything that QEMU opens by a path is named in its arguments or made by this plugin. Everything else QEMU gets as a
//! descriptor: the monitor's socket, the RAM, snapshots, taps, and [sockets](crate::passed).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use machinery_backend::jail::{Jail, Layers, Limits, Network, Policy, key_among};
use machinery_images::Header;

use crate::config::MachineFiles;
use crate::memory::of_guest;
use crate::options::Options;
use crate::passed::sockets;
use crate::resources::Resource;

/// The maximum number of QEMU's threads: one for each processor of the guest, and at most 64 for input and output of each
/// event loop. Source: `THREAD_POOL_MAX_THREADS_DEFAULT` in QEMU's block/block-backend and util/thread-pool.c.
const THREADS: u64 = 1024;

/// The size that a file of a run may have beyond the size of the machine's largest disk, in bytes: qcow2's own data, or a
/// log.
const EXTRA_FILE_SIZE: u64 = 4 << 30;

/// The memory that QEMU may use beyond the guest's RAM and a quarter of it, in bytes: video memory, caches, translated code.
const EXTRA_MEMORY: u64 = 2 << 30;

/// The port of the first VNC display, and the number of ports that a server may try.
const VNC: u16 = 5900;
const MAX_FREE_PORTS: u16 = 100;

/// The folders beside a QEMU that is not the system's, from which it reads firmware and libraries.
const DATA_FOLDERS: [&str; 4] = ["share/qemu", "share/seabios", "lib", "lib64"];

/// The number of machines of a group that a text names.
const SHOWN: usize = 3;

/// Returns the machine's jail. The disk is the key of the machine's user, because it belongs to one machine of the whole
/// computer. Machines that share their disk differ by their overlay, and have the disk's group in common, by which they
/// read their template.
pub fn jail_of(files: &MachineFiles) -> Jail {
    if !files.is_shared {
        return Jail::new(files.jail, &files.disk, files.jail_users);
    }
    let key = key_among(&files.disk, &files.disposable);
    Jail::new(files.jail, &key, files.jail_users).with_group_of(&files.disk, files.jail_users)
}

/// Returns what the machine's QEMU may do, apart from what it gets as descriptors.
pub fn policy_of(files: &MachineFiles, program: &Path, overlays: Vec<PathBuf>) -> Policy {
    let resources = Resource::of(files);
    let written = resources.iter().filter_map(Resource::file).map(Path::to_owned);
    let passed = sockets(files.start_args.options(), files.folder());
    let own = resources.iter().filter_map(Resource::socket);
    let own = own.filter(|path| !passed.iter().any(|passed| passed == path)).filter_map(Path::parent);
    let (network, listen) = network_of(files, &resources);
    let needs_host_network = network != Network::None;
    Policy {
        read: read_by(files, program),
        write: overlays.into_iter().chain(written).collect(),
        sockets: own.map(Path::to_owned).collect(),
        devices: devices_of(files, &resources),
        network,
        listen,
        own_network: !needs_host_network && files.isolation.is_none(),
        limits: Limits {
            file_size: max_file_size(files),
            memory: of_guest(&files.start_args)
                .and_then(|ram| (ram / 4).checked_add(EXTRA_MEMORY)?.checked_add(ram)),
            processes: Some(THREADS),
        },
        ..Policy::default()
    }
}

/// Groups machines by the layers of the jail that hold for them, and returns the text of each group: its machines and its
/// layers.
pub fn groups<'a>(machines: impl Iterator<Item = (&'a str, Layers)>) -> Vec<(Layers, String)> {
    let mut found: BTreeMap<String, (Layers, Vec<&str>)> = BTreeMap::new();
    for (name, layers) in machines {
        found.entry(layers.to_string()).or_insert_with(|| (layers, Vec::new())).1.push(name);
    }
    let text = |(layers, names): (Layers, Vec<&str>)| {
        let shown = names.iter().take(SHOWN).map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ");
        match names.len().saturating_sub(SHOWN) {
            0 => (layers, shown),
            more => (layers, format!("{shown} and {more} more")),
        }
    };
    found.into_values().map(text).collect()
}

/// Returns the files that QEMU reads.
fn read_by(files: &MachineFiles, program: &Path) -> Vec<PathBuf> {
    // A chain that breaks a rule makes the machine unusable, with a reason of its own.
    let chain = files.chain().unwrap_or_default();
    let prefix = program.parent().and_then(Path::parent).filter(|prefix| *prefix != Path::new("/"));
    let data = prefix.into_iter().flat_map(|prefix| DATA_FOLDERS.map(|folder| prefix.join(folder)));
    let all = std::iter::once(program.to_owned()).chain(chain).chain(data);
    all.filter(|path| path.exists()).collect()
}

/// Returns the network that the arguments use, and the TCP ports on which QEMU listens.
fn network_of(files: &MachineFiles, resources: &[Resource]) -> (Network, Vec<u16>) {
    let ports: Vec<(&str, u16)> = resources.iter().filter_map(Resource::port).collect();
    let mut listen: Vec<u16> =
        ports.iter().filter(|(protocol, _)| *protocol == "TCP").map(|(_, port)| *port).collect();
    listen.sort_unstable();
    listen.dedup();
    listen.extend(files.start_args.options().flat_map(|(name, value)| free_ports_of(name, value)));
    let mut names_network = false;
    let mut connects = false;
    let mut listens = !ports.is_empty();
    for (name, value) in files.start_args.options() {
        let options = Options::parse(value, if name == "chardev" { "backend" } else { "type" });
        match name {
            "netdev" | "nic" | "net" => {
                names_network = true;
                let kind = options.get("type").unwrap_or_default();
                connects |= matches!(kind, "user" | "socket" | "stream" | "dgram" | "l2tpv3");
            }
            "nodefaults" => names_network = true,
            "chardev" => {
                let is_remote = options.has("host") && options.get("backend") == Some("socket");
                connects |= options.get("backend") == Some("udp") || is_remote && !options.is_on("server");
            }
            "vnc" | "spice" => listens |= !value.starts_with("none") && !value.starts_with("unix:"),
            _ => {}
        }
    }
    // Without an option, QEMU translates the connections of a default network card. Source: `net_init_clients` in QEMU's
    // net/net.c.
    let network = match (connects || !names_network, listens) {
        (true, _) => Network::Internet,
        (false, true) => Network::Listen,
        (false, false) => Network::None,
    };
    (network, listen)
}

/// Returns the ports among which a VNC server looks for a free one. Source: `to` of `-vnc` in QEMU's qemu-options.hx.
fn free_ports_of(name: &str, value: &str) -> Vec<u16> {
    let options = match (name, value.strip_prefix("vnc=")) {
        ("vnc", _) => Options::parse(value, "vnc"),
        ("display", Some(value)) => Options::parse(value, "vnc"),
        _ => return Vec::new(),
    };
    let display = options.get("vnc").and_then(|vnc| vnc.rsplit(':').next()?.parse::<u16>().ok());
    let Some((first, last)) = display.zip(options.get("to").and_then(|to| to.parse::<u16>().ok())) else {
        return Vec::new();
    };
    let port = |display: u16| VNC.checked_add(display);
    (first..=last.min(first.saturating_add(MAX_FREE_PORTS))).filter_map(port).collect()
}

/// Returns the devices that the arguments name.
fn devices_of(files: &MachineFiles, resources: &[Resource]) -> Vec<PathBuf> {
    let mut devices: Vec<&str> = Vec::new();
    if files.start_args.wants_kvm() {
        devices.push("/dev/kvm");
    }
    for (name, value) in files.start_args.options() {
        match name {
            "netdev" | "nic" | "net" => {
                let options = Options::parse(value, "type");
                if options.is_on("vhost") || options.is_on("vhostforce") {
                    devices.push("/dev/vhost-net");
                }
            }
            "device" if value.contains("usb-host") => devices.push("/dev/bus/usb"),
            "device" if value.contains("vfio") => devices.push("/dev/vfio"),
            "device" if value.contains("vhost-vsock") => devices.push("/dev/vhost-vsock"),
            "serial" | "parallel" | "chardev" | "monitor" if value.contains("pty") => {
                devices.extend(["/dev/ptmx", "/dev/pts"]);
            }
            "object" if value.contains("/dev/hwrng") => devices.push("/dev/hwrng"),
            "object" if value.contains("/dev/random") => devices.push("/dev/random"),
            _ => {}
        }
    }
    let own = resources.iter().filter_map(Resource::device).map(Path::to_owned);
    let mut devices: Vec<PathBuf> = devices.into_iter().map(PathBuf::from).chain(own).collect();
    devices.sort_unstable();
    devices.dedup();
    devices.retain(|device| device.exists());
    devices
}

fn max_file_size(files: &MachineFiles) -> Option<u64> {
    let size = |path: &Path| match Header::read(path) {
        Ok(Some(header)) => Some(header.size),
        _ => std::fs::metadata(path).ok().map(|found| found.len()),
    };
    let largest = files.images().iter().filter_map(|image| size(&image.path)).max()?;
    // Each cluster may be written once for the guest and once for a snapshot inside the image. The guest's RAM may be a
    // file in memory.
    largest.checked_mul(2)?.max(of_guest(&files.start_args)?).checked_add(EXTRA_FILE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::machine_in;
    use crate::machineinfo::StartArgs;

    /// Returns the policy of a machine with these arguments, and its folder.
    fn policy(args: &[&str]) -> (Policy, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let start_args = StartArgs::in_folder(args.iter().map(|&arg| arg.to_owned()), folder.path());
        let files = MachineFiles { start_args, ..machine_in(folder.path()) };
        (policy_of(&files, Path::new("/opt/qemu/bin/qemu"), files.overlays()), folder)
    }

    #[test]
    fn network_is_none_unless_the_arguments_use_one() {
        let network = |args: &[&str]| {
            let policy = policy(args).0;
            (policy.network, policy.listen, policy.own_network)
        };
        assert_eq!(network(&["-nodefaults"]), (Network::None, vec![], true));
        assert_eq!(network(&["-nic", "tap,ifname=tap0,script=no"]), (Network::None, vec![], true));
        assert_eq!(network(&["-m", "32"]), (Network::Internet, vec![], false), "the default card");
        let user = ["-netdev", "user,id=n,hostfwd=tcp:127.0.0.1:2222-:22"];
        assert_eq!(network(&user), (Network::Internet, vec![2222], false));
        assert_eq!(network(&["-nodefaults", "-vnc", ":1"]), (Network::Listen, vec![5901], false));
        assert_eq!(network(&["-nodefaults", "-vnc", "none"]).0, Network::None);
        let client = ["-nodefaults", "-chardev", "socket,id=c,host=1.2.3.4,port=5"];
        assert_eq!(network(&client).0, Network::Internet);
    }

    #[test]
    fn written_files_are_those_of_the_arguments_and_the_overlays() {
        let args =
            ["-serial", "file:serial.log", "-vnc", "unix:s/vnc", "-chardev", "socket,id=c,path=c,server=on"];
        let (policy, folder) = policy(&args);
        let path = |name: &str| folder.path().join(name);
        assert_eq!(policy.write, [path("m_disposable.qcow2"), path("serial.log")]);
        assert_eq!(policy.sockets, [path("s")]);
        assert!(policy.read.contains(&path("disk.qcow2")), "{:?}", policy.read);
    }
}
