//! The same action on many machines, a few at a time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use machinery::{Error, Result};

use crate::machine_set::Reloadable;
use crate::sync::lock;

/// The maximum number of machines at a time. libvirtd executes five requests of one connection at a time; the fifth is
/// for other actions.
const MAX_CONCURRENT: usize = 4;

/// Calls `act` for each of these machines, a few of each hypervisor at a time: one that hangs delays no machine of another.
///
/// # Errors
/// `act` fails. The error contains all failures, with the names of their machines.
pub fn for_each<M: Reloadable + Send + Sync>(
    machines: &[Arc<M>],
    act: impl Fn(&Arc<M>) -> Result<()> + Sync,
) -> Result<()> {
    let problems = Mutex::new(Vec::new());
    let mut hypervisors: BTreeMap<Option<&str>, Vec<&Arc<M>>> = BTreeMap::new();
    for machine in machines {
        hypervisors.entry(machine.info().hypervisor.as_deref()).or_default().push(machine);
    }
    let queues: Vec<_> = hypervisors.into_values().map(|queue| Mutex::new(queue.into_iter())).collect();
    let work = |queue: &Mutex<std::vec::IntoIter<&Arc<M>>>| {
        let next = || lock(queue).next();
        while let Some(machine) = next() {
            if let Err(error) = act(machine) {
                lock(&problems).push(error.machine(machine.name()));
            }
        }
    };
    thread::scope(|scope| {
        for (number, queue) in queues.iter().enumerate() {
            // This thread works on the first queue.
            let others = MAX_CONCURRENT.min(lock(queue).len()) - usize::from(number == 0);
            for _ in 0..others {
                // Without further threads, this one does all the work.
                let _ = thread::Builder::new().spawn_scoped(scope, || work(queue));
            }
        }
        queues.iter().for_each(work);
    });
    Error::all(problems.into_inner().unwrap_or_else(PoisonError::into_inner)).map_or(Ok(()), Err)
}
