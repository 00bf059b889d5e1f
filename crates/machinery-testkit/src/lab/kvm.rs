//! A lab of the kvm machinery: a CWD, a private libvirtd, and domains for tests.
//!
//! ```text
//! <scratch>/cwd/conf/machineries/kvm.yaml     as of an operator
//! <scratch>/cwd/machines/<name>/              a domain's disk, and the output of its guest
//! <scratch>/cwd/libvirt/                      all files of libvirtd
//! ```

use std::ffi::OsStr;
use std::fs;
use std::ops::Deref;
use std::path::PathBuf;

use machinery_backend::hash::fnv1a;
use rustix::process::Pid;

use super::leftovers::{self, collect_files};
use crate::Result;
use crate::client::Client;
use crate::error::Context;
use crate::guest::{Guest, GuestProbe, Qemu};
use crate::host::{self, RunningHost};
use crate::libvirt::{self, Libvirtd, SNAPSHOT};
use crate::network::loopback_address;
use crate::scratch::ScratchCwd;

/// A lab of the kvm machinery. Declare it before its hosts: they end first, and then it checks for leftovers.
#[derive(Debug)]
pub struct KvmLab {
    // Dropped first: the domains end before their folder is removed.
    libvirtd: Libvirtd,
    /// A second libvirtd, and the first of its machines.
    other: Option<(Libvirtd, usize)>,
    cwd: ScratchCwd,
    /// In the order of the configuration.
    machines: Vec<KvmMachine>,
    is_discarded: bool,
}

/// A machine that is a domain. It has its guest's [`GuestProbe`].
#[derive(Debug, Clone)]
pub struct KvmMachine {
    /// The domain's name.
    pub label: String,
    /// Its disk, with its snapshot inside.
    pub disk: PathBuf,
    /// The overlay of its disk, which exists during a run.
    pub overlay: PathBuf,
    /// Its guest, as far as a test can reach it.
    pub probe: GuestProbe,
}

impl Deref for KvmMachine {
    type Target = GuestProbe;

    fn deref(&self) -> &GuestProbe {
        &self.probe
    }
}

impl KvmLab {
    /// Makes a lab with these machines.
    pub fn new(machines: &[(&str, Guest)]) -> Result<Self> {
        let mut lab = Self::without_machines()?;
        for (name, guest) in machines {
            let machine = lab.define(&lab.libvirtd, name, &format!("lab-{name}"), *guest)?;
            lab.machines.push(machine);
        }
        lab.cwd.write_yaml("kvm", &lab.fresh_yaml())?;
        Ok(lab)
    }

    /// Makes a lab with two libvirtds. Each machine of the second one has the label of the machine at its place of the
    /// first one.
    pub fn with_two_libvirts(first: &[(&str, Guest)], second: &[(&str, Guest)]) -> Result<Self> {
        let mut lab = Self::new(first)?;
        let other = Libvirtd::start(&lab.cwd.root().join("libvirt2"))?;
        for ((name, guest), (twin, _)) in second.iter().zip(first) {
            let machine = lab.define(&other, name, &format!("lab-{twin}"), *guest)?;
            lab.machines.push(machine);
        }
        lab.other = Some((other, first.len()));
        lab.cwd.write_yaml("kvm", &lab.fresh_yaml())?;
        Ok(lab)
    }

    fn without_machines() -> Result<Self> {
        let cwd = ScratchCwd::new(&[("kvm", "")])?;
        let libvirtd = Libvirtd::start(&cwd.root().join("libvirt"))?;
        Ok(KvmLab { libvirtd, other: None, cwd, machines: Vec::new(), is_discarded: false })
    }

    fn define(&self, libvirtd: &Libvirtd, name: &str, label: &str, guest: Guest) -> Result<KvmMachine> {
        let dir = self.cwd.root().join("machines").join(name);
        fs::create_dir_all(&dir).context(|| format!("making {}", dir.display()))?;
        let probe = GuestProbe {
            name: name.to_owned(),
            ip: loopback_address().to_string(),
            serial: dir.join("serial.log"),
        };
        let disk = libvirt::master(&Qemu::find()?, guest)?.define(libvirtd, label, &probe)?;
        let libvirt = fnv1a([OsStr::new(&libvirtd.dsn())]);
        let overlay = disk.with_file_name(format!("{label}_{libvirt:016x}_disposable.qcow2"));
        Ok(KvmMachine { label: label.to_owned(), disk, overlay, probe })
    }

    /// Returns the CWD.
    pub fn cwd(&self) -> &ScratchCwd {
        &self.cwd
    }

    /// Returns the libvirtd.
    pub fn libvirtd(&self) -> &Libvirtd {
        &self.libvirtd
    }

    /// Returns the second libvirtd.
    ///
    /// # Panics
    /// The lab has one libvirtd.
    #[allow(clippy::panic)]
    pub fn other_libvirtd(&self) -> &Libvirtd {
        self.other.as_ref().map_or_else(|| panic!("the lab has one libvirtd"), |(other, _)| other)
    }

    /// Returns the machine of that name.
    ///
    /// # Panics
    /// The lab has no such machine.
    #[allow(clippy::panic)]
    pub fn machine(&self, name: &str) -> &KvmMachine {
        let found = self.machines.iter().find(|machine| machine.name == name);
        found.unwrap_or_else(|| panic!("the lab has no machine {name}"))
    }

    /// Returns the first count of a restored micro guest.
    pub fn restored_count(&self) -> Result<u32> {
        libvirt::master(&Qemu::find()?, Guest::Micro)?.restored_count()
    }

    /// Starts a host.
    pub fn host(&self) -> Result<RunningHost> {
        RunningHost::start(&self.cwd)
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

    /// Replaces the first `old` in `kvm.yaml`, which must be there, by `new`.
    pub fn change_yaml(&self, old: &str, new: &str) -> Result<()> {
        self.cwd.change_yaml("kvm", old, new)
    }

    /// Changes the descriptions of a domain that is off, and of its snapshot.
    pub fn change_domain(&self, label: &str, change: impl Fn(&str) -> String) -> Result<()> {
        let libvirtd = self.libvirtd();
        let snapshot = libvirtd.virsh(&["snapshot-dumpxml", "--security-info", label, SNAPSHOT])?;
        let domain = libvirtd.virsh(&["dumpxml", "--inactive", "--security-info", label])?;
        // libvirt compares the cards of an old snapshot with those of its new description.
        libvirtd.virsh(&["snapshot-delete", label, SNAPSHOT, "--metadata"])?;
        libvirtd.virsh_with_file(&["define"], &change(&domain), &[])?;
        let redefine = ["--redefine", "--current"];
        libvirtd.virsh_with_file(&["snapshot-create", label], &change(&snapshot), &redefine).map(drop)
    }

    /// Returns the QEMU of that machine.
    pub fn qemu_of(&self, name: &str) -> Result<Pid> {
        leftovers::qemu_on(&self.machine(name).disk, |command| command.contains("-blockdev"))
    }

    /// Lists the leftovers of runs: processes, except host and libvirtd, and unfinished files.
    pub fn leftovers(&self) -> Result<Vec<String>> {
        let mut left: Vec<_> = self.processes()?.iter().map(|process| format!("{process:?}")).collect();
        collect_files(&self.cwd.root().join("machines"), &mut left)?;
        Ok(left)
    }

    /// Ends the lab, and kills processes that are left without a failure: they have been reported.
    pub fn discard(mut self) {
        self.is_discarded = true;
    }

    /// Expects that there are no leftovers of runs.
    ///
    /// # Panics
    /// There are some.
    #[track_caller]
    pub fn assert_clean(&self) {
        assert_eq!(self.leftovers(), Ok(Vec::new()), "leftovers of a run");
    }

    fn fresh_yaml(&self) -> String {
        let mut text = format!("dsn: {}\ninterface: lo\nmachines:\n", self.libvirtd.dsn());
        for (number, machine) in self.machines.iter().enumerate() {
            text += &format!(
                "  {}:\n    label: {}\n    ip: {}\n    platform: windows\n    os_version: 10\n",
                machine.name, machine.label, machine.ip
            );
            if let Some((other, _)) = self.other.as_ref().filter(|(_, first)| number >= *first) {
                text += &format!("    dsn: {}\n", other.dsn());
            }
        }
        text
    }

    fn processes(&self) -> Result<Vec<(Pid, String)>> {
        leftovers::processes_below(self.cwd.root(), &["cuckoo-machinery", "libvirtd", "unshare"])
    }
}

impl Drop for KvmLab {
    fn drop(&mut self) {
        leftovers::end(self.leftovers(), &self.processes().unwrap_or_default(), self.is_discarded);
    }
}
