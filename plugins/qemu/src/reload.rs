//! A new configuration while machines run.
//!
//! ```text
//! read, validate ─▶ changed machines are off ─▶ discard their standbys ─▶ clear leftovers of new ones ─▶ commit
//! ```
//!
//! Every refusal comes before the first change. The standbys of changed and removed machines are discarded
//! next, because a new machine may need their disk, ports or memory.

use std::path::Path;
use std::sync::Arc;

use machinery::{Deadline, Error, ReloadPlan, Reloaded, Result, Setup, expect_unchanged};

use crate::Qemu;
use crate::config::Config;
use crate::machine::Machine;
use crate::peers::Peer;

impl Qemu {
    /// Applies a new configuration.
    ///
    /// # Errors
    /// The configuration is wrong, or changes a value that only a start of the host can change. A machine that
    /// is not in use is on. A standby cannot be ended. The machines are unchanged then, but may have to be
    /// prepared again.
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
                    .preparation_invalidated(machine.name(), "a new configuration could not be applied");
            }
            return Err(error);
        }
        let reloaded = self.machines.commit(plan, deadline)?;
        self.shared.budget.set_limit(config.standby_memory_limit);
        self.apply_template_settings(config.instant_space_limit);
        Ok(reloaded)
    }

    /// Checks that the values which all machines share are unchanged.
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

/// Discards the standbys of changed and removed machines, and clears leftovers of new ones.
fn discard_changed(plan: &ReloadPlan<Machine>, deadline: Deadline) -> Result<()> {
    plan.removed.iter().for_each(|machine| machine.terminate_standby());
    let discard = |machine: &Arc<Machine>| {
        machine.discard_standby(deadline).map_err(|error| error.machine(machine.name()))
    };
    plan.removed.iter().try_for_each(discard)?;
    plan.added.iter().for_each(|machine| machine.clear_leftovers());
    Ok(())
}
