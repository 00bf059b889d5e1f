//! The `kvm` machinery: domains of libvirt, restored from their snapshots.
//!
//! A machine is a domain that the operator has defined, with a snapshot of the moment in which Cuckoo's agent
//! waits for work. A restore reverts to that snapshot: libvirt starts QEMU, loads the memory and reverts the
//! disk. That takes as long as it takes to read the snapshot. Where there is enough memory, a machine can
//! have a *standby*: a domain that is reverted ahead of time and paused, which a restore only resumes.
//!
//! libvirt reports the changes of a domain by events, so the plugin never polls. libvirt's calls block without
//! a limit, so each runs in a thread of its own and the caller waits until its deadline.
//!
//! ```text
//!   the host's calls ─▶ machine ─▶ link ─▶ call (a thread) ─▶ libvirtd
//!   the host ◀─ state_changed ◀─ machine ◀─ link ◀─ events (one thread) ◀─ libvirtd
//! ```
//!
//! | module | content |
//! | --- | --- |
//! | `config` | the configuration and its checks |
//! | `machines` | all machines, and the parts that they share |
//! | `machine` | one machine: the actions on it, and its events |
//! | `reload` | a new configuration while machines run |
//! | `domain`, `snapshot`, `restore` | a domain, its snapshot, and its start from the snapshot |
//! | `standby` | the standby, and the check that it is unchanged |
//! | `images`, `disks` | save images and their sources, and disks that `qemu-img` reverts |
//! | `run_marker` | records of the host's own runs, for the next host |
//! | `foreign` | foreign work: changes by somebody else, which automatic work never destroys |
//! | `inspection` | memory dump and screenshot |
//! | `link`, `dsn` | the connection to libvirt, which survives a restart of libvirtd, and its address |
//! | `call` | calls with a timeout |
//! | `events`, `save`, `errno` | libvirt's event loop, saving to a file, the system's errors: all `unsafe` code |
//! | `states`, `errors` | the meaning of libvirt's states, events and errors |
//! | `description`, `files` | libvirt's XML as types, and the files that it names |
//! | `state_files` | files that are replaced atomically |
//! | `check`, `compare`, `access` | the checks of `cuckoo-machinery check` |

mod access;
mod call;
mod check;
mod compare;
mod config;
mod description;
mod disks;
mod domain;
mod dsn;
mod errno;
mod errors;
mod events;
mod files;
mod foreign;
mod images;
mod inspection;
mod link;
mod machine;
mod machines;
mod reload;
mod restore;
mod run_marker;
mod save;
mod snapshot;
mod standby;
mod state_files;
mod states;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use machinery::{
    Capabilities, Deadline, Diagnosis, DumpFormat, Host, MachineInfo, Machinery, Reloaded, Report, Result,
    Setup, State,
};

use config::{Config, renamed_keys_of};
use link::{Link, Listener};
use machine::{Machine, PrepareTrigger};
use machines::Machines;

/// The time that libvirt has while the machinery is loaded.
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);

/// The time that libvirt has to close the connections.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

machinery::export_machinery!(Kvm);

/// The machinery.
struct Kvm {
    machines: Arc<Machines>,
}

impl Machinery for Kvm {
    const NAME: &'static str = "kvm";

    fn load(setup: &Setup, host: Host) -> Result<Self> {
        let deadline = Deadline::after(LOAD_TIMEOUT);
        let config = Config::read(setup)?;
        renamed_keys_of(setup).iter().for_each(|warning| tracing::warn!("{warning}"));
        config.make_instant_dir()?;
        let link = Link::open(&config.dsn, deadline)?;
        let kvm = Kvm { machines: Arc::new(Machines::new(config, link, &setup.state_dir, host)) };
        match kvm.adopt_and_listen(deadline) {
            Ok(()) => Ok(kvm),
            Err(error) => {
                kvm.machines.link.close(Deadline::after(CLOSE_TIMEOUT));
                Err(error)
            }
        }
    }

    fn check(setup: &Setup, report: &mut Report) {
        check::check(setup, report);
    }

    fn version(&self, deadline: Deadline) -> Result<String> {
        self.machines.link.ask(deadline, "libvirt to report its version", check::versions)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            norestore_start: true,
            acpi_stop: true,
            dump_memory: true,
            screenshot: true,
            prepare: true,
        }
    }

    fn machines(&self) -> Vec<MachineInfo> {
        self.machines.set.all().iter().map(|machine| machine.info().clone()).collect()
    }

    fn state(&self, machine: &str, deadline: Deadline) -> Result<State> {
        self.on(machine, |machine| machine.state(deadline))
    }

    fn restore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.restore_start(deadline))
    }

    fn norestore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.norestore_start(deadline))
    }

    fn stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.stop(deadline))
    }

    fn acpi_stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.acpi_stop(deadline))
    }

    fn dump_memory(&self, machine: &str, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.dump_memory(path, format, deadline))
    }

    fn screenshot(&self, machine: &str, path: &Path, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.screenshot(path, deadline))
    }

    fn prepare(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.prepare(PrepareTrigger::Request, deadline))
    }

    fn prepare_automatically(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.prepare(PrepareTrigger::Automatic, deadline))
    }

    fn reload(&self, setup: &Setup, in_use: &[String], deadline: Deadline) -> Result<Reloaded> {
        reload::apply(&self.machines, setup, in_use, deadline)
    }

    fn diagnose(&self, machines: &[String], deadline: Deadline) -> Result<Vec<Diagnosis>> {
        let infos = machines.iter().map(|name| Ok(self.machines.set.find(name)?.info().clone()));
        let infos: Vec<MachineInfo> = infos.collect::<Result<_>>()?;
        self.machines.link.ask(deadline, "libvirt to describe the domains", move |connect| {
            let found = infos.iter().map(|info| check::diagnose(connect, info));
            Ok(found.filter(Diagnosis::says_anything).collect())
        })
    }

    fn shutdown(&self, deadline: Deadline) -> Result<()> {
        let ended = self.machines.end_all(deadline);
        self.machines.link.close(deadline.within(CLOSE_TIMEOUT));
        ended
    }
}

impl Kvm {
    /// Finds every domain, ends the runs that an earlier host has left, and subscribes to events.
    fn adopt_and_listen(&self, deadline: Deadline) -> Result<()> {
        self.machines.adopt(self.machines.set.all(), deadline)?;
        self.machines.link.listen(Arc::clone(&self.machines) as Arc<dyn Listener>)
    }

    /// Calls `act` for the machine of that name, and adds the name to its error.
    fn on<T>(&self, name: &str, act: impl FnOnce(&Arc<Machine>) -> Result<T>) -> Result<T> {
        act(&self.machines.set.find(name)?).map_err(|error| error.machine(name))
    }
}
