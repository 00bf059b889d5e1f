//! A new configuration while machines run.
//!
//! 1. Refuse: everything that can be wrong is checked first, while nothing has changed.
//! 2. Discard: the standbys of machines that change or go are ended. Until the commit, libvirt's events still
//!    go to these machines.
//! 3. Adopt: runs that an earlier host has left of new machines are ended.
//! 4. Commit: the new machines replace the old ones, all at once.

use machinery::{Deadline, ReloadPlan, Reloaded, Result, Setup, expect_unchanged};

use crate::config::Config;
use crate::machine::Machine;
use crate::machines::{Machines, for_each_concurrently};

/// Applies a new configuration.
///
/// # Errors
/// The configuration is wrong, or names another libvirt; libvirt does not answer. A machine that is not in use
/// is on; a standby cannot be ended. The machines then stay as they were, but may have to be prepared
/// again.
pub fn apply(machines: &Machines, setup: &Setup, in_use: &[String], deadline: Deadline) -> Result<Reloaded> {
    let config = Config::read(setup)?;
    expect_unchanged(Some(&setup.config), &["dsn"], machines.link.dsn(), &config.dsn)?;
    config.make_instant_dir()?;
    let make = |keys| machines.make(keys, &setup.state_dir);
    let plan = machines.set.plan(&setup.config, config.machines, in_use, make)?;
    machines.for_each_with_libvirt(plan.added.clone(), deadline, Machine::find)?;
    plan.removed.iter().try_for_each(|machine| machine.ensure_off(deadline))?;
    if let Err(error) = discard_and_adopt(machines, &plan, deadline) {
        for machine in &plan.removed {
            let why = "a new configuration could not be applied";
            machines.host.preparation_invalidated(machine.name(), why);
        }
        return Err(error);
    }
    let removed = plan.removed.clone();
    let reloaded = machines.set.commit(plan, deadline)?;
    machines.budget.set_limit(config.standby_memory_limit);
    let all = machines.set.all();
    removed.iter().for_each(|machine| machine.remove_image(&all));
    Ok(reloaded)
}

/// Discards the standbys of the removed machines, and then adopts the added ones.
fn discard_and_adopt(machines: &Machines, plan: &ReloadPlan<Machine>, deadline: Deadline) -> Result<()> {
    for_each_concurrently(&plan.removed, |machine| machine.discard_standby(deadline))?;
    machines.adopt(plan.added.clone(), deadline)
}
