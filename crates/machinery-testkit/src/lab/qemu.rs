//! A CWD with the qemu machinery and machines for tests.
//!
//! ```text
//! <scratch>/cwd/conf/machineries/qemu.yaml     the configuration of an operator
//! <scratch>/cwd/machines/<name>/               a machine as VMCloak makes it
//! ```
//!
//! Each process of a run has that folder on its command line, and each disk and socket is in it. The lab
//! finds leftovers by that, also of a killed host. A lab that is dropped kills leftover processes, and panics
//! if there are leftovers.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::process::Pid;

use super::leftovers::{self, collect_files};
use super::settings::HostSettings;
use crate::client::Client;
use crate::error::Context;
use crate::guest::{self, Guest, MachineFolder, Qemu};
use crate::host::{self, RunningHost};
use crate::network::{TestNetwork, loopback_address};
use crate::scratch::ScratchCwd;
use crate::snapshot::SnapshotFormat;
use crate::{Result, capture};

/// A lab. Declare it before the hosts that serve it, so that they end before the lab looks for leftovers.
#[derive(Debug)]
pub struct Lab {
    cwd: ScratchCwd,
    qemu: Qemu,
    machines: BTreeMap<String, MachineFolder>,
    network: Option<TestNetwork>,
    settings: Mutex<HostSettings>,
    is_discarded: bool,
}

impl Lab {
    /// Makes a lab with these machines.
    pub fn new(machines: &[(&str, Guest, SnapshotFormat)]) -> Result<Self> {
        Self::below(Path::new("cwd"), machines)
    }

    /// Makes a lab in the folder `path` of the scratch folder, for long paths.
    pub fn below(path: &Path, machines: &[(&str, Guest, SnapshotFormat)]) -> Result<Self> {
        let address = || loopback_address().to_string();
        Self::make(path, machines, address, None)
    }

    /// Makes a lab whose hosts and [machine](Guest::TrafficSource) run in a network of their own. Traffic is
    /// captured; QEMU [dumps](Lab::dumped) it, too, for comparison. `None` for a user who may not do that.
    pub fn with_network(name: &str, format: SnapshotFormat) -> Result<Option<Self>> {
        let machines = [(name, Guest::TrafficSource, format)];
        let Some(lab) = Self::in_network(&machines, Some(TestNetwork::GUEST))? else { return Ok(None) };
        let dump = format!("filter-dump,id=dump0,netdev=net0,file={}", lab.dumped(name).display());
        lab.change_start_args(name, |args| args.extend(["-object".to_owned(), dump]))?;
        Ok(Some(lab))
    }

    /// Makes a lab whose hosts run in a network of their own. Traffic is captured. `None` for a user who may not do that.
    pub fn in_network(
        machines: &[(&str, Guest, SnapshotFormat)],
        address: Option<Ipv4Addr>,
    ) -> Result<Option<Self>> {
        let Some(network) = TestNetwork::new()? else { return Ok(None) };
        let address = || address.unwrap_or_else(loopback_address).to_string();
        let lab = Self::make(Path::new("cwd"), machines, address, Some(network))?;
        lab.cwd.capture_with(&capture::tcpdump()?)?;
        let address = format!("listen_ip: {}", TestNetwork::HOST);
        lab.cwd.change_cuckoo_yaml("listen_ip: 127.0.0.1", &address)?;
        Ok(Some(lab))
    }

    /// Makes a lab. `address` returns the address of each machine in turn.
    pub(super) fn make(
        path: &Path,
        machines: &[(&str, Guest, SnapshotFormat)],
        mut address: impl FnMut() -> String,
        network: Option<TestNetwork>,
    ) -> Result<Self> {
        let (qemu, cwd) = (Qemu::find()?, ScratchCwd::below(path, &[("qemu", "")])?);
        let mut folder = |(name, guest, format): &(&str, Guest, SnapshotFormat)| {
            let dir = cwd.root().join("machines").join(name);
            let machine = guest::master(&qemu, *guest)?.machine(&dir, name, &address(), *format);
            Ok(((*name).to_owned(), machine?))
        };
        let machines = machines.iter().map(&mut folder).collect::<Result<_>>()?;
        let lab = Lab { cwd, qemu, machines, network, settings: Mutex::default(), is_discarded: false };
        lab.write_yaml(&lab.fresh_yaml())?;
        lab.host_yaml("", "")?;
        Ok(lab)
    }

    /// Returns the CWD.
    pub fn cwd(&self) -> &ScratchCwd {
        &self.cwd
    }

    /// Returns the QEMU of its machines.
    pub fn qemu(&self) -> &Qemu {
        &self.qemu
    }

    /// Returns the folder of a machine.
    ///
    /// # Panics
    /// There is no such machine.
    pub fn folder(&self, name: &str) -> &MachineFolder {
        &self.machines[name]
    }

    /// Returns the names of its machines.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.machines.keys().map(String::as_str)
    }

    /// Returns the path of a machine's overlay during a run.
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

    /// Returns the network of the lab.
    ///
    /// # Panics
    /// The lab was not made [with one](Lab::with_network).
    #[allow(clippy::panic)]
    pub fn network(&self) -> &TestNetwork {
        self.network.as_ref().unwrap_or_else(|| panic!("the lab has no network"))
    }

    /// Returns the path of QEMU's own dump of a machine's traffic in its last run.
    pub fn dumped(&self, name: &str) -> PathBuf {
        self.folder(name).dir.join("dumped.pcap")
    }

    /// Returns the first count of a restored micro guest.
    pub fn restored_count(&self) -> Result<u32> {
        Ok(guest::master(&self.qemu, Guest::Micro)?.snapshot_count()? + 1)
    }

    /// Starts a host for the lab.
    pub fn host(&self) -> Result<RunningHost> {
        RunningHost::start_with(&self.cwd, |command| {
            if let Some(network) = &self.network {
                network.attach(command);
            }
        })
    }

    /// Starts a host for the lab, and connects to it.
    pub fn serve(&self) -> Result<(RunningHost, Client)> {
        let host = self.host()?;
        let client = host.client()?;
        Ok((host, client))
    }

    /// Runs `cuckoo-machinery` with these arguments to its end.
    pub fn run(&self, arguments: &[&str]) -> Result<host::CommandOutput> {
        host::run(&self.cwd, arguments)
    }

    /// Returns the text of `qemu.yaml`.
    pub fn yaml(&self) -> Result<String> {
        self.cwd.yaml("qemu")
    }

    /// Replaces the text of `qemu.yaml`.
    pub fn write_yaml(&self, text: &str) -> Result<()> {
        self.cwd.write_yaml("qemu", text)
    }

    /// Writes `machinery-host.yaml`, with keys of the host and, after a comma, of the machinery. Preparation
    /// is off, so that a machine that is off has no files; [`ahead`](Lab::ahead) enables it.
    pub fn host_yaml(&self, host: &str, qemu: &str) -> Result<()> {
        self.write_settings(|settings| {
            settings.keys = (host.to_owned(), format!("instant: off, standby: off{qemu}"));
        })
    }

    /// Accepts unsafe arguments of a machine, now and in each later `machinery-host.yaml`.
    pub fn accept_unsafe_args(&self, name: &str) -> Result<()> {
        self.write_settings(|settings| {
            settings.unsafe_args.insert(name.to_owned());
        })
    }

    fn write_settings(&self, change: impl FnOnce(&mut HostSettings)) -> Result<()> {
        let mut settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut settings);
        self.cwd.host_yaml(&settings.text())
    }

    /// Writes `machinery-host.yaml` with these keys of the machinery, and a fixed space limit for templates,
    /// also where the disk is nearly full.
    pub fn ahead(&self, qemu: &str) -> Result<()> {
        self.write_settings(|settings| {
            settings.keys = (String::new(), format!("instant_space_limit: 16 GiB, {qemu}"));
        })
    }

    /// Returns the path of a machine's template, if it has one.
    pub fn template(&self, name: &str) -> PathBuf {
        self.cwd
            .root()
            .join("operational/generated/machinery-host/qemu/cache/templates")
            .join(format!("{name}.template"))
    }

    /// Replaces the first `old` in `qemu.yaml` by `new`. Fails if there is none.
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

    /// Replaces QEMU by a shell script, which prints `version` as its version. The script needs files that no QEMU needs,
    /// so it has no jail.
    pub fn fake_qemu(&self, version: &str, script: &str) -> Result<()> {
        let text =
            format!("[ \"$1\" = --version ] && echo 'QEMU emulator version {version}' && exit\n{script}");
        self.set_jail("off")?;
        let path = self.cwd.script("fake-qemu", &text)?;
        self.change_yaml(&self.qemu.system.display().to_string(), &path.display().to_string())
    }

    /// Changes the jail of all machines, now and in each later `machinery-host.yaml`: `auto`, `strict`, or `off`.
    pub fn set_jail(&self, mode: &'static str) -> Result<()> {
        self.write_settings(|settings| settings.jail = mode)
    }

    /// Has machines heal by themselves, now and in each later `machinery-host.yaml`.
    pub fn heal(&self) -> Result<()> {
        self.write_settings(|settings| settings.heal = "auto")
    }

    /// Returns the running QEMU of that machine.
    pub fn qemu_of(&self, name: &str) -> Result<Pid> {
        leftovers::qemu_on(&self.disposable(name), |command| !command.contains("qemu-img"))
    }

    /// Returns the running QEMU of a clone of that machine.
    pub fn qemu_of_clone(&self, base: &str, clone: &str) -> Result<Pid> {
        let disposable = self.folder(base).dir.join(format!("{clone}_disposable.qcow2"));
        leftovers::qemu_on(&disposable, |command| !command.contains("qemu-img"))
    }

    /// Returns the leftovers of runs: processes (without the host), overlays, monitors' sockets, unfinished
    /// files.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        let mut left: Vec<_> = self.processes()?.iter().map(|process| format!("{process:?}")).collect();
        collect_files(self.cwd.root(), &mut left)?;
        Ok(left)
    }

    /// Ends the lab, and kills processes that are left without a failure: they have been reported.
    pub fn discard(mut self) {
        self.is_discarded = true;
    }

    /// Asserts that there are no leftovers.
    ///
    /// # Panics
    /// There are leftovers.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!(self.leftovers(), Ok(Vec::new()), "leftovers of a run");
    }

    /// Returns the text of `qemu.yaml` with all machines, as the lab has made it.
    pub fn fresh_yaml(&self) -> String {
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

    /// Returns all processes with the lab on their command line, except hosts.
    fn processes(&self) -> Result<Vec<(Pid, String)>> {
        leftovers::processes_below(self.cwd.root(), &["cuckoo-machinery"])
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        leftovers::end(self.leftovers(), &self.processes().unwrap_or_default(), self.is_discarded);
    }
}
