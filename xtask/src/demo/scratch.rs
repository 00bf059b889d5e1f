//! A Cuckoo CWD for the time of the demo.

use std::fs;
use std::path::{Path, PathBuf};

use machinery_testkit::guest::{MachineFolder, Qemu};
use serde_json::json;

use super::MACHINE;
use crate::run::{Context, Result};

/// The CWD; removed when it is dropped.
pub struct Scratch {
    folder: tempfile::TempDir,
}

impl Scratch {
    /// An empty CWD.
    pub fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("cuckoo-demo-").tempdir();
        let scratch = Self { folder: folder.context(|| "cannot make a folder for the demo".to_owned())? };
        scratch.write(".cuckoocwd", "")?;
        Ok(scratch)
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes the configuration that an operator would write for `machine`.
    pub fn configure(&self, qemu: &Qemu, machine: &MachineFolder) -> Result<()> {
        self.write("conf/cuckoo.yaml", CUCKOO)?;
        self.write("conf/machineries/qemu.yaml", &qemu_yaml(qemu, machine))
    }

    /// Fails if a host that has ended left a socket, or a disk of a run in `machine`.
    pub fn nothing_left(&self, machine: &Path) -> Result<()> {
        let mut left = files(&self.path().join("operational/sockets"));
        let known = ["disk.qcow2", "memory.snapshot", "machineinfo.json", "serial.log"];
        left.extend(files(machine).into_iter().filter(|path| !known.iter().any(|name| path.ends_with(name))));
        if left.is_empty() { Ok(()) } else { Err(format!("the host ended and left {left:?}").into()) }
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path().join(name);
        let what = || format!("cannot write {}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(&path)).context(what)?;
        fs::write(&path, text).context(what)
    }
}

const CUCKOO: &str = "\
machineries:
  - qemu
resultserver:
  listen_ip: 127.0.0.1
  listen_port: 2042
tcpdump:
  enabled: false
  path: /usr/bin/tcpdump
";

fn qemu_yaml(qemu: &Qemu, machine: &MachineFolder) -> String {
    // JSON is YAML too, and has a rule for every path.
    let path = |path: &Path| json!(path.to_string_lossy());
    format!(
        "\
interface: lo
disposable_copy_dir:
binaries:
  qemu_img: {}
  qemu_system_x86_64: {}
machines:
  {MACHINE}:
    qcow2_path: {}
    snapshot_path: {}
    machineinfo_path: {}
    ip: {}
    platform: linux
    os_version: \"12\"
    tags: [demo]
",
        path(&qemu.img),
        path(&qemu.system),
        path(&machine.disk),
        path(&machine.snapshot),
        path(&machine.machineinfo),
        machine.ip,
    )
}

fn files(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default()
}
