//! A new configuration while machines run.
//!
//! All that can be refused is refused first, while nothing has changed. Then what stands by for machines
//! that change or go is ended, which a new machine may need the disk, the ports or the memory of; then
//! what a host that died may have left of the new ones; then there are new machines.

use std::path::Path;
use std::sync::Arc;

use machinery::{Deadline, Error, ReloadPlan, Reloadable, Reloaded, Result, Setup, expect_unchanged};

use crate::Qemu;
use crate::config::Config;
use crate::machine::Machine;

impl Qemu {
    /// Takes over a new configuration.
    ///
    /// # Errors
    /// It is wrong, or asks for what only a start can do; a machine that is not in use is on all the same; what
    /// stands by cannot be ended. The machines are as they were then, but may have to be prepared again.
    pub(crate) fn apply(&self, setup: &Setup, in_use: &[String], deadline: Deadline) -> Result<Reloaded> {
        let config = Config::read(setup)?;
        self.expect_same(setup, &config)?;
        let make = |files| Machine::new(files, &setup.sockets_dir, Arc::clone(&self.shared));
        let plan = self.machines.plan(&setup.config, config.machines, in_use, make)?;
        plan.removed.iter().try_for_each(|machine| machine.ensure_off(deadline))?;
        if plan.machines().iter().any(|machine| machine.is_instant()) {
            self.shared.open_templates()?;
        }
        if let Err(error) = discard_changed(&plan, deadline) {
            for machine in &plan.removed {
                self.shared
                    .host
                    .preparation_invalidated(machine.name(), "a new configuration could not be taken over");
            }
            return Err(error);
        }
        let reloaded = self.machines.commit(plan, deadline)?;
        self.shared.budget.set_limit(config.standby_memory_limit);
        self.shared.apply_template_settings(&self.machines.all(), config.instant_space_limit);
        Ok(reloaded)
    }

    /// Expects that what all machines share is as it was.
    fn expect_same(&self, setup: &Setup, config: &Config) -> Result<()> {
        let (shared, binaries, file) = (&self.shared, &config.binaries, Some(&setup.config));
        let program = &binaries.qemu_system_x86_64;
        let checks = [
            (file, &["binaries", "qemu_img"][..], &*shared.qemu_img, &*binaries.qemu_img),
            (file, &["binaries", "qemu_system_x86_64"], shared.program.path(), program),
            (
                setup.host_config.as_ref(),
                &["machineries", "qemu", "instant_dir"],
                &shared.instant_dir,
                &config.instant_dir,
            ),
        ];
        let expect = |(file, key, now, wanted): (_, &[&str], &Path, &Path)| {
            expect_unchanged(file, key, now.display(), wanted.display()).err()
        };
        Error::all(checks.into_iter().filter_map(expect).collect()).map_or(Ok(()), Err)
    }
}

/// Ends what stands by for machines that go, and what is left where new ones come.
fn discard_changed(plan: &ReloadPlan<Machine>, deadline: Deadline) -> Result<()> {
    plan.removed.iter().for_each(|machine| machine.begin_discard());
    let end = |machine: &Arc<Machine>| {
        machine.discard_standby(deadline).map_err(|error| error.machine(machine.name()))
    };
    plan.removed.iter().try_for_each(end)?;
    plan.added.iter().for_each(|machine| machine.clear_leftovers());
    Ok(())
}
