//! The demo's machine.

use std::fs;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use machinery_testkit::guest::{self, Guest, GuestProbe, MachineFolder, Qemu};
use machinery_testkit::libvirt::{self, Libvirtd};
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::json;

use crate::run::{Context, Result};

const GUEST: Guest = Guest::Linux { ram_mib: 512, noise_mib: 256 };

/// The machine's name.
pub const MACHINE: &str = "demo";

/// The domain's name in libvirt, which differs from the machine's.
const LABEL: &str = "demo-domain";

/// A machinery of the demo.
#[derive(Clone, Copy, ValueEnum)]
pub enum Machinery {
    /// QEMU processes; emulated, so that it works everywhere
    Qemu,
    /// Domains of a private libvirtd; emulated too
    Kvm,
}

/// A machine, with an operator's configuration of it.
pub struct Machine {
    /// The name in the `machineries` list.
    pub machinery: &'static str,
    /// The configuration file.
    pub yaml: String,
    /// The probe of its guest.
    pub probe: GuestProbe,
    /// The folder of its files.
    pub folder: PathBuf,
    /// The files that belong there.
    pub files: &'static [&'static str],
    /// The libvirtd of the domain; it ends when dropped.
    _libvirtd: Option<Libvirtd>,
}

/// Makes the machine below `scratch`.
pub fn make(machinery: Machinery, qemu: &Qemu, scratch: &Path) -> Result<Machine> {
    let folder = scratch.join("vms").join(MACHINE);
    match machinery {
        Machinery::Qemu => {
            let master = guest::master(qemu, GUEST)?;
            Ok(processes(qemu, master.machine(&folder, MACHINE, &address(), SnapshotFormat::Lz4)?))
        }
        Machinery::Kvm => domain(qemu, scratch, folder),
    }
}

fn processes(qemu: &Qemu, machine: MachineFolder) -> Machine {
    let yaml = format!(
        "interface: lo\ndisposable_copy_dir:\nbinaries:\n  qemu_img: {}\n  qemu_system_x86_64: {}\n{}    \
         qcow2_path: {}\n    snapshot_path: {}\n    machineinfo_path: {}\n",
        path(&qemu.img),
        path(&qemu.system),
        common_keys(&machine.probe),
        path(&machine.disk),
        path(&machine.snapshot),
        path(&machine.machineinfo),
    );
    Machine {
        machinery: "qemu",
        yaml,
        probe: machine.probe,
        folder: machine.dir,
        files: &["disk.qcow2", "memory.snapshot", "machineinfo.json", "serial.log", "vmlinuz", "initramfs"],
        _libvirtd: None,
    }
}

fn domain(qemu: &Qemu, scratch: &Path, folder: PathBuf) -> Result<Machine> {
    let master = libvirt::master(qemu, GUEST)?;
    let libvirtd = Libvirtd::start(&scratch.join("libvirt"))?;
    fs::create_dir_all(&folder).context(|| format!("cannot make {}", folder.display()))?;
    let probe = GuestProbe { name: MACHINE.to_owned(), ip: address(), serial: folder.join("serial.log") };
    master.define(&libvirtd, LABEL, &probe)?;
    let dsn = json!(libvirtd.dsn());
    let yaml = format!("dsn: {dsn}\ninterface: lo\n{}    label: {LABEL}\n", common_keys(&probe));
    Ok(Machine {
        machinery: "kvm",
        yaml,
        probe,
        folder,
        files: &["disk.qcow2", "serial.log"],
        _libvirtd: Some(libvirtd),
    })
}

/// Returns the begin of the list of machines, with the keys that all machineries share.
fn common_keys(probe: &GuestProbe) -> String {
    format!(
        "machines:\n  {MACHINE}:\n    ip: {}\n    platform: linux\n    os_version: \"12\"\n    tags: [demo]\n",
        probe.ip
    )
}

/// Returns a path as JSON, which is also YAML, and quotes every path.
fn path(path: &Path) -> serde_json::Value {
    json!(path.to_string_lossy())
}

/// Returns a loopback address for the agent, another one for each running demo.
fn address() -> String {
    let id = std::process::id();
    format!("127.77.{}.{}", id >> 8 & 0xff, (id & 0xff).clamp(1, 254))
}
