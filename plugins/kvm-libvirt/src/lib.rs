//! The `kvm` machinery: domains of libvirt, restored from their snapshots.
//!
//! A machine is a domain that the operator has defined, with a snapshot of the moment in which
//! Cuckoo's agent waits for work. A restore reverts to that snapshot; libvirt starts QEMU, loads the
//! memory and puts the disk back, and says so. That takes as long as it takes to read the snapshot, so
//! where there is memory for it a machine can stand by: all of that is done ahead of time, and a restore
//! only lets the guest run.
//!
//! libvirt tells by events what happens to a domain, so nothing here asks again and again. Its calls
//! block for as long as they like, so each runs in a thread of its own and is waited for until the
//! deadline.
//!
//! ```text
//!   the host's calls ─▶ machine ─▶ link ─▶ call (a thread) ─▶ libvirtd
//!   the host ◀─ state_changed ◀─ machine ◀─ link ◀─ events (one thread) ◀─ libvirtd
//! ```
//!
//! | room | what it holds |
//! | --- | --- |
//! | `config` | the configuration and what is wrong with it |
//! | `machine` | one machine: what is done to it, and what happens to it |
//! | `machine/prepare` | how a machine comes to stand by, and the ways away from it |
//! | `machine/image` | restores from a save image, and how it is made |
//! | `restore` | from a snapshot to a running domain |
//! | `standby` | a domain that stands by, and whether it is still the right one |
//! | `description` | libvirt's XML, as types |
//! | `files` | the files of a domain: whether they are there, and whether they have changed |
//! | `images`, `disks` | save images and what they are of, and disks that are put back |
//! | `views` | memory dump and screenshot |
//! | `link`, `dsn` | the connection to libvirt, which outlives libvirtd, and its address |
//! | `call` | calls that come back in time |
//! | `events`, `save`, `errno` | libvirt's event loop, saving to a file, the system's errors: all `unsafe` code |
//! | `states`, `errors` | what libvirt's states, events and errors mean |
//! | `runs` | records of the host's own runs, for the next host |
//! | `foreign` | work of somebody else, which automatic work leaves alone |
//! | `state_files` | small files that are whole at any time |
//! | `reload` | a new configuration while machines run |
//! | `check`, `compare`, `access` | the environment, and what `check` finds in it |

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
mod reload;
mod restore;
mod run_marker;
mod save;
mod snapshot;
mod standby;
mod state_files;
mod states;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use machinery::{
    Budget, Capabilities, Deadline, Diagnosis, DumpFormat, Error, ErrorKind, Host, MachineInfo, MachineSet,
    Machinery, Reloadable, Reloaded, Report, Result, Setup, State,
};
use virt::connect::Connect;

use config::Config;
use events::Event;
use link::{Link, Listener};
use machine::{Machine, PrepareTrigger};

/// How long libvirt may take while the machinery is loaded.
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);

/// How long libvirt may take to let go of a connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// How many machines are ended at a time: libvirtd has no more than five requests of one connection under
/// way, and one is for those who ask something meanwhile.
const MAX_CONCURRENT: usize = 4;

machinery::export_machinery!(Kvm);

struct Kvm {
    machines: Arc<Machines>,
    link: Arc<Link>,
    budget: Arc<Budget>,
    host: Host,
}

/// All machines; what libvirt tells goes to the one it is about.
struct Machines(MachineSet<Machine>);

/// Does something with these machines, a few at a time, and gives what went wrong.
fn for_each_concurrently(
    machines: &[Arc<Machine>],
    act: impl Fn(&Machine) -> Result<()> + Sync,
) -> Vec<Error> {
    let problems = Mutex::new(Vec::new());
    let waiting = Mutex::new(machines.iter());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some(machine) = next() {
            if let Err(error) = act(machine) {
                let error = error.machine(machine.name());
                problems.lock().unwrap_or_else(PoisonError::into_inner).push(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..MAX_CONCURRENT.min(machines.len()) {
            // A thread that is not to be had is done without.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    problems.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the machine's own run or standby.
fn end(machine: &Machine, deadline: Deadline) -> Result<()> {
    match machine.stop_own(deadline) {
        Err(error) if error.kind() == ErrorKind::StateReached => Ok(()),
        other => other,
    }
}

impl Listener for Machines {
    fn on_event(&self, label: &str, event: Event) {
        // libvirt has domains that are none of ours.
        if let Some(machine) = self.0.all().iter().find(|machine| machine.label() == label) {
            machine.on_event(event);
        }
    }

    fn on_connection_lost(&self, why: &str) {
        self.0.all().iter().for_each(|machine| machine.on_connection_lost(why));
    }

    fn on_reconnected(&self, connect: &Connect) {
        self.0.all().iter().for_each(|machine| machine.on_reconnected(connect));
    }
}

impl Machinery for Kvm {
    const NAME: &'static str = "kvm";

    fn load(setup: &Setup, host: Host) -> Result<Self> {
        let deadline = Deadline::after(LOAD_TIMEOUT);
        let config = Config::read(setup)?;
        config.make_instant_dir()?;
        let link = Link::open(&config.dsn, deadline)?;
        let budget = Budget::new(config.standby_memory_limit);
        let machine = |keys| {
            let (budget, link) = (Arc::clone(&budget), Arc::clone(&link));
            Arc::new(Machine::new(keys, budget, link, &setup.state_dir, host.clone()))
        };
        let machines =
            Arc::new(Machines(MachineSet::new(config.machines.into_iter().map(machine).collect())));
        let kvm = Kvm { machines, link, budget, host };
        match kvm.adopt(deadline) {
            Ok(()) => Ok(kvm),
            Err(error) => {
                kvm.link.close(Deadline::after(CLOSE_TIMEOUT));
                Err(error)
            }
        }
    }

    fn check(setup: &Setup, report: &mut Report) {
        check::check(setup, report);
    }

    fn version(&self, deadline: Deadline) -> Result<String> {
        self.link.ask(deadline, "libvirt to tell its version", check::versions)
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
        self.machines.0.all().iter().map(|machine| machine.info().clone()).collect()
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
        self.apply(setup, in_use, deadline)
    }

    fn diagnose(&self, machines: &[String], deadline: Deadline) -> Result<Vec<Diagnosis>> {
        let infos = machines.iter().map(|name| Ok(self.machines.0.find(name)?.info().clone()));
        let infos: Vec<MachineInfo> = infos.collect::<Result<_>>()?;
        self.link.ask(deadline, "libvirt to tell about the domains", move |connect| {
            let found = infos.iter().map(|info| check::diagnose(connect, info));
            Ok(found.filter(Diagnosis::says_anything).collect())
        })
    }

    fn shutdown(&self, deadline: Deadline) -> Result<()> {
        let mut machines = self.machines.0.all();
        machines.retain(|machine| machine.has_anything_to_end());
        let problems = Error::all(for_each_concurrently(&machines, |machine| end(machine, deadline)));
        self.link.close(deadline.within(CLOSE_TIMEOUT));
        problems.map_or(Ok(()), Err)
    }
}

impl Kvm {
    /// Finds every domain, clears away the runs of a host that died, and listens from now on.
    fn adopt(&self, deadline: Deadline) -> Result<()> {
        self.with_libvirt(self.machines.0.all(), deadline, Machine::adopt)?;
        self.link.listen(Arc::clone(&self.machines) as Arc<dyn Listener>)
    }

    /// Does something with each of these machines, and tells all that goes wrong.
    fn with_libvirt<T: 'static>(
        &self,
        machines: Vec<Arc<Machine>>,
        deadline: Deadline,
        act: fn(&Machine, &Connect) -> Result<T>,
    ) -> Result<()> {
        if machines.is_empty() {
            return Ok(());
        }
        let problems = self.link.ask(deadline, "libvirt to find the domains", move |connect| {
            let done = machines.iter().map(|machine| act(machine, connect));
            Ok(Error::all(done.filter_map(Result::err).collect()))
        })?;
        problems.map_or(Ok(()), Err)
    }

    /// Does something with the machine of that name, which is named in its errors.
    fn on<T>(&self, name: &str, act: impl FnOnce(&Arc<Machine>) -> Result<T>) -> Result<T> {
        act(&self.machines.0.find(name)?).map_err(|error| error.machine(name))
    }
}
