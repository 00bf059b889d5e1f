//! A [`Machinery`] of single machines.
//!
//! An author writes two types. [`Shared`] holds what all machines share: the configuration, a connection, a budget.
//! [`Backend`] is one machine. The [`Adapter`] does the rest of the interface:
//!
//! ```text
//! load      read ─▶ open ─▶ make the machines ─▶ end leftovers ─▶ ready
//! action    find the machine ─▶ act ─▶ name the machine in the error
//! reload    read ─▶ compare ─▶ plan ─▶ last refusals │ discard the gone ─▶ end leftovers of the new ─▶ commit
//! adopt     find the machine ─▶ adopt its run
//! shutdown  end all machines, a few at a time ─▶ close
//! hand_over leave all machines, a few at a time ─▶ close
//! ```
//!
//! Every refusal of a reload comes before its first change, which is the bar in the picture. The gone are discarded before
//! the leftovers of the new are ended, because a changed machine is both, with one name and one disk.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use machinery::{
    Capabilities, Conflict, Deadline, Diagnosis, DumpFormat, Error, ErrorKind, Host, MachineInfo, Machinery,
    Reloaded, Report, Result, Setup, State,
};

use crate::backend::{Backend, PrepareOrigin};
use crate::concurrent;
use crate::keeper::{Keeper, Standbys};
use crate::machine_set::{MachineSet, ReloadPlan, Reloadable};
use crate::shared::Shared;

/// The [`Machinery`] around machines: `machinery::export_machinery!(Adapter<Shared>)`.
#[derive(Debug)]
pub struct Adapter<S: Shared> {
    machines: Arc<MachineSet<S::Machine>>,
    shared: Arc<S>,
    host: Host,
    /// It holds until the machinery is dropped.
    _keeper: Option<Keeper>,
}

/// The time that a load has for the leftovers of a killed host.
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);
/// The time that a load which has failed has to close what the machines share.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);
/// The time that a machine has to end a standby whose memory is needed.
const GIVE_BACK_TIMEOUT: Duration = Duration::from_secs(5);

impl<S: Shared> Machinery for Adapter<S> {
    const NAME: &'static str = S::NAME;
    const CONFLICTS: &'static [Conflict] = S::CONFLICTS;

    fn load(setup: &Setup, host: Host) -> Result<Self> {
        let deadline = Deadline::after(LOAD_TIMEOUT);
        let mut config = S::read(setup)?;
        S::warnings(setup, &config).iter().for_each(|warning| tracing::warn!("{warning}"));
        let shared = Arc::new(S::open(setup, &config, host.clone())?);
        let keys = S::take_machines(&mut config);
        let machines: Vec<_> = keys.into_iter().map(|keys| shared.machine(setup, keys)).collect();
        let set = Arc::new(MachineSet::new(machines.clone()));
        // `adopt` ends those that it cannot adopt.
        let are_left = setup.adopts && S::ADOPTS;
        let ended = if are_left { Ok(()) } else { shared.end_leftovers(&machines, deadline) };
        match ended.and_then(|()| shared.ready(&set, config, deadline)) {
            Ok(()) => {
                let keeper = shared.budget().and_then(|budget| {
                    Keeper::start(
                        Arc::clone(budget),
                        MachineStandbys { machines: Arc::clone(&set), host: host.clone() },
                    )
                });
                Ok(Adapter { machines: set, shared, host, _keeper: keeper })
            }
            Err(error) => {
                // The time of the load may be over.
                shared.close(Deadline::after(CLOSE_TIMEOUT));
                Err(error)
            }
        }
    }

    fn check(setup: &Setup, report: &mut Report) {
        S::check(setup, report);
    }

    fn version(&self, deadline: Deadline) -> Result<String> {
        self.shared.version(deadline)
    }

    fn capabilities(&self) -> Capabilities {
        self.shared.capabilities()
    }

    fn machines(&self) -> Vec<MachineInfo> {
        let info = |machine: &Arc<S::Machine>| MachineInfo { jail: machine.jail(), ..machine.info().clone() };
        self.machines.all().iter().map(info).collect()
    }

    fn state(&self, machine: &str, deadline: Deadline) -> Result<State> {
        self.on(machine, |machine| machine.state(deadline))
    }

    fn restore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        if let Some(budget) = self.shared.budget() {
            budget.count_restore(machine);
        }
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
        self.on(machine, |machine| machine.prepare(PrepareOrigin::Request, deadline))
    }

    fn prepare_automatically(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.prepare(PrepareOrigin::Automatic, deadline))
    }

    fn reload(&self, setup: &Setup, in_use: &[String], deadline: Deadline) -> Result<Reloaded> {
        let mut config = S::read(setup)?;
        self.shared.expect_unchanged(setup, &config)?;
        let keys = S::take_machines(&mut config);
        let make = |keys| self.shared.machine(setup, keys);
        let plan = self.machines.plan(&setup.config, keys, in_use, make)?;
        plan.removed.iter().try_for_each(|machine| machine.ensure_off(deadline))?;
        self.shared.get_ready(&config, &plan, deadline)?;
        let gone = plan.removed.clone();
        match self.apply(plan, deadline) {
            Ok(reloaded) => {
                self.shared.committed(&config, &gone, &self.machines.all());
                Ok(reloaded)
            }
            Err(error) => {
                let why = "a new configuration could not be applied";
                gone.iter().for_each(|machine| self.host.preparation_invalidated(machine.name(), why));
                Err(error)
            }
        }
    }

    fn diagnose(&self, machines: &[String], deadline: Deadline) -> Result<Vec<Diagnosis>> {
        let machines: Vec<_> = machines.iter().filter_map(|name| self.machines.find(name).ok()).collect();
        let mut diagnoses = self.shared.diagnose(&machines, deadline)?;
        diagnoses.retain(Diagnosis::says_anything);
        Ok(diagnoses)
    }

    fn adopt(&self, machine: &str, deadline: Deadline) -> Result<bool> {
        if !S::ADOPTS {
            return Err(Error::unsupported("adopt"));
        }
        self.on(machine, |machine| machine.adopt(deadline))
    }

    fn hand_over(&self, deadline: Deadline) -> Result<()> {
        if !S::ADOPTS {
            return Err(Error::unsupported("hand_over"));
        }
        self.leave(deadline, |machine| machine.hand_over(deadline))
    }

    fn console(&self, machine: &str, deadline: Deadline) -> Result<OwnedFd> {
        self.on(machine, |machine| machine.console(deadline))
    }

    fn open_network(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.open_network(deadline))
    }

    fn close_network(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.close_network(deadline))
    }

    fn save(&self, machine: &str, memory: &Path, disk: &Path, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.save(memory, disk, deadline))
    }

    fn shutdown(&self, deadline: Deadline) -> Result<()> {
        self.machines.all().iter().for_each(|machine| machine.begin_end());
        self.leave(deadline, |machine| machine.end(deadline))
    }
}

/// The machines, as the keeper of their standbys sees them.
struct MachineStandbys<M> {
    machines: Arc<MachineSet<M>>,
    host: Host,
}

impl<M: Backend> Standbys for MachineStandbys<M> {
    fn give_back(&self, name: &str, why: &str) {
        // A reload may have removed it, with its standby.
        let Ok(machine) = self.machines.find(name) else { return };
        tracing::info!(machine = name, why, "the standby is given back");
        if let Err(error) = machine.give_standby_back(why, Deadline::after(GIVE_BACK_TIMEOUT)) {
            tracing::warn!(machine = name, %error, "the standby is not given back");
        }
    }

    fn ask(&self, name: &str, why: &str) {
        self.host.preparation_wanted(name, why);
    }
}

impl<S: Shared> Adapter<S> {
    /// Calls `act` for the machine of that name, and adds the name to its error.
    fn on<T>(&self, name: &str, act: impl FnOnce(&Arc<S::Machine>) -> Result<T>) -> Result<T> {
        act(&self.machines.find(name)?).map_err(|error| error.machine(name))
    }

    /// Calls `leave` for all machines, a few at a time, and closes what they share.
    fn leave(&self, deadline: Deadline, leave: impl Fn(&Arc<S::Machine>) -> Result<()> + Sync) -> Result<()> {
        let left = concurrent::for_each(&self.machines.all(), |machine| match leave(machine) {
            Err(error) if error.kind() == ErrorKind::StateReached => Ok(()),
            left => left,
        });
        self.shared.close(deadline);
        left
    }

    /// Applies the plan of a reload.
    fn apply(&self, plan: ReloadPlan<S::Machine>, deadline: Deadline) -> Result<Reloaded> {
        plan.removed.iter().for_each(|machine| machine.begin_end());
        concurrent::for_each(&plan.removed, |machine| machine.discard_standby(deadline))?;
        self.shared.end_leftovers(&plan.added, deadline)?;
        self.machines.commit(plan, deadline)
    }
}
