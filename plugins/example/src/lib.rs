//! The machinery `example`.
//!
//! Its machines exist in memory only, so that there is nothing to install and all of it can be tried out.
//! To make it a backend, put the real hypervisor in the place of `hypervisor`, and change what is around
//! it as that needs.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `config` | the YAML of this machinery, as types |
//! | `disk` | what a run has on this host, and how it is gone with the run |
//! | `hypervisor` | the pretended hypervisor: to be thrown away |
//! | `machine` | one machine: look, act, wait, report |
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
    /// The word in Cuckoo's list, and in the name of the library.
    const NAME: &'static str = "example";

    /// Starts no machine. What a host that was killed has left is cleared away: each machine does it.
    fn load(setup: &Setup, host: Host) -> Result<Self> {
        let machine = |keys| Machine::new(keys, host.clone());
        let machines: Vec<_> = Config::read(setup)?.keys(setup).into_iter().map(machine).collect();
        machines.iter().try_for_each(|machine| machine.make_ready())?;
        Ok(ExampleMachinery { machines: MachineSet::new(machines), host })
    }

    /// Looks and changes nothing: a host may be running beside it.
    fn check(setup: &Setup, report: &mut Report) {
        if let Some(config) = report.keep(Config::read(setup)) {
            report.good(format!("{} machines in memory, which need nothing", config.keys(setup).len()));
        }
    }

    /// The hypervisor's version, not the plugin's.
    fn version(&self, _: Deadline) -> Result<String> {
        Ok("pretended 1.0".to_owned())
    }

    /// What is not here is refused by the interface itself.
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            norestore_start: true,
            acpi_stop: true,
            dump_memory: true,
            screenshot: true,
            // Nothing is gained by preparing machines that are up in a moment.
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

    /// A format that is not to be had costs this action, not the machine.
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

    /// A new configuration while machines run. First a plan, in which those in use stay as they are; only
    /// when nothing can fail any more it is followed.
    fn reload(&self, setup: &Setup, in_use: &[String], deadline: Deadline) -> Result<Reloaded> {
        let keys = Config::read(setup)?.keys(setup);
        let machine = |keys| Machine::new(keys, self.host.clone());
        let plan = self.machines.plan(&setup.config, keys, in_use, machine)?;
        plan.added.iter().try_for_each(|machine| machine.make_ready())?;
        self.machines.commit(plan, deadline)
    }

    /// The host has stopped the machines; one that it could not stop is not left running either.
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
