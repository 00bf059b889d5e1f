//! The site of a soak: a lab with a real machinery, the double beside it, small file systems, and a cgroup.
//!
//! ```text
//! <cwd>/machines/<name>/                   a machine; its QEMU opens serial.log there
//! <cwd>/tiny/                              a small file system: overlays, captures and dumps
//! <cwd>/operational/generated/…-host/      another one (qemu): the host's state and templates
//! ```

use std::fs;
use std::path::PathBuf;

use machinery_testkit::capture;
use machinery_testkit::guest::{Guest, GuestProbe};
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::{KvmLab, Lab, TestNetwork, TinyDisk};
use machinery_testkit::libvirt::Libvirtd;
use machinery_testkit::processes;
use machinery_testkit::scratch::{ScratchCwd, double};
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::Pid;

use super::cells::{Machinery, Missing};
use super::cgroups::Cgroups;
use super::clock::Clock;
use crate::run::{Context, Result};

/// The machines of the real machinery, named after their readiness. With kvm, the plain one is instant, too: a save
/// image is not a choice of single machines.
pub const PLAIN: &str = "plain";
pub const INSTANT: &str = "instant";
pub const STANDBY: &str = "standby";
pub const REAL: [&str; 3] = [PLAIN, INSTANT, STANDBY];
/// The machines of the double: one without faults, and one for the faults of a plugin.
pub const CALM: &str = "calm";
pub const FAULTY: &str = "faulty";

const STATE_FOLDER: &str = "operational/generated/machinery-host";

/// Each timeout is shorter than a client's patience.
const HOST: &str = "\
heal: auto
free_space_reserve: 0
timeouts: {restore_start: 20, norestore_start: 20, stop: 10, acpi_stop: 5, dump_memory: 15, screenshot: 1, \
                    prepare: 20, reload: 20, state: 5, shutdown: 10}
";
const QEMU: &str = "\
machineries:
  qemu:
    instant: off
    standby: off
    instant_space_limit: 16 GiB
    standby_memory_limit: 4 GiB
    machines: {instant: {instant: on}, standby: {instant: on, standby: on}}
";
const KVM: &str = "\
machineries:
  kvm:
    instant: on
    standby: off
    standby_memory_limit: 4 GiB
    machines: {standby: {standby: on}}
";

/// A lab of one of the machineries.
#[derive(Debug)]
enum AnyLab {
    Qemu(Lab),
    Kvm(KvmLab),
}

/// The site.
#[derive(Debug)]
pub struct Site {
    // Dropped before the lab, whose folder they are in.
    disks: Vec<TinyDisk>,
    lab: AnyLab,
    cgroups: Cgroups,
    clock: Option<Clock>,
    /// The configuration of the real machinery.
    yaml: String,
    restored_count: u32,
    pub machinery: Machinery,
    pub missing: Missing,
}

impl Site {
    /// Makes a site.
    pub fn new(machinery: Machinery) -> Result<Self> {
        let lab = match machinery {
            Machinery::Qemu => {
                let micro = |name| (name, Guest::Micro, SnapshotFormat::Lz4);
                AnyLab::Qemu(Lab::new(&REAL.map(micro))?)
            }
            Machinery::Kvm => AnyLab::Kvm(KvmLab::new(&REAL.map(|name| (name, Guest::Micro)))?),
        };
        let restored_count = match &lab {
            AnyLab::Qemu(lab) => lab.restored_count()?,
            AnyLab::Kvm(lab) => lab.restored_count()?,
        };
        let (disks, yaml, missing) = (Vec::new(), String::new(), Missing::default());
        let (cgroups, clock) = (Cgroups::new(), None);
        let mut site = Site { disks, lab, cgroups, clock, yaml, restored_count, machinery, missing };
        site.mount()?;
        site.configure()?;
        site.clock = Clock::new(site.cwd().root());
        if site.clock.is_none() {
            site.missing.clock = Some("there is no libfaketime, which makes a clock jump");
        }
        if !site.cgroups.limit_memory() {
            site.missing.memory = Some("this user may not make a cgroup with a limit of memory");
        }
        Ok(site)
    }

    fn mount(&mut self) -> Result<()> {
        let folders: &[&str] = match self.machinery {
            Machinery::Qemu => &["tiny", STATE_FOLDER],
            Machinery::Kvm => &["tiny"],
        };
        for folder in folders {
            match TinyDisk::mount_at(self.cwd(), folder, 192 * 1024)? {
                Some(disk) => self.disks.push(disk),
                None => self.missing.disk = Some("this user may not mount a small file system"),
            }
        }
        for folder in [self.outputs(), self.overlays()] {
            fs::create_dir_all(&folder).context(|| format!("cannot make {}", folder.display()))?;
        }
        Ok(())
    }

    fn configure(&mut self) -> Result<()> {
        let name = self.machinery.name();
        self.cwd().list_machineries(&[name, "double"])?;
        match capture::tcpdump() {
            // The kit's own network needs the same rights.
            _ if TestNetwork::new()?.is_none() => self.missing.capture = Some("this user may not capture"),
            Err(_) => self.missing.capture = Some("there is no tcpdump"),
            Ok(tcpdump) => self.cwd().capture_with(&tcpdump)?,
        }
        if self.machinery == Machinery::Qemu {
            let overlays = format!("disposable_copy_dir: {}\n", self.overlays().display());
            self.cwd().change_yaml(name, "disposable_copy_dir:\n", &overlays)?;
        }
        self.yaml = self.cwd().yaml(name)?;
        let section = if self.machinery == Machinery::Qemu { QEMU } else { KVM };
        self.cwd().host_yaml(&format!("{HOST}{section}"))?;
        self.write_double("")
    }

    /// Writes another configuration of all real machines: their tags differ.
    pub fn write_revision(&self, revision: u64) -> Result<()> {
        let tags = format!("os_version: 10\n    tags: [revision{revision}]\n");
        let yaml = self.yaml.replace("os_version: 10\n", &tags);
        Ok(self.cwd().write_yaml(self.machinery.name(), &yaml)?)
    }

    /// Breaks the configuration of the real machinery.
    pub fn break_yaml(&self) -> Result<()> {
        let broken = format!("{}  another: {{label: [\n", self.yaml);
        Ok(self.cwd().write_yaml(self.machinery.name(), &broken)?)
    }

    /// Writes the configuration of the double, with further keys for [`FAULTY`]. A diagnosis takes a moment, and so
    /// does a reload.
    pub fn write_double(&self, faulty: &str) -> Result<()> {
        let text = double(&[(CALM, "delays_ms: {diagnose: 200}"), (FAULTY, faulty)]);
        Ok(self.cwd().write_yaml("double", &text)?)
    }

    /// Starts a host.
    pub fn host(&self) -> Result<RunningHost> {
        Ok(RunningHost::start_with(self.cwd(), |command| self.cgroups.enter(command))?)
    }

    /// Starts a host whose clock can jump.
    pub fn host_with_clock(&self) -> Result<RunningHost> {
        let Some(clock) = &self.clock else { return self.host() };
        let mut applied = Ok(());
        let host = RunningHost::start_with(self.cwd(), |command| {
            applied = clock.apply_to(command);
            self.cgroups.enter(command);
        })?;
        applied.map(|()| host)
    }

    /// Lets the clock of a host jump.
    pub fn jump(&self, difference: &str) -> Result<()> {
        self.clock.as_ref().map_or(Ok(()), |clock| clock.set(difference))
    }

    /// Returns the CWD.
    pub fn cwd(&self) -> &ScratchCwd {
        match &self.lab {
            AnyLab::Qemu(lab) => lab.cwd(),
            AnyLab::Kvm(lab) => lab.cwd(),
        }
    }

    /// Returns the probe of a real machine's guest.
    pub fn probe(&self, machine: &str) -> &GuestProbe {
        match &self.lab {
            AnyLab::Qemu(lab) => &lab.folder(machine).probe,
            AnyLab::Kvm(lab) => &lab.machine(machine).probe,
        }
    }

    /// Returns the first count of a restored guest.
    pub fn restored_count(&self) -> u32 {
        self.restored_count
    }

    /// Returns the private libvirtd, if the machinery has one.
    pub fn libvirtd(&self) -> Option<&Libvirtd> {
        match &self.lab {
            AnyLab::Qemu(_) => None,
            AnyLab::Kvm(lab) => Some(lab.libvirtd()),
        }
    }

    /// Returns the cgroups of the host and of its programs.
    pub fn cgroups(&self) -> &Cgroups {
        &self.cgroups
    }

    /// Returns the file of a machine's memory. libvirtd writes it, too, and does not see the small file system.
    pub fn dump(&self) -> PathBuf {
        match self.machinery {
            Machinery::Qemu => self.outputs().join("dump"),
            Machinery::Kvm => self.cwd().root().join("dump"),
        }
    }

    /// Returns the folder of captures and dumps.
    pub fn outputs(&self) -> PathBuf {
        self.cwd().root().join("tiny/outputs")
    }

    /// Returns the folder of overlays.
    pub fn overlays(&self) -> PathBuf {
        self.cwd().root().join("tiny/overlays")
    }

    /// Returns the file of a machine's captured traffic.
    pub fn pcap(&self, machine: &str) -> PathBuf {
        self.outputs().join(format!("{machine}.pcap"))
    }

    /// Returns the folder of the host's state.
    pub fn state_folder(&self) -> PathBuf {
        self.cwd().root().join(STATE_FOLDER)
    }

    /// Returns the small file systems.
    pub fn disks(&self) -> &[TinyDisk] {
        &self.disks
    }

    /// Replaces a machine's snapshot by a copy, so that its template is old. Only qemu has such a file.
    pub fn renew_snapshot(&self, machine: &str) -> Result<()> {
        let AnyLab::Qemu(lab) = &self.lab else { return Ok(()) };
        let snapshot = &lab.folder(machine).snapshot;
        let copy = snapshot.with_extension("copy");
        let copied = fs::copy(snapshot, &copy).and_then(|_| fs::rename(&copy, snapshot));
        copied.context(|| format!("cannot copy {}", snapshot.display()))
    }

    /// Returns the QEMUs of a real machine.
    pub fn qemus(&self, machine: &str) -> Result<Vec<Pid>> {
        let marks = match &self.lab {
            AnyLab::Qemu(lab) => {
                [lab.folder(machine).serial.display().to_string(), "cuckoo-monitor".to_owned()]
            }
            AnyLab::Kvm(lab) => [lab.machine(machine).disk.display().to_string(), "-blockdev".to_owned()],
        };
        self.processes_with(|command| marks.iter().all(|mark| command.contains(mark)))
    }

    /// Returns the tcpdumps of a machine.
    pub fn tcpdumps(&self, machine: &str) -> Result<Vec<Pid>> {
        let pcap = self.pcap(machine).display().to_string();
        self.processes_with(|command| command.contains(&pcap))
    }

    fn processes_with(&self, is_wanted: impl Fn(&str) -> bool) -> Result<Vec<Pid>> {
        let found = processes::list()?.into_iter().filter(|(_, command)| is_wanted(command));
        Ok(found.map(|(pid, _)| pid).collect())
    }

    /// Returns the leftovers of runs.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        Ok(match &self.lab {
            AnyLab::Qemu(lab) => lab.leftovers()?,
            AnyLab::Kvm(lab) => lab.leftovers()?,
        })
    }

    /// Ends the site, also with leftovers that have been reported.
    pub fn discard(self) {
        drop(self.disks);
        match self.lab {
            AnyLab::Qemu(lab) => lab.discard(),
            AnyLab::Kvm(lab) => lab.discard(),
        }
    }
}
