//! The same action on many machines, a few at a time.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use machinery::{Error, Result};

use crate::machine_set::Reloadable;
use crate::sync::lock;

/// The maximum number of machines at a time. libvirtd executes five requests of one connection at a time; the fifth is
/// for other actions.
const MAX_CONCURRENT: usize = 4;

/// Calls `act` for each of these machines, a few at a time.
///
/// # Errors
/// `act` fails. The error contains all failures, with the names of their machines.
pub fn for_each<M: Reloadable + Send + Sync>(
    machines: &[Arc<M>],
    act: impl Fn(&Arc<M>) -> Result<()> + Sync,
) -> Result<()> {
    let problems = Mutex::new(Vec::new());
    let queue = Mutex::new(machines.iter());
    let next = || lock(&queue).next();
    let work = || {
        while let Some(machine) = next() {
            if let Err(error) = act(machine) {
                lock(&problems).push(error.machine(machine.name()));
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
