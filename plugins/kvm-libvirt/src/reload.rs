//! The machinery as a whole: its load, a new configuration while machines run, and its end.
//!
//! The [`Adapter`](machinery_backend::Adapter) has the order of the steps. A load and a reload find the domains of
//! the new machines, and end the runs that an earlier host has left. A reload finds them before its first change, so
//! that it is refused while libvirt is away. Until the commit, libvirt's events still go to the machines that are
//! replaced.

use std::sync::{Arc, Weak};
use std::time::Duration;

use machinery::{Capabilities, Deadline, Diagnosis, Error, Host, Report, Result, Setup};
use machinery_backend::{Budget, MachineSet, ReloadPlan, Reloadable, Shared};
use virt::connect::Connect;

use crate::check;
use crate::config::{Config, Keys, renamed_keys_of};
use crate::connection::{Connection, Listener};
use crate::connections;
use crate::events::Event;
use crate::machine::Machine;
use crate::shared::Kvm;

/// The time that libvirt has to accept the connection.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// The time that libvirt has to close the connections.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

impl Shared for Kvm {
    const NAME: &'static str = "kvm";
    const ADOPTS: bool = true;
    type Machine = Machine;
    type Config = Config;

    fn read(setup: &Setup) -> Result<Config> {
        Config::read(setup)
    }

    fn take_machines(config: &mut Config) -> Vec<Keys> {
        std::mem::take(&mut config.machines)
    }

    fn warnings(setup: &Setup, _config: &Config) -> Vec<String> {
        renamed_keys_of(setup)
    }

    fn open(setup: &Setup, config: &Config, host: Host) -> Result<Self> {
        Kvm::new(config, &setup.state_dir, host, Deadline::after(OPEN_TIMEOUT))
    }

    fn machine(self: &Arc<Self>, setup: &Setup, keys: Keys) -> Arc<Machine> {
        Arc::new(Machine::new(keys, Arc::clone(self), &setup.state_dir))
    }

    fn check(setup: &Setup, report: &mut Report) {
        check::check(setup, report);
    }

    fn version(&self, deadline: Deadline) -> Result<String> {
        let versions = connections::for_each(&self.connections.all(), |connection| {
            let version = connection.ask(deadline, "libvirt to report its version", check::versions)?;
            Ok((connection.dsn().to_owned(), version))
        });
        let (known, failures): (Vec<_>, Vec<_>) = versions.into_iter().partition(Result::is_ok);
        match &known.into_iter().flatten().collect::<Vec<_>>()[..] {
            [] => Err(Error::all(failures.into_iter().filter_map(Result::err).collect())
                .unwrap_or_else(|| Error::failed("no machine is configured"))),
            [(_, version)] if failures.is_empty() => Ok(version.clone()),
            known => Ok(known
                .iter()
                .map(|(dsn, version)| format!("{version} at {dsn}"))
                .collect::<Vec<_>>()
                .join("; ")),
        }
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

    fn end_leftovers(&self, machines: &[Arc<Machine>], deadline: Deadline) -> Result<()> {
        // The start of a machine ends its leftover, too.
        let reached: Vec<_> =
            machines.iter().filter(|machine| machine.connection().is_open()).cloned().collect();
        for_each(&reached, deadline, Machine::end_leftover_run)
    }

    fn ready(
        self: &Arc<Self>,
        machines: &Arc<MachineSet<Machine>>,
        _config: Config,
        _deadline: Deadline,
    ) -> Result<()> {
        self.connections.listen(Arc::new(Machines(Arc::downgrade(machines))))
    }

    fn get_ready(&self, config: &Config, plan: &ReloadPlan<Machine>, deadline: Deadline) -> Result<()> {
        let connections: Vec<_> =
            by_connection(&plan.added).into_iter().map(|(connection, _)| connection).collect();
        let added =
            connections::for_each(&connections, |connection| self.connections.add(connection, deadline));
        Error::all(added.into_iter().filter_map(Result::err).collect()).map_or(Ok(()), Err)?;
        for_each(&plan.added, deadline, Machine::find)?;
        config.image_folder().map_or(Ok(()), |folder| self.images.open(folder))
    }

    fn committed(&self, config: &Config, gone: &[Arc<Machine>], machines: &[Arc<Machine>]) {
        self.budget.set_limits(config.standby_memory_limit, config.standby_memory_reserve);
        let images: Vec<_> = machines.iter().map(|machine| &machine.keys().image).collect();
        for old in gone.iter().map(|machine| &machine.keys().image) {
            if !images.iter().any(|image| image.has_same_file(old)) {
                self.images.remove(old);
            }
        }
        self.images.close_unused(&images);
        let is_used = |connection: &Connection| {
            machines.iter().any(|machine| machine.connection().dsn() == connection.dsn())
        };
        self.connections.close_unused(is_used, Deadline::after(CLOSE_TIMEOUT));
    }

    fn diagnose(&self, machines: &[Arc<Machine>], deadline: Deadline) -> Result<Vec<Diagnosis>> {
        let groups = by_connection(machines);
        let diagnosed = connections::for_each(&groups, |(connection, machines)| {
            let infos: Vec<_> = machines.iter().map(|machine| machine.info().clone()).collect();
            connection.ask(deadline, "libvirt to describe the domains", move |connect| {
                Ok(infos.iter().map(|info| check::diagnose(connect, info)).collect::<Vec<_>>())
            })
        });
        Ok(diagnosed.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    fn budget(&self) -> Option<&Arc<Budget>> {
        Some(&self.budget)
    }

    fn close(&self, deadline: Deadline) {
        self.connections.close(deadline.within(CLOSE_TIMEOUT));
        self.images.close_unused(&[]);
    }
}

/// The machines of one libvirt.
type Group = (Arc<Connection>, Vec<Arc<Machine>>);

/// Groups the machines by their libvirts.
fn by_connection(machines: &[Arc<Machine>]) -> Vec<Group> {
    let mut groups = Vec::<Group>::new();
    for machine in machines {
        let connection = machine.connection();
        match groups.iter_mut().find(|(known, _)| Arc::ptr_eq(known, connection)) {
            Some((_, group)) => group.push(Arc::clone(machine)),
            None => groups.push((Arc::clone(connection), vec![Arc::clone(machine)])),
        }
    }
    groups
}

/// Calls `act` for each of these machines, for those of one libvirt on one connection.
///
/// # Errors
/// libvirt does not answer; `act` fails. The error contains all failures.
fn for_each<T: 'static>(
    machines: &[Arc<Machine>],
    deadline: Deadline,
    act: fn(&Machine, &Connect) -> Result<T>,
) -> Result<()> {
    let problems = connections::for_each(&by_connection(machines), |(connection, machines)| {
        let machines = machines.clone();
        connection.ask(deadline, "libvirt to find the domains", move |connect| {
            Ok(machines.iter().filter_map(|machine| act(machine, connect).err()).collect::<Vec<_>>())
        })
    });
    let all = problems.into_iter().flat_map(|found| found.unwrap_or_else(|error| vec![error]));
    Error::all(all.collect()).map_or(Ok(()), Err)
}

/// The machines, as the subscriber to libvirt's events.
struct Machines(Weak<MachineSet<Machine>>);

impl Machines {
    fn of(&self, dsn: &str) -> Vec<Arc<Machine>> {
        let mut machines = self.0.upgrade().map(|machines| machines.all()).unwrap_or_default();
        machines.retain(|machine| machine.connection().dsn() == dsn);
        machines
    }
}

impl Listener for Machines {
    fn on_event(&self, dsn: &str, label: &str, event: Event) {
        // libvirt also reports events of domains that are no machine's.
        if let Some(machine) = self.of(dsn).iter().find(|machine| machine.label() == label) {
            machine.on_event(event);
        }
    }

    fn on_connection_lost(&self, dsn: &str, why: &str) {
        self.of(dsn).iter().for_each(|machine| machine.on_connection_lost(why));
    }

    fn on_reconnected(&self, dsn: &str, connect: &Connect) {
        self.of(dsn).iter().for_each(|machine| machine.on_reconnected(connect));
    }
}
