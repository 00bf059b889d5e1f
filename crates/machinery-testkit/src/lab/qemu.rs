//! A CWD with the qemu machinery and machines to do experiments on.
//!
//! ```text
//! <scratch>/cwd/conf/machineries/qemu.yaml     as an operator writes it
//! <scratch>/cwd/machines/<name>/               a machine as VMCloak leaves it
//! ```
//!
//! A run's processes have that folder on their command lines, and its disks and sockets are in it.
//! So what a run leaves is found here, whoever started it, also when the host was killed in between.
//! A lab that is dropped ends what is left, and is an error then: nothing may be left.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::Pid;

use super::leftovers::{self, collect_files};
use crate::error::Context;
use crate::guest::{self, Guest, MachineFolder, Qemu};
use crate::host::{self, RunningHost};
use crate::network::{TestNetwork, loopback_address};
use crate::scratch::ScratchCwd;
use crate::snapshot::SnapshotFormat;
use crate::{Result, capture};

/// Declare it before the hosts that serve it, so that they are gone before it looks what is left.
#[derive(Debug)]
pub struct Lab {
    cwd: ScratchCwd,
    qemu: Qemu,
    machines: BTreeMap<String, MachineFolder>,
    network: Option<TestNetwork>,
}

impl Lab {
    /// A lab with these machines.
    pub fn new(machines: &[(&str, Guest, SnapshotFormat)]) -> Result<Self> {
        Self::below(Path::new("cwd"), machines)
    }

    /// A lab in the folder `path` of the scratch folder: for long paths.
    pub fn below(path: &Path, machines: &[(&str, Guest, SnapshotFormat)]) -> Result<Self> {
        let address = || loopback_address().to_string();
        Self::make(path, machines, address, None)
    }

    /// A lab in a network of its own, with a [talking](Guest::TrafficSource) machine on its network; hosts run in
    /// that network. Its traffic is captured, and QEMU writes it down too, for
    /// [comparison](Lab::dumped). `None` for a user who may not do that.
    pub fn with_network(name: &str, format: SnapshotFormat) -> Result<Option<Self>> {
        let Some(network) = TestNetwork::new()? else { return Ok(None) };
        let machines = [(name, Guest::TrafficSource, format)];
        let lab = Self::make(Path::new("cwd"), &machines, || TestNetwork::GUEST.to_string(), Some(network))?;
        lab.cwd.capture_with(&capture::tcpdump()?)?;
        let address = format!("listen_ip: {}", TestNetwork::HOST);
        lab.cwd.change_cuckoo_yaml("listen_ip: 127.0.0.1", &address)?;
        let dump = format!("filter-dump,id=dump0,netdev=net0,file={}", lab.dumped(name).display());
        lab.change_start_args(name, |args| args.extend(["-object".to_owned(), dump]))?;
        Ok(Some(lab))
    }

    fn make(
        path: &Path,
        machines: &[(&str, Guest, SnapshotFormat)],
        address: impl Fn() -> String,
        network: Option<TestNetwork>,
    ) -> Result<Self> {
        let (qemu, cwd) = (Qemu::find()?, ScratchCwd::below(path, &[("qemu", "")])?);
        let folder = |(name, guest, format): &(&str, Guest, SnapshotFormat)| {
            let dir = cwd.root().join("machines").join(name);
            let machine = guest::master(&qemu, *guest)?.machine(&dir, name, &address(), *format);
            Ok(((*name).to_owned(), machine?))
        };
        let machines = machines.iter().map(folder).collect::<Result<_>>()?;
        let lab = Lab { cwd, qemu, machines, network };
        lab.write_yaml(&lab.fresh_yaml())?;
        lab.host_yaml("", "")?;
        Ok(lab)
    }

    /// Its CWD.
    pub fn cwd(&self) -> &ScratchCwd {
        &self.cwd
    }

    /// The QEMU that its machines run on.
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// The folder of one of its machines.
    ///
    /// # Panics
    /// It has no such machine.
    pub fn folder(&self, name: &str) -> &MachineFolder {
        &self.machines[name]
    }

    /// The names of its machines.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.machines.keys().map(String::as_str)
    }

    /// Where a machine's disposable disk is while it runs.
    pub fn disposable(&self, name: &str) -> PathBuf {
        self.folder(name).dir.join(format!("{name}_disposable.qcow2"))
    }

    /// Returns the path of the overlay of a machine's n-th image during a run; the disk is the first image.
    pub fn overlay(&self, name: &str, n: usize) -> PathBuf {
        match n {
            1 => self.disposable(name),
            n => self.folder(name).dir.join(format!("{name}_disposable_{n}.qcow2")),
        }
    }

    /// Its network.
    ///
    /// # Panics
    /// It is not [on one](Lab::with_network).
    #[allow(clippy::panic)]
    pub fn network(&self) -> &TestNetwork {
        self.network.as_ref().unwrap_or_else(|| panic!("the lab is on no network"))
    }

    /// What went over a machine's network in its last run, by QEMU's own account.
    pub fn dumped(&self, name: &str) -> PathBuf {
        self.folder(name).dir.join("dumped.pcap")
    }

    /// The first count of a micro guest that was restored.
    pub fn restored_count(&self) -> Result<u32> {
        Ok(guest::master(&self.qemu, Guest::Micro)?.snapshot_count()? + 1)
    }

    /// Starts a host for it.
    pub fn host(&self) -> Result<RunningHost> {
        RunningHost::start_with(&self.cwd, |command| {
            if let Some(network) = &self.network {
                network.attach(command);
            }
        })
    }

    /// Runs `cuckoo-machinery` with these arguments to its end.
    pub fn run(&self, arguments: &[&str]) -> Result<host::CommandOutput> {
        host::run(&self.cwd, arguments)
    }

    /// What `qemu.yaml` says.
    pub fn yaml(&self) -> Result<String> {
        self.cwd.yaml("qemu")
    }

    /// Writes `qemu.yaml` anew.
    pub fn write_yaml(&self, text: &str) -> Result<()> {
        self.cwd.write_yaml("qemu", text)
    }

    /// Writes `machinery-host.yaml`, with keys of the host and, after a comma, of the machinery. Nothing
    /// is done ahead of a restore, so that a machine that is off has left nothing; for what is done ahead,
    /// see [`ahead`](Lab::ahead).
    pub fn host_yaml(&self, host: &str, qemu: &str) -> Result<()> {
        self.cwd.host_yaml(&format!("{host}\nmachineries: {{qemu: {{instant: off, standby: off{qemu}}}}}\n"))
    }

    /// Writes `machinery-host.yaml` with just these keys of the machinery, and room for templates also where
    /// the disk is nearly full.
    pub fn ahead(&self, qemu: &str) -> Result<()> {
        self.cwd.host_yaml(&format!("machineries: {{qemu: {{instant_space_limit: 16 GiB, {qemu}}}}}\n"))
    }

    /// Where a machine's template is, if it has one.
    pub fn template(&self, name: &str) -> PathBuf {
        self.cwd
            .root()
            .join("operational/generated/machinery-host/qemu/cache/templates")
            .join(format!("{name}.template"))
    }

    /// Puts `new` in the place of the first `old` in `qemu.yaml`, where it has to be.
    pub fn change_yaml(&self, old: &str, new: &str) -> Result<()> {
        self.cwd.change_yaml("qemu", old, new)
    }

    /// Changes a machine's start arguments.
    pub fn change_start_args(&self, name: &str, change: impl FnOnce(&mut Vec<String>)) -> Result<()> {
        let machine = self.folder(name);
        let mut args = machine.start_args.clone();
        change(&mut args);
        let info = serde_json::json!({"machine": {"start_args": args}}).to_string();
        fs::write(&machine.machineinfo, info).context(|| format!("changing the arguments of {name}"))
    }

    /// Puts a shell script in QEMU's place. Asked for its version, it says `version`.
    pub fn fake_qemu(&self, version: &str, script: &str) -> Result<()> {
        let text =
            format!("[ \"$1\" = --version ] && echo 'QEMU emulator version {version}' && exit\n{script}");
        let path = self.cwd.script("fake-qemu", &text)?;
        self.change_yaml(&self.qemu.system.display().to_string(), &path.display().to_string())
    }

    /// The QEMU that runs for that machine.
    pub fn qemu_of(&self, name: &str) -> Result<Pid> {
        leftovers::qemu_on(&self.disposable(name), |command| !command.contains("qemu-img"))
    }

    /// What is there because of a run: processes (without the host), disposable disks, monitors'
    /// sockets, unfinished files.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        let mut left: Vec<_> = self.processes()?.iter().map(|process| format!("{process:?}")).collect();
        collect_files(self.cwd.root(), &mut left)?;
        Ok(left)
    }

    /// Nothing is left of any run.
    ///
    /// # Panics
    /// Something is.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!(self.leftovers(), Ok(Vec::new()), "this is left of a run");
    }

    fn fresh_yaml(&self) -> String {
        let mut text = format!(
            "interface: {}\ndisposable_copy_dir:\nbinaries:\n  qemu_img: {}\n  qemu_system_x86_64: {}\nmachines:\n",
            if self.network.is_some() { TestNetwork::TAP } else { "lo" },
            self.qemu.img.display(),
            self.qemu.system.display()
        );
        for machine in self.machines.values() {
            text += &format!(
                "  {}:\n    qcow2_path: {}\n    snapshot_path: {}\n    machineinfo_path: {}\n    ip: {}\n    \
                 platform: windows\n    os_version: 10\n",
                machine.name,
                machine.disk.display(),
                machine.snapshot.display(),
                machine.machineinfo.display(),
                machine.ip
            );
        }
        text
    }

    /// All that has the lab on its command line, but for the hosts.
    fn processes(&self) -> Result<Vec<(Pid, String)>> {
        leftovers::processes_below(self.cwd.root(), &["cuckoo-machinery"])
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let left = self.leftovers();
        leftovers::kill(&self.processes().unwrap_or_default());
        leftovers::expect_none(left);
    }
}
