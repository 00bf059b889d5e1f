//! What a machine's QEMU may do: the policy of its jail, from its arguments.
//!
//! Everything that QEMU opens by a path is named in its arguments or made by this plugin. Everything else QEMU gets as a
//! descriptor: the monitor's socket, the RAM, snapshots, and [taps](crate::taps).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use machinery_backend::jail::{Layers, Limits, Network, Policy};
use machinery_images::{Chain, Header};

use crate::config::MachineFiles;
use crate::options::Options;
use crate::resources::Resource;

/// The maximum number of QEMU's threads: one for each processor of the guest, and at most 64 for input and output of each
/// event loop. Source: `THREAD_POOL_MAX_THREADS_DEFAULT` in QEMU's block/block-backend and util/thread-pool.c.
const THREADS: u64 = 1024;

/// The size that a file of a run may have beyond the size of the machine's largest disk, in bytes: qcow2's own data, or a
/// log.
const EXTRA_FILE_SIZE: u64 = 4 << 30;

/// The folders beside a QEMU that is not the system's, from which it reads firmware and libraries.
const DATA_FOLDERS: [&str; 4] = ["share/qemu", "share/seabios", "lib", "lib64"];

/// The number of machines of a group that a text names.
const SHOWN: usize = 3;

/// Returns what the machine's QEMU may do, apart from what it gets as descriptors.
pub fn policy_of(files: &MachineFiles, program: &Path, overlays: Vec<PathBuf>) -> Policy {
    let resources = Resource::of(files);
    let written = resources.iter().filter_map(Resource::file).map(Path::to_owned);
    let sockets = resources.iter().filter_map(Resource::socket).filter_map(Path::parent);
    let (network, listen) = network_of(files, &resources);
    let needs_host_network = network != Network::None;
    Policy {
        read: read_by(files, program),
        write: overlays.into_iter().chain(written).collect(),
        sockets: sockets.map(Path::to_owned).collect(),
        devices: devices_of(files),
        network,
        listen,
        own_network: !needs_host_network,
        limits: Limits { file_size: max_file_size(files), processes: Some(THREADS) },
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
    let chain = |path: &Path, format: Option<&str>| {
        // A chain that cannot be resolved makes the machine unusable, with a reason of its own.
        Chain::of(path, format).map_or_else(|_| Vec::new(), |chain| chain.files)
    };
    let images = files.images();
    let images = images.iter().flat_map(|image| chain(&image.path, image.format.as_deref()));
    let opened = files.start_args.opened();
    let sources = opened.sources.iter().flat_map(|source| {
        let found = chain(&source.path, source.format.as_deref());
        if found.is_empty() { vec![source.path.clone()] } else { found }
    });
    let prefix = program.parent().and_then(Path::parent).filter(|prefix| *prefix != Path::new("/"));
    let data = prefix.into_iter().flat_map(|prefix| DATA_FOLDERS.map(|folder| prefix.join(folder)));
    let own = std::iter::once(program.to_owned());
    let mut read: Vec<PathBuf> =
        own.chain(images).chain(sources).chain(data).filter(|path| path.exists()).collect();
    read.sort();
    read.dedup();
    read
}

/// Returns the network that the arguments use, and the TCP ports on which QEMU listens.
fn network_of(files: &MachineFiles, resources: &[Resource]) -> (Network, Vec<u16>) {
    let ports: Vec<(&str, u16)> = resources.iter().filter_map(Resource::port).collect();
    let mut listen: Vec<u16> =
        ports.iter().filter(|(protocol, _)| *protocol == "TCP").map(|(_, port)| *port).collect();
    listen.sort_unstable();
    listen.dedup();
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
            // A server that looks for a free port.
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

/// Returns the devices that the arguments name.
fn devices_of(files: &MachineFiles) -> Vec<PathBuf> {
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
    devices.sort_unstable();
    devices.dedup();
    devices.into_iter().map(PathBuf::from).filter(|device| device.exists()).collect()
}

fn max_file_size(files: &MachineFiles) -> Option<u64> {
    let size = |path: &Path| match Header::read(path) {
        Ok(Some(header)) => Some(header.size),
        _ => std::fs::metadata(path).ok().map(|found| found.len()),
    };
    let largest = files.images().iter().filter_map(|image| size(&image.path)).max()?;
    // Each cluster may be written once for the guest and once for a snapshot inside the image.
    largest.checked_mul(2)?.checked_add(EXTRA_FILE_SIZE)
}
