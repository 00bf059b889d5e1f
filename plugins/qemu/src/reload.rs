//! The machinery as a whole: its load, and a new configuration while machines run.
//!
//! The [`Adapter`](machinery_backend::Adapter) has the order of the steps. The standbys of changed and removed machines
//! are discarded before the commit, because a new machine may need their disk, ports or memory. Limits are no keys of a
//! machine: a smaller one discards nothing.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use machinery::{Capabilities, Deadline, Error, Host, Report, Result, Setup};
use machinery_backend::{Budget, MachineSet, ReloadPlan, Shared, expect_unchanged};

use crate::check;
use crate::config::{Config, MachineFiles};
use crate::isolation::remove_table;
use crate::jail::groups;
use crate::machine::Machine;
use crate::orphans::end_orphans;
use crate::shared::Qemu;

impl Shared for Qemu {
    const NAME: &'static str = "qemu";
    const ADOPTS: bool = true;
    type Machine = Machine;
    type Config = Config;

    fn read(setup: &Setup) -> Result<Config> {
        Config::read(setup)
    }

    fn take_machines(config: &mut Config) -> Vec<MachineFiles> {
        std::mem::take(&mut config.machines)
    }

    fn warnings(_: &Setup, config: &Config) -> Vec<String> {
        config.warnings.clone()
    }

    fn open(setup: &Setup, config: &Config, host: Host) -> Result<Self> {
        Qemu::new(config, &setup.state_dir, host)
    }

    fn machine(self: &Arc<Self>, setup: &Setup, files: MachineFiles) -> Arc<Machine> {
        Machine::new(files, &setup.sockets_dir, &setup.state_dir, Arc::clone(self))
    }

    fn check(setup: &Setup, report: &mut Report) {
        check::check(setup, report);
    }

    fn version(&self, _: Deadline) -> Result<String> {
        Ok(format!("QEMU {}", self.program.version()))
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

    fn ready(
        self: &Arc<Self>,
        machines: &Arc<MachineSet<Machine>>,
        config: Config,
        _: Deadline,
    ) -> Result<()> {
        apply_template_settings(self, &config, &machines.all());
        log_jails(&machines.all());
        end_orphans(&self.state_dir, |name| machines.find(name).is_ok());
        Ok(())
    }

    fn expect_unchanged(&self, setup: &Setup, config: &Config) -> Result<()> {
        let (binaries, file) = (&config.binaries, Some(&setup.config));
        let program = &binaries.qemu_system_x86_64;
        let checks = [
            (file, &["binaries", "qemu_img"][..], self.qemu_img.program(), &*binaries.qemu_img),
            (file, &["binaries", "qemu_system_x86_64"], self.program.path(), program),
            (
                setup.host_config.as_ref(),
                &["machineries", "qemu", "instant_dir"],
                &self.instant_dir,
                &config.instant_dir,
            ),
        ];
        let expect = |(file, key, now, wanted): (_, &[&str], &Path, &Path)| {
            expect_unchanged(file, key, now.display(), wanted.display()).err()
        };
        Error::all(checks.into_iter().filter_map(expect).collect()).map_or(Ok(()), Err)
    }

    fn get_ready(&self, _: &Config, plan: &ReloadPlan<Machine>, _: Deadline) -> Result<()> {
        let wants_template = plan.machines().iter().any(|machine| machine.is_instant());
        if wants_template { self.open_templates() } else { Ok(()) }
    }

    fn committed(&self, config: &Config, _: &[Arc<Machine>], machines: &[Arc<Machine>]) {
        self.budget.set_limits(config.standby_memory_limit, config.standby_memory_reserve);
        self.space.set_reserve(config.free_space_reserve);
        apply_template_settings(self, config, machines);
        log_jails(machines);
    }

    fn budget(&self) -> Option<&Arc<Budget>> {
        Some(&self.budget)
    }

    fn close(&self, _: Deadline) {
        if self.has_cells.load(Ordering::SeqCst) {
            remove_table(&self.state_dir);
        }
    }
}

/// Logs the layers of the jail that hold, once for all machines with the same ones.
fn log_jails(machines: &[Arc<Machine>]) {
    for (layers, machines) in groups(machines.iter().map(|machine| (machine.name(), machine.layers()))) {
        match &layers.a {
            None if layers.is_weakened_by_machine() => {
                tracing::warn!(machines, %layers, "QEMU is less confined than that of others");
            }
            None => tracing::info!(machines, %layers, "each QEMU is confined"),
            Some(_) => tracing::warn!(machines, %layers, "QEMU is not confined"),
        }
    }
}

fn apply_template_settings(qemu: &Qemu, config: &Config, machines: &[Arc<Machine>]) {
    let instant = machines.iter().filter(|machine| machine.is_instant());
    let names: Vec<&str> = instant.map(|machine| machine.template_name()).collect();
    qemu.apply_template_settings(&names, config.instant_space_limit);
}
