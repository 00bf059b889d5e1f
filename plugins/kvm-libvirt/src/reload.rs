//! The machinery as a whole: its load, a new configuration while machines run, and its end.
//!
//! The [`Adapter`](machinery_backend::Adapter) has the order of the steps. A load and a reload find the domains of
//! the new machines, and end the runs that an earlier host has left. A reload finds them before its first change, so
//! that it is refused while libvirt is away. Until the commit, libvirt's events still go to the machines that are
//! replaced.

use std::sync::Arc;
use std::time::Duration;

use machinery::{Capabilities, Deadline, Diagnosis, Error, Host, Report, Result, Setup};
use machinery_backend::{Budget, MachineSet, ReloadPlan, Reloadable, Shared, expect_unchanged};
use virt::connect::Connect;

use crate::check;
use crate::config::{Config, Keys, renamed_keys_of};
use crate::connection::Listener;
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
        self.connection.ask(deadline, "libvirt to report its version", check::versions)
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
        for_each(self, machines, deadline, Machine::end_leftover_run)
    }

    fn ready(
        self: &Arc<Self>,
        machines: &Arc<MachineSet<Machine>>,
        _config: Config,
        deadline: Deadline,
    ) -> Result<()> {
        if let Err(error) = self.end_orphans(|name| machines.find(name).is_ok(), deadline) {
            tracing::warn!(%error, "runs of machines that are not configured remain");
        }
        self.connection.listen(Arc::new(Machines(Arc::clone(machines))))
    }

    fn expect_unchanged(&self, setup: &Setup, config: &Config) -> Result<()> {
        expect_unchanged(Some(&setup.config), &["dsn"], self.connection.dsn(), &config.dsn)
    }

    fn get_ready(&self, config: &Config, plan: &ReloadPlan<Machine>, deadline: Deadline) -> Result<()> {
        for_each(self, &plan.added, deadline, Machine::find)?;
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
    }

    fn diagnose(&self, machines: &[Arc<Machine>], deadline: Deadline) -> Result<Vec<Diagnosis>> {
        let infos: Vec<_> = machines.iter().map(|machine| machine.info().clone()).collect();
        self.connection.ask(deadline, "libvirt to describe the domains", move |connect| {
            Ok(infos.iter().map(|info| check::diagnose(connect, info)).collect())
        })
    }

    fn budget(&self) -> Option<&Arc<Budget>> {
        Some(&self.budget)
    }

    fn close(&self, deadline: Deadline) {
        self.connection.close(deadline.within(CLOSE_TIMEOUT));
        self.images.close_unused(&[]);
    }
}

/// Calls `act` for each of these machines, on one connection.
///
/// # Errors
/// libvirt does not answer; `act` fails. The error contains all failures.
fn for_each<T: 'static>(
    kvm: &Kvm,
    machines: &[Arc<Machine>],
    deadline: Deadline,
    act: fn(&Machine, &Connect) -> Result<T>,
) -> Result<()> {
    if machines.is_empty() {
        return Ok(());
    }
    let machines = machines.to_vec();
    let problems = kvm.connection.ask(deadline, "libvirt to find the domains", move |connect| {
        let done = machines.iter().map(|machine| act(machine, connect));
        Ok(Error::all(done.filter_map(Result::err).collect()))
    })?;
    problems.map_or(Ok(()), Err)
}

/// The machines, as the subscriber to libvirt's events.
struct Machines(Arc<MachineSet<Machine>>);

impl Listener for Machines {
    fn on_event(&self, label: &str, event: Event) {
        // libvirt also reports events of domains that are no machine's.
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
