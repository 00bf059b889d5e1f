//! All machines of the plugin, and the parts that they share: the link to libvirt, the memory for standbys,
//! and the host.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use machinery::{Budget, Deadline, Error, ErrorKind, Host, MachineSet, Result};
use virt::connect::Connect;

use crate::config::{Config, Keys};
use crate::events::Event;
use crate::link::{Link, Listener};
use crate::machine::Machine;

/// The maximum number of machines that are ended at a time. libvirtd executes five requests of one connection
/// at a time; the fifth is for other actions.
const MAX_CONCURRENT: usize = 4;

/// All machines, and the parts that they share.
pub struct Machines {
    pub set: MachineSet<Machine>,
    pub link: Arc<Link>,
    pub budget: Arc<Budget>,
    pub host: Host,
}

impl Machines {
    /// Makes the machines of the configuration.
    pub fn new(config: Config, link: Arc<Link>, state_dir: &Path, host: Host) -> Self {
        let budget = Budget::new(config.standby_memory_limit);
        let mut machines = Machines { set: MachineSet::new(Vec::new()), link, budget, host };
        let made = config.machines.into_iter().map(|keys| machines.make(keys, state_dir)).collect();
        machines.set = MachineSet::new(made);
        machines
    }

    /// Makes a machine, which is not in the set yet.
    pub fn make(&self, keys: Keys, state_dir: &Path) -> Arc<Machine> {
        let (budget, link) = (Arc::clone(&self.budget), Arc::clone(&self.link));
        Arc::new(Machine::new(keys, budget, link, state_dir, self.host.clone()))
    }

    /// Finds every domain, and ends the runs that an earlier host has left.
    ///
    /// # Errors
    /// libvirt does not answer; a run does not end. The error contains all failures.
    pub fn adopt(&self, machines: Vec<Arc<Machine>>, deadline: Deadline) -> Result<()> {
        self.for_each_with_libvirt(machines, deadline, Machine::adopt)
    }

    /// Calls `act` for each of these machines, on one connection.
    ///
    /// # Errors
    /// libvirt does not answer; `act` fails. The error contains all failures.
    pub fn for_each_with_libvirt<T: 'static>(
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

    /// Ends the own runs and standbys of all machines.
    ///
    /// # Errors
    /// libvirt cannot end one. The error contains all failures.
    pub fn end_all(&self, deadline: Deadline) -> Result<()> {
        let mut machines = self.set.all();
        machines.retain(|machine| machine.has_anything_to_end());
        for_each_concurrently(&machines, |machine| match machine.stop_own(deadline) {
            Err(error) if error.kind() == ErrorKind::StateReached => Ok(()),
            other => other,
        })
    }
}

/// Calls `act` for each of these machines, a few at a time.
///
/// # Errors
/// `act` fails. The error contains all failures.
pub fn for_each_concurrently(
    machines: &[Arc<Machine>],
    act: impl Fn(&Machine) -> Result<()> + Sync,
) -> Result<()> {
    let problems = Mutex::new(Vec::new());
    let queue = Mutex::new(machines.iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
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
            // Without a further thread, this one does all the work.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    Error::all(problems.into_inner().unwrap_or_else(PoisonError::into_inner)).map_or(Ok(()), Err)
}

impl Listener for Machines {
    fn on_event(&self, label: &str, event: Event) {
        // libvirt also reports events of domains that are no machine's.
        if let Some(machine) = self.set.all().iter().find(|machine| machine.label() == label) {
            machine.on_event(event);
        }
    }

    fn on_connection_lost(&self, why: &str) {
        self.set.all().iter().for_each(|machine| machine.on_connection_lost(why));
    }

    fn on_reconnected(&self, connect: &Connect) {
        self.set.all().iter().for_each(|machine| machine.on_reconnected(connect));
    }
}
