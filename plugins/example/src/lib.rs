//! The machinery `example`.
//!
//! Its machines exist in memory only, so it needs no hypervisor. To make it a backend, replace `hypervisor` by the real
//! one, and adapt the other modules.
//!
//! | module | content |
//! | --- | --- |
//! | `config` | the YAML of this machinery, as types |
//! | `disk` | the files of a run, which are removed with the run |
//! | `hypervisor` | the simulated hypervisor: replace it |
//! | `machine` | one machine: check the state, act, wait, report |
//! | this one | the [`Machinery`] around them |

mod config;
mod disk;
mod hypervisor;
mod machine;

use std::path::Path;

use machinery::{
    Capabilities, Deadline, DumpFormat, Error, ErrorKind, Host, MachineInfo, MachineSet, Machinery,
    Reloadable, Reloaded, Report, Result, Setup, State,
};

use config::Config;
use machine::{Machine, Start};

machinery::export_machinery!(ExampleMachinery);

struct ExampleMachinery {
    machines: MachineSet<Machine>,
    host: Host,
}

impl Machinery for ExampleMachinery {
    /// The name in Cuckoo's list, and in the name of the library.
    const NAME: &'static str = "example";

    /// Starts no machine. Each machine removes the leftovers of a host that was killed.
    fn load(setup: &Setup, host: Host) -> Result<Self> {
        let config = Config::read(setup)?;
        config.warnings(&setup.config).iter().for_each(|warning| tracing::warn!("{warning}"));
        let machine = |keys| Machine::new(keys, host.clone());
        let machines: Vec<_> = config.keys(setup).into_iter().map(machine).collect();
        machines.iter().try_for_each(|machine| machine.remove_leftovers())?;
        Ok(ExampleMachinery { machines: MachineSet::new(machines), host })
    }

    /// Changes nothing: another host may be running.
    fn check(setup: &Setup, report: &mut Report) {
        if let Some(config) = report.keep(Config::read(setup)) {
            config.warnings(&setup.config).into_iter().for_each(|warning| report.warning(warning));
            report.good(format!("{} machines in memory, which need no hypervisor", config.keys(setup).len()));
        }
    }

    /// Returns the hypervisor's version, not the plugin's.
    fn version(&self, _: Deadline) -> Result<String> {
        Ok("simulated 1.0".to_owned())
    }

    /// The interface refuses the methods that are not listed here.
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            norestore_start: true,
            acpi_stop: true,
            dump_memory: true,
            screenshot: true,
            // A preparation is of no use for machines that start at once.
            prepare: false,
        }
    }

    fn machines(&self) -> Vec<MachineInfo> {
        self.machines.all().iter().map(|machine| machine.keys().info.clone()).collect()
    }

    fn state(&self, machine: &str, _: Deadline) -> Result<State> {
        Ok(self.machines.find(machine)?.state())
    }

    fn restore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.machines.find(machine)?.start(Start::Snapshot, deadline)
    }

    fn norestore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.machines.find(machine)?.start(Start::ColdBoot, deadline)
    }

    fn stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.machines.find(machine)?.stop(deadline)
    }

    fn acpi_stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.machines.find(machine)?.acpi_stop(deadline)
    }

    /// An unsupported format fails the action; the machine stays in the pool.
    fn dump_memory(&self, machine: &str, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        let machine = self.machines.find(machine)?;
        match format {
            DumpFormat::Elf => machine.dump_memory(path, deadline),
            other => Err(Error::unsupported(&format!("the memory dump format '{}'", other.as_str()))),
        }
    }

    fn screenshot(&self, machine: &str, path: &Path, deadline: Deadline) -> Result<()> {
        self.machines.find(machine)?.screenshot(path, deadline)
    }

    /// Plans first, and keeps the machines in use. Commits the plan only when no step can fail any more.
    fn reload(&self, setup: &Setup, in_use: &[String], deadline: Deadline) -> Result<Reloaded> {
        let keys = Config::read(setup)?.keys(setup);
        let machine = |keys| Machine::new(keys, self.host.clone());
        let plan = self.machines.plan(&setup.config, keys, in_use, machine)?;
        plan.added.iter().try_for_each(|machine| machine.remove_leftovers())?;
        self.machines.commit(plan, deadline)
    }

    /// The host has already stopped the machines. This function ends those that it could not stop.
    fn shutdown(&self, deadline: Deadline) -> Result<()> {
        for machine in self.machines.all() {
            match machine.stop(deadline) {
                Err(error) if error.kind() != ErrorKind::StateReached => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}
