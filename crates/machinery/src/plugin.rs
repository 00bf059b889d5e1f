//! What a machinery plugin is: one trait, and the things it is given.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::{ConfigFile, MachineConfig};
use crate::{Deadline, Diagnosis, Error, Host, Reloaded, Report, Result, State};

/// A virtualisation backend.
///
/// # The requirements
///
/// - A call blocks until the hypervisor has *confirmed* the new state; the host never polls.
/// - A call returns by its deadline, with [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) if need be.
/// - At most one action runs for one machine at a time, any number for different machines.
///   [`state`](Machinery::state) may come at any moment, also during an action.
/// - What happens by itself (the guest powers off, the hypervisor dies) is reported at once through
///   [`Host::state_changed`].
/// - A failed start leaves nothing behind: no process, socket or disk.
/// - `restore_start` brings the machine to its snapshot, whatever an earlier run has done.
/// - A machine that is prepared, or just being prepared, is powered off to the outside. `stop` lets go
///   of what was prepared and holds memory, and may come while `prepare` runs, which gives up then.
pub trait Machinery: Sized + Send + Sync + 'static {
    /// The word for it in Cuckoo's `machineries` list, lowercase; the library is
    /// `libmachinery_<NAME>.so`, where `_` may stand for `-`.
    const NAME: &'static str;

    /// Machineries that cannot share a host with this one.
    const CONFLICTS: &'static [Conflict] = &[];

    /// Reads the configuration and makes ready to work. No machine is started. Leftovers of a host
    /// that died (processes, disks) are cleared away here.
    ///
    /// # Errors
    /// A configuration that cannot work, or a host that lacks what it needs. All problems at once
    /// where possible ([`Error::all`]).
    fn load(setup: &Setup, host: Host) -> Result<Self>;

    /// Looks at configuration and environment without changing anything, and notes all it finds.
    /// Runs without [`load`](Machinery::load), also beside a running host.
    fn check(setup: &Setup, report: &mut Report) {
        let _ = (setup, report);
    }

    /// The hypervisor's version, for people.
    ///
    /// # Errors
    /// The hypervisor cannot be reached.
    fn version(&self, deadline: Deadline) -> Result<String>;

    /// Which of the optional methods are real.
    fn capabilities(&self) -> Capabilities;

    /// All configured machines, in the order of the configuration. The same until a
    /// [`reload`](Machinery::reload).
    fn machines(&self) -> Vec<MachineInfo>;

    /// The machine's state now, from the hypervisor itself.
    ///
    /// # Errors
    /// The state is not to be had, or is one that has no name here.
    fn state(&self, machine: &str, deadline: Deadline) -> Result<State>;

    /// Brings a powered-off machine to its snapshot's state and lets it run.
    ///
    /// # Errors
    /// [`ErrorKind::UnexpectedState`](crate::ErrorKind::UnexpectedState) if it is not powered off;
    /// whatever kept it from running.
    fn restore_start(&self, machine: &str, deadline: Deadline) -> Result<()>;

    /// Starts the machine without its snapshot (cold boot), on a disposable disk all the same.
    ///
    /// # Errors
    /// As [`restore_start`](Machinery::restore_start).
    fn norestore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        let _ = (machine, deadline);
        Err(Error::unsupported("norestore_start"))
    }

    /// Pulls the plug. Returns when nothing of the run is left, nor of what stands by for the next one.
    ///
    /// # Errors
    /// [`ErrorKind::StateReached`](crate::ErrorKind::StateReached) if it is powered off already.
    fn stop(&self, machine: &str, deadline: Deadline) -> Result<()>;

    /// Presses the power button, and returns when the guest has powered off.
    ///
    /// # Errors
    /// [`ErrorKind::StateReached`](crate::ErrorKind::StateReached) if it is powered off already;
    /// [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) if the guest does not react.
    fn acpi_stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        let _ = (machine, deadline);
        Err(Error::unsupported("acpi_stop"))
    }

    /// Writes the guest's memory to `path`, readable by the caller. The machine runs on afterwards.
    /// Nothing is left at `path` on failure. Reports [`Host::progress`].
    ///
    /// # Errors
    /// The machine is off, the format is not known here, the dump failed.
    fn dump_memory(&self, machine: &str, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        let _ = (machine, path, format, deadline);
        Err(Error::unsupported("dump_memory"))
    }

    /// Writes what the guest's screen shows to `path`, as PNG.
    ///
    /// # Errors
    /// The machine is off or has no screen.
    fn screenshot(&self, machine: &str, path: &Path, deadline: Deadline) -> Result<()> {
        let _ = (machine, path, deadline);
        Err(Error::unsupported("screenshot"))
    }

    /// Does ahead of time all that [`restore_start`](Machinery::restore_start) will need, and tells how
    /// ready the machine is by [`Host::ready`]. The host calls it for a machine that is powered off
    /// and that no task has; [`stop`](Machinery::stop) may come meanwhile and ends it. Reports
    /// [`Host::progress`] where it takes long.
    ///
    /// # Errors
    /// What cannot be prepared; the next restore does without.
    /// [`ErrorKind::UnexpectedState`](crate::ErrorKind::UnexpectedState) if the machine is on.
    fn prepare(&self, machine: &str, deadline: Deadline) -> Result<()> {
        let _ = (machine, deadline);
        Err(Error::unsupported("prepare"))
    }

    /// Prepares the next restore without a request. The host calls this function at its start, after each
    /// run, and after [`Host::preparation_invalidated`]. It calls [`prepare`](Machinery::prepare) when an operator
    /// asks. Since interface 1.1; the default calls [`prepare`](Machinery::prepare).
    ///
    /// An automatic preparation never discards changes that somebody else made, such as a disk that an
    /// operator has written to, or a saved state. A plugin that would have to discard them logs a warning,
    /// reports the reason by [`Host::ready`], and returns `Ok`.
    ///
    /// # Errors
    /// As [`prepare`](Machinery::prepare).
    fn prepare_automatically(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.prepare(machine, deadline)
    }

    /// Takes over a new configuration while machines run; a [`MachineSet`](crate::MachineSet) knows how. Since
    /// interface 1.1.
    ///
    /// The machines `in_use` run, are acted on, or belong to a task: they stay as they are, whatever the
    /// configuration says of them now, and calls for them may come meanwhile. All others are powered off,
    /// and are not called until this returns. What stands by for one that changes or goes is let go.
    ///
    /// # Errors
    /// A configuration that cannot work, or that asks for what only [`load`](Machinery::load) can do. Then
    /// nothing has changed.
    fn reload(&self, setup: &Setup, in_use: &[String], deadline: Deadline) -> Result<Reloaded> {
        let _ = (setup, in_use, deadline);
        Err(Error::unsupported("reload"))
    }

    /// Diagnoses machines, and returns a diagnosis for each machine with an error or a warning. Since
    /// interface 1.1.
    ///
    /// The host calls this function for all machines after [`load`](Machinery::load) and each
    /// [`reload`](Machinery::reload). It calls it for one machine when an operator enables that machine. A
    /// file may have gone or come back in between, so a plugin answers nothing from memory. The machines may
    /// be in any state, and actions on them may come meanwhile.
    ///
    /// [`load`](Machinery::load) and [`reload`](Machinery::reload) refuse a configuration that is wrong as a
    /// whole. A machine that lacks its disk or snapshot is loaded all the same, and reported here.
    ///
    /// # Errors
    /// The machinery cannot diagnose its machines. The host logs the error and keeps the earlier results.
    fn diagnose(&self, machines: &[String], deadline: Deadline) -> Result<Vec<Diagnosis>> {
        let _ = (machines, deadline);
        Ok(Vec::new())
    }

    /// Ends the remainder of the plugin's runs, and its standbys, before the host ends. The host has already
    /// stopped the runs that it has started. A machine that somebody else has started keeps running.
    ///
    /// # Errors
    /// What could not be let go.
    fn shutdown(&self, deadline: Deadline) -> Result<()>;
}

/// A machinery that cannot share a host with the one that says so.
#[derive(Debug, Clone, Copy)]
pub struct Conflict {
    /// Its name in the `machineries` list.
    pub with: &'static str,
    /// Why not, for people.
    pub why: &'static str,
}

/// Which of the optional methods of [`Machinery`] are real.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// [`Machinery::norestore_start`]
    pub norestore_start: bool,
    /// [`Machinery::acpi_stop`]
    pub acpi_stop: bool,
    /// [`Machinery::dump_memory`]
    pub dump_memory: bool,
    /// [`Machinery::screenshot`]
    pub screenshot: bool,
    /// [`Machinery::prepare`]
    pub prepare: bool,
}

/// A machine as the rest of the sandbox sees it. The names are those of Cuckoo3's `Machine`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// Unique over all machineries.
    pub name: String,
    /// What the hypervisor calls it.
    pub label: String,
    /// The guest's address.
    pub ip: String,
    /// The operating system's family, lowercase.
    pub platform: String,
    /// The operating system's version.
    pub os_version: String,
    /// What is installed in it.
    pub tags: Vec<String>,
    /// The saved running state every analysis starts from.
    pub snapshot: Option<String>,
    /// Lowercase, `amd64` unless configured.
    pub architecture: String,
    /// Where its traffic can be captured.
    pub interface: Option<String>,
    /// The TCP port of Cuckoo's agent in the guest.
    pub agent_port: u16,
    /// Lowercase, with colons.
    pub mac_address: Option<String>,
}

impl MachineInfo {
    /// Puts the shared keys of a machine together with what only its machinery knows.
    /// `interface` is the machinery's own, for machines that have none.
    pub fn new(
        name: &str,
        config: &MachineConfig,
        label: String,
        snapshot: Option<String>,
        interface: &str,
    ) -> Self {
        MachineInfo {
            name: name.to_owned(),
            label,
            ip: config.ip.clone(),
            platform: config.platform.clone(),
            os_version: config.os_version.clone(),
            tags: config.tags.clone(),
            snapshot,
            architecture: config.architecture.clone(),
            interface: Some(config.interface.clone().unwrap_or_else(|| interface.to_owned())),
            agent_port: config.agent_port,
            mac_address: config.mac_address.clone(),
        }
    }

    /// What no two machines of a machinery may have in common, with the keys of the configuration: for
    /// [`Reloadable::unique`](crate::Reloadable::unique).
    pub fn unique(&self) -> Vec<(&'static str, Option<&str>)> {
        vec![
            ("label", Some(&self.label)),
            ("ip", Some(&self.ip)),
            ("mac_address", self.mac_address.as_deref()),
        ]
    }
}

/// What the memory dump's file looks like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DumpFormat {
    /// An ELF core file; every machinery that can dump can write it.
    #[default]
    Elf,
    /// A zlib-compressed kdump file.
    KdumpZlib,
    /// A Windows crash dump; needs a guest that provides the header (virtio-win's fwcfg driver).
    WinDmp,
}

impl DumpFormat {
    /// Its name in the protocol, which is QEMU's.
    pub fn as_str(self) -> &'static str {
        match self {
            DumpFormat::Elf => "elf",
            DumpFormat::KdumpZlib => "kdump-zlib",
            DumpFormat::WinDmp => "win-dmp",
        }
    }
}

/// What the host gives a plugin to start with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Setup {
    /// `conf/machineries/<name>.yaml`, read by the plugin itself.
    pub config: ConfigFile,
    /// `conf/machinery-host.yaml`, if there is one; the plugin's part is
    /// [`Setup::section`].
    pub host_config: Option<ConfigFile>,
    /// Where sockets go. A path in it may be longer than a socket address can hold.
    pub sockets_dir: PathBuf,
    /// What has to outlive the host. The plugin's own.
    pub state_dir: PathBuf,
    /// What can be made again. The plugin's own.
    pub cache_dir: PathBuf,
}

impl Setup {
    /// The section `machineries.<name>` of `machinery-host.yaml`, or its default.
    ///
    /// # Errors
    /// The section does not read as `T`: file, line and key are in the error.
    pub fn section<T>(&self, name: &str) -> Result<T>
    where
        T: for<'de> Deserialize<'de> + Default,
    {
        match &self.host_config {
            Some(file) => Ok(file.parse_at(&["machineries", name])?.unwrap_or_default()),
            None => Ok(T::default()),
        }
    }
}
