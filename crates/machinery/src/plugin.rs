//! The [`Machinery`] trait that a plugin implements, and the types around it.

use std::os::fd::OwnedFd;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Deadline, Diagnosis, Error, Host, MachineInfo, Reloaded, Report, Result, Setup, State};

/// A virtualisation backend.
///
/// # The requirements
///
/// - A call blocks until the hypervisor has *confirmed* the new state; the host never polls.
/// - A call returns by its deadline, with [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) if necessary.
/// - The host runs at most one action on a machine at a time, and any number on different machines. It may call
///   [`state`](Machinery::state) at any time, also during an action.
/// - A change of state without an action (the guest powers off, the hypervisor dies) is reported at once through
///   [`Host::state_changed`].
/// - A failed start has no leftovers: no process, socket or disk.
/// - `restore_start` restores the machine to its snapshot, whatever the previous run has done.
/// - A machine is reported as powered off while it is prepared, and afterwards. `stop` discards a standby and frees
///   its memory. It may be called during `prepare`, which then ends early.
pub trait Machinery: Sized + Send + Sync + 'static {
    /// The machinery's name in Cuckoo's `machineries` list, lowercase. The library is `libmachinery_<NAME>.so`; it
    /// may have `_` where the name has `-`.
    const NAME: &'static str;

    /// Machineries that cannot share a host with this one.
    const CONFLICTS: &'static [Conflict] = &[];

    /// Reads the configuration and removes the leftovers of a host that died (processes, disks). It starts no
    /// machine. Where [`Setup::adopts`] is true, a plugin with [`adopt`](Machinery::adopt) leaves them for that method.
    ///
    /// # Errors
    /// The configuration cannot work, or the computer lacks something that the machinery needs. The error lists all
    /// problems where possible ([`Error::all`]).
    fn load(setup: &Setup, host: Host) -> Result<Self>;

    /// Checks configuration and environment without changing anything, and adds the findings to the report. It runs
    /// without [`load`](Machinery::load), also while another host runs.
    fn check(setup: &Setup, report: &mut Report) {
        let _ = (setup, report);
    }

    /// Returns the hypervisor's version, for people.
    ///
    /// # Errors
    /// The hypervisor cannot be reached.
    fn version(&self, deadline: Deadline) -> Result<String>;

    /// Returns the optional methods that the plugin implements.
    fn capabilities(&self) -> Capabilities;

    /// Returns all configured machines, in the order of the configuration. The list only changes with a
    /// [`reload`](Machinery::reload).
    fn machines(&self) -> Vec<MachineInfo>;

    /// Returns the machine's current state, as the hypervisor reports it.
    ///
    /// # Errors
    /// The hypervisor does not report a state, or reports one that [`State`] does not have.
    fn state(&self, machine: &str, deadline: Deadline) -> Result<State>;

    /// Restores a powered-off machine to its snapshot and resumes it.
    ///
    /// # Errors
    /// [`ErrorKind::UnexpectedState`](crate::ErrorKind::UnexpectedState) if the machine is not powered off; any
    /// reason why it does not run.
    fn restore_start(&self, machine: &str, deadline: Deadline) -> Result<()>;

    /// Starts the machine without its snapshot (cold boot), also on a disposable disk.
    ///
    /// # Errors
    /// As [`restore_start`](Machinery::restore_start).
    fn norestore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        let _ = (machine, deadline);
        Err(Error::unsupported("norestore_start"))
    }

    /// Ends the machine's run at once, without the guest. Returns when neither the run nor a standby has leftovers.
    ///
    /// # Errors
    /// [`ErrorKind::StateReached`](crate::ErrorKind::StateReached) if the machine is already powered off.
    fn stop(&self, machine: &str, deadline: Deadline) -> Result<()>;

    /// Presses the power button, and returns when the guest has powered off.
    ///
    /// # Errors
    /// [`ErrorKind::StateReached`](crate::ErrorKind::StateReached) if the machine is already powered off;
    /// [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) if the guest does not react.
    fn acpi_stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        let _ = (machine, deadline);
        Err(Error::unsupported("acpi_stop"))
    }

    /// Writes the guest's memory to `path`, readable by the caller. The machine still runs afterwards. A failed
    /// dump leaves no file at `path`. The plugin reports [`Host::progress`].
    ///
    /// # Errors
    /// The machine is off, the format is not supported, or the dump failed.
    fn dump_memory(&self, machine: &str, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        let _ = (machine, path, format, deadline);
        Err(Error::unsupported("dump_memory"))
    }

    /// Writes the guest's screen to `path`, as PNG.
    ///
    /// # Errors
    /// The machine is off or has no screen.
    fn screenshot(&self, machine: &str, path: &Path, deadline: Deadline) -> Result<()> {
        let _ = (machine, path, deadline);
        Err(Error::unsupported("screenshot"))
    }

    /// Prepares the next [`restore_start`](Machinery::restore_start), and reports the machine's readiness by
    /// [`Host::ready`]. The host calls it for a machine that is powered off and not locked by a task. A
    /// [`stop`](Machinery::stop) may be called meanwhile, and ends it. A long preparation reports
    /// [`Host::progress`].
    ///
    /// # Errors
    /// The preparation failed; the next restore works without it.
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

    /// Applies a new configuration while machines run. The crate `machinery-backend` implements most of it.
    /// Since interface 1.1.
    ///
    /// The machines `in_use` run, have an action, or are locked by a task. They keep their configuration for now,
    /// and may be called during the reload. All other machines are powered off, and are not called until the reload
    /// returns. The plugin discards the standby of a machine that changes or is removed.
    ///
    /// # Errors
    /// The configuration cannot work, or changes a key that only [`load`](Machinery::load) can apply. The machinery
    /// is then unchanged.
    fn reload(&self, setup: &Setup, in_use: &[String], deadline: Deadline) -> Result<Reloaded> {
        let _ = (setup, in_use, deadline);
        Err(Error::unsupported("reload"))
    }

    /// Diagnoses machines, and returns a diagnosis for each machine with an error or a warning. Since
    /// interface 1.1.
    ///
    /// The host calls this function for all machines after [`load`](Machinery::load) and each
    /// [`reload`](Machinery::reload). It calls it for one machine when an operator enables that machine. A
    /// file may have disappeared or come back in between, so a plugin must not cache the result. The machines may
    /// be in any state, and the host may call actions on them meanwhile.
    ///
    /// [`load`](Machinery::load) and [`reload`](Machinery::reload) refuse a configuration that is wrong as a
    /// whole. They load a machine without its disk or snapshot, and this function reports it.
    ///
    /// # Errors
    /// The machinery cannot diagnose its machines. The host logs the error and keeps the earlier results.
    fn diagnose(&self, machines: &[String], deadline: Deadline) -> Result<Vec<Diagnosis>> {
        let _ = (machines, deadline);
        Ok(Vec::new())
    }

    /// Adopts the run that an earlier host has left of the machine: from now on it is as if this plugin had started it.
    /// The host calls this function once for each machine after a [`load`](Machinery::load) with [`Setup::adopts`], and
    /// before any action. Returns false if there was no run; a standby is adopted as well, and is no run. Everything
    /// else that is left of the machine is removed. Since interface 1.1.
    ///
    /// The plugin adopts only what is certainly its own, by something that code in the hypervisor cannot forge.
    ///
    /// # Errors
    /// There was a run, and it cannot be adopted: it has ended meanwhile, or the plugin has ended it.
    fn adopt(&self, machine: &str, deadline: Deadline) -> Result<bool> {
        let _ = (machine, deadline);
        Err(Error::unsupported("adopt"))
    }

    /// Ends the plugin's part in this host, and leaves runs and standbys for [`adopt`](Machinery::adopt) by the next host.
    /// It is called in the place of [`shutdown`](Machinery::shutdown), and no action follows. Since interface 1.1.
    ///
    /// # Errors
    /// A preparation under way does not end.
    fn hand_over(&self, deadline: Deadline) -> Result<()> {
        let _ = deadline;
        Err(Error::unsupported("hand_over"))
    }

    /// Opens a connection to the screen, the keyboard and the mouse of a running machine, and returns it: a stream socket
    /// on which the hypervisor serves RFB (RFC 6143) without authentication. Since interface 1.1.
    ///
    /// The host calls this function only for a machine whose [`MachineInfo::console`] is true, and may do so during an
    /// action. Each call opens another connection, which shares the screen with the earlier ones. The end of the run
    /// closes all of them.
    ///
    /// # Errors
    /// The machine is off, or its run has no console.
    fn console(&self, machine: &str, deadline: Deadline) -> Result<OwnedFd> {
        let _ = (machine, deadline);
        Err(Error::unsupported("console"))
    }

    /// Makes the network of the machine's next run, unless it has one. The machine's
    /// [`interface`](MachineInfo::interface) exists from then on until [`close_network`](Machinery::close_network), so that
    /// the host's capture holds the run's first packet and its last. Since interface 1.1.
    ///
    /// The host calls this function before each start of a machine whose [`MachineInfo::own_network`] is true, and for
    /// no other. A [`stop`](Machinery::stop) removes a network that no run has taken.
    ///
    /// # Errors
    /// The network cannot be made; nothing of it remains then.
    fn open_network(&self, machine: &str, deadline: Deadline) -> Result<()> {
        let _ = (machine, deadline);
        Err(Error::unsupported("open_network"))
    }

    /// Removes the network of the machine's last run, which has ended. Without a run it does nothing. Since interface 1.1.
    ///
    /// The host calls this function after its capture has ended, for machines whose [`MachineInfo::own_network`] is true.
    ///
    /// # Errors
    /// The network remains.
    fn close_network(&self, machine: &str, deadline: Deadline) -> Result<()> {
        let _ = (machine, deadline);
        Err(Error::unsupported("close_network"))
    }

    /// Saves a running machine, and ends its run: writes the new files `memory` and, in the folder of the overlays, `disk`.
    /// With both as snapshot and disk, a machine continues. `disk` may depend on the present disk. Since interface 1.1.
    ///
    /// # Errors
    /// The machine is off, or cannot be saved. Its run has ended, and neither file exists.
    fn save(&self, machine: &str, memory: &Path, disk: &Path, deadline: Deadline) -> Result<()> {
        let _ = (machine, memory, disk, deadline);
        Err(Error::unsupported("save"))
    }

    /// Ends the remainder of the plugin's runs, and its standbys, before the host ends. The host has already
    /// stopped the runs that it has started. A machine that somebody else has started keeps running.
    ///
    /// # Errors
    /// A run or a standby could not be ended.
    fn shutdown(&self, deadline: Deadline) -> Result<()>;
}

/// A machinery that cannot share a host with the one that declares the conflict.
#[derive(Debug, Clone, Copy)]
pub struct Conflict {
    /// The other machinery's name in the `machineries` list.
    pub with: &'static str,
    /// The reason, for people.
    pub why: &'static str,
}

/// The optional methods of [`Machinery`] that a plugin implements.
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

/// The format of a memory dump.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DumpFormat {
    /// An ELF core file. Every machinery with memory dumps supports it.
    #[default]
    Elf,
    /// A zlib-compressed kdump file.
    KdumpZlib,
    /// A Windows crash dump. The guest has to provide the header (virtio-win's fwcfg driver).
    WinDmp,
}

impl DumpFormat {
    /// Returns the format's name in the protocol, which is QEMU's name.
    pub fn as_str(self) -> &'static str {
        match self {
            DumpFormat::Elf => "elf",
            DumpFormat::KdumpZlib => "kdump-zlib",
            DumpFormat::WinDmp => "win-dmp",
        }
    }
}
