//! The machine that the demo shows, made for the machinery that is to drive it.

use std::fs;
use std::path::{Path, PathBuf};

use machinery_testkit::guest::{self, GuestProbe, MachineFolder, Qemu};
use machinery_testkit::libvirt::{self, Libvirtd};
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::json;

use super::{GUEST, MACHINE, Machinery, address};
use crate::run::{Context, Result};

/// A domain's name in libvirt, which need not be the machine's.
const LABEL: &str = "demo-domain";

/// A machine, and what an operator would write about it.
pub struct Machine {
    /// The word in the `machineries` list.
    pub machinery: &'static str,
    /// Its configuration file.
    pub yaml: String,
    /// How its guest is reached.
    pub probe: GuestProbe,
    /// The folder of its files.
    pub folder: PathBuf,
    /// The files that belong there.
    pub files: &'static [&'static str],
    /// The libvirtd that has it, as long as it lives.
    _libvirtd: Option<Libvirtd>,
}

/// Makes it below `scratch`.
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
        files: &["disk.qcow2", "memory.snapshot", "machineinfo.json", "serial.log"],
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

/// The begin of the list of machines, with the keys that all machineries share.
fn common_keys(probe: &GuestProbe) -> String {
    format!(
        "machines:\n  {MACHINE}:\n    ip: {}\n    platform: linux\n    os_version: \"12\"\n    tags: [demo]\n",
        probe.ip
    )
}

/// JSON is YAML too, and has a rule for every path.
fn path(path: &Path) -> serde_json::Value {
    json!(path.to_string_lossy())
}
