//! The cells of the matrix: each fault in each phase, and the reasons why some do not exist.

use std::fmt;

use clap::ValueEnum;

/// A machinery that can be soaked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Machinery {
    /// QEMU processes
    Qemu,
    /// Domains of a private libvirtd
    Kvm,
}

impl Machinery {
    /// Returns the machinery's name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Machinery::Qemu => "qemu",
            Machinery::Kvm => "kvm",
        }
    }
}

/// The phase of a machine in which a fault occurs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The machine is off, with a standby.
    Idle,
    /// Its template, save image or standby is made.
    Preparing,
    /// A `restore_start` is under way.
    Starting,
    /// A task has the machine, and its guest runs.
    Running,
    /// Its traffic is captured, too.
    Capturing,
    /// A memory dump is under way.
    Dumping,
    /// An `acpi_stop` is under way.
    Stopping,
    /// A reload of the configuration is under way, while a task has the machine.
    Reloading,
}

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// SIGKILL for the host.
    HostKilled,
    /// SIGTERM for the host.
    HostTerminated,
    /// The host executes its program again.
    HostReplaced,
    /// SIGKILL for the machine's QEMU.
    QemuKilled,
    /// SIGSTOP for the machine's QEMU, and later perhaps SIGCONT.
    QemuFrozen,
    /// libvirtd is killed and started again.
    LibvirtdKilled,
    /// SIGKILL for the machine's tcpdump.
    TcpdumpKilled,
    /// A plugin panics.
    PluginPanics,
    /// A plugin does not return.
    PluginHangs,
    /// A plugin ends the process.
    PluginExits,
    /// The file systems of overlays, captures and the host's state are full.
    DiskFull,
    /// The host's cgroup has no memory left.
    MemoryShort,
    /// The host's clock jumps by a year. The next host has the right clock again.
    ClockJumped,
    /// The client closes its connection while its request is under way.
    ClientLeaves,
    /// A client sends requests and reads no answer.
    ClientReadsNothing,
    /// A reload with a changed configuration.
    Reload,
    /// A reload with a broken configuration.
    BrokenReload,
}

impl Phase {
    /// All phases, in the order of a machine's life.
    pub const ALL: [Phase; 8] = [
        Phase::Idle,
        Phase::Preparing,
        Phase::Starting,
        Phase::Running,
        Phase::Capturing,
        Phase::Dumping,
        Phase::Stopping,
        Phase::Reloading,
    ];

    /// Returns the phase's name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Idle => "idle",
            Phase::Preparing => "preparing",
            Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Capturing => "capturing",
            Phase::Dumping => "dumping",
            Phase::Stopping => "stopping",
            Phase::Reloading => "reloading",
        }
    }

    /// Reports whether a task has the machine, and its guest has run before the fault.
    pub fn has_guest(self) -> bool {
        !matches!(self, Phase::Idle | Phase::Preparing | Phase::Starting)
    }

    /// Reports whether the guest has no reason to end in this phase, beside the fault.
    pub fn keeps_guest(self) -> bool {
        self.has_guest() && self != Phase::Stopping
    }
}

impl Fault {
    /// All faults, grouped by the party that suffers.
    pub const ALL: [Fault; 17] = [
        Fault::HostKilled,
        Fault::HostTerminated,
        Fault::HostReplaced,
        Fault::QemuKilled,
        Fault::QemuFrozen,
        Fault::LibvirtdKilled,
        Fault::TcpdumpKilled,
        Fault::PluginPanics,
        Fault::PluginHangs,
        Fault::PluginExits,
        Fault::DiskFull,
        Fault::MemoryShort,
        Fault::ClockJumped,
        Fault::ClientLeaves,
        Fault::ClientReadsNothing,
        Fault::Reload,
        Fault::BrokenReload,
    ];

    /// Returns the fault's name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Fault::HostKilled => "host killed",
            Fault::HostTerminated => "host terminated",
            Fault::HostReplaced => "host replaced",
            Fault::QemuKilled => "QEMU killed",
            Fault::QemuFrozen => "QEMU frozen",
            Fault::LibvirtdKilled => "libvirtd killed",
            Fault::TcpdumpKilled => "tcpdump killed",
            Fault::PluginPanics => "plugin panics",
            Fault::PluginHangs => "plugin hangs",
            Fault::PluginExits => "plugin exits",
            Fault::DiskFull => "disk full",
            Fault::MemoryShort => "memory short",
            Fault::ClockJumped => "clock jumped",
            Fault::ClientLeaves => "client leaves",
            Fault::ClientReadsNothing => "client reads nothing",
            Fault::Reload => "reload",
            Fault::BrokenReload => "broken reload",
        }
    }

    /// Reports whether the host ends or is replaced, so that its connections close.
    pub fn ends_host(self) -> bool {
        matches!(self, Fault::HostKilled | Fault::HostTerminated | Fault::HostReplaced | Fault::PluginExits)
    }

    /// Reports whether the guest runs without a host for a moment.
    pub fn parts_host_and_guest(self) -> bool {
        matches!(self, Fault::HostKilled | Fault::HostReplaced)
    }

    /// Reports whether a request under way must succeed although the fault occurs.
    pub fn spares_requests(self) -> bool {
        matches!(
            self,
            Fault::TcpdumpKilled
                | Fault::PluginPanics
                | Fault::PluginHangs
                | Fault::ClockJumped
                | Fault::ClientReadsNothing
        )
    }

    /// Reports whether a running guest must go on although the fault occurs.
    pub fn spares_guests(self) -> bool {
        self.spares_requests()
            || matches!(
                self,
                Fault::HostKilled
                    | Fault::HostReplaced
                    | Fault::LibvirtdKilled
                    | Fault::ClientLeaves
                    | Fault::Reload
                    | Fault::BrokenReload
            )
    }
}

/// A fault in a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cell {
    pub fault: Fault,
    pub phase: Phase,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.fault.name(), self.phase.name())
    }
}

/// The faults and phases that this computer cannot have; each `Some` is a reason.
#[derive(Debug, Clone, Default)]
pub struct Missing {
    /// Captures.
    pub capture: Option<&'static str>,
    /// Small file systems.
    pub disk: Option<&'static str>,
    /// A clock that can jump.
    pub clock: Option<&'static str>,
    /// A cgroup with a limit of memory.
    pub memory: Option<&'static str>,
}

impl Cell {
    /// Returns all cells, by faults.
    pub fn all() -> impl Iterator<Item = Cell> {
        Fault::ALL.into_iter().flat_map(|fault| Phase::ALL.map(|phase| Cell { fault, phase }))
    }

    /// Returns the reason why the cell cannot be hit.
    pub fn impossible(self, machinery: Machinery, missing: &Missing) -> Option<&'static str> {
        let captures = self.phase == Phase::Capturing || self.fault == Fault::TcpdumpKilled;
        if captures && let Some(reason) = missing.capture {
            return Some(reason);
        }
        match (self.fault, self.phase, machinery) {
            (Fault::LibvirtdKilled, _, Machinery::Qemu) => Some("the machinery qemu has no libvirtd"),
            (Fault::TcpdumpKilled, Phase::Idle | Phase::Preparing, _) => {
                Some("no tcpdump runs before a machine starts")
            }
            (Fault::TcpdumpKilled, Phase::Running, _) => {
                Some("the phase capturing is a run with a tcpdump; the phase running has none")
            }
            (Fault::DiskFull, Phase::Capturing, Machinery::Kvm) => missing.disk,
            (Fault::DiskFull, _, Machinery::Kvm) => {
                Some("libvirtd does not see the small file system, so that only captures are on it")
            }
            (Fault::DiskFull, ..) => missing.disk,
            (Fault::MemoryShort, ..) => missing.memory,
            (Fault::ClockJumped, ..) => missing.clock,
            _ => None,
        }
    }
}
