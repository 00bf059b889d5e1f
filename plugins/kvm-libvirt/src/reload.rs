//! A new configuration while machines run.
//!
//! All that can be refused is refused first, while nothing has changed. Then what stands by for machines
//! that change or go is ended, which until the end are those that libvirt's events go to; then what a host
//! that died may have left of the new ones; then there are new machines.

use std::sync::Arc;

use machinery::{Deadline, Error, ReloadPlan, Reloadable, Reloaded, Result, Setup, expect_unchanged};

use crate::config::Config;
use crate::machine::Machine;
use crate::{Kvm, for_each_concurrently};

impl Kvm {
    /// Takes over a new configuration.
    ///
    /// # Errors
    /// The configuration is wrong, or names another libvirt; libvirt does not answer; a machine that is not in
    /// use is on; a standby cannot be ended. The machines then stay as they were, but may have to be prepared
    /// again.
    pub(crate) fn apply(&self, setup: &Setup, in_use: &[String], deadline: Deadline) -> Result<Reloaded> {
        let config = Config::read(setup)?;
        expect_unchanged(Some(&setup.config), &["dsn"], self.link.dsn(), &config.dsn)?;
        config.make_instant_dir()?;
        let make = |keys| {
            let (budget, link) = (Arc::clone(&self.budget), Arc::clone(&self.link));
            Arc::new(Machine::new(keys, budget, link, &setup.state_dir, self.host.clone()))
        };
        let plan = self.machines.0.plan(&setup.config, config.machines, in_use, make)?;
        self.with_libvirt(plan.added.clone(), deadline, Machine::find)?;
        plan.removed.iter().try_for_each(|machine| machine.ensure_off(deadline))?;
        if let Err(error) = self.make_room(&plan, deadline) {
            for machine in &plan.removed {
                self.host
                    .preparation_invalidated(machine.name(), "a new configuration could not be taken over");
            }
            return Err(error);
        }
        let gone = plan.removed.clone();
        let reloaded = self.machines.0.commit(plan, deadline)?;
        self.budget.set_limit(config.standby_memory_limit);
        let machines = self.machines.0.all();
        gone.iter().for_each(|machine| machine.remove_image(&machines));
        Ok(reloaded)
    }

    /// Ends what stands by for machines that go, and what is left where new ones come.
    fn make_room(&self, plan: &ReloadPlan<Machine>, deadline: Deadline) -> Result<()> {
        match Error::all(for_each_concurrently(&plan.removed, |machine| machine.discard_standby(deadline))) {
            None => self.with_libvirt(plan.added.clone(), deadline, Machine::adopt),
            Some(problems) => Err(problems),
        }
    }
}
