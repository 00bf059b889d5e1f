//! A machinery whose machines exist in memory only. It is two things:
//!
//! - the template for authors: everything a plugin has to do is here, and nothing else;
//! - the host's own test double: delays and faults can be configured, so that the host can be
//!   tested without a hypervisor.
//!
//! A machine counts its runs' ticks: `restore_start` sets the counter to the configured `snapshot`
//! value, so a restore can be told from a cold start.
//!
//! ```text
//!              restore_start, norestore_start
//!   poweroff ─────────────────────────────────▶ running
//!      ▲                                           │
//!      └───────── stop, acpi_stop, dies_after ─────┘
//!
//!   poweroff ── prepare ──▶ poweroff, and the next restore_start takes no time
//! ```
//!
//! | room | what it holds |
//! | --- | --- |
//! | `config` | the YAML of this machinery, as types |
//! | `machine` | one machine: its state, its faults |
//! | this file | the [`Machinery`] around them |

mod config;
mod machine;

use std::path::Path;
use std::sync::Arc;

use machinery::config::Configured;
use machinery::{
    Capabilities, Deadline, DumpFormat, Error, Host, MachineInfo, Machinery, Report, Result, Setup, State,
};

use config::{Action, Config, OwnKeys};
use machine::Machine;

machinery::export_machinery!(Example);

struct Example {
    machines: Vec<Arc<Machine>>,
    infos: Vec<MachineInfo>,
    capabilities: Capabilities,
}

impl Machinery for Example {
    const NAME: &'static str = "example";
    const CONFLICTS: &'static [machinery::Conflict] =
        &[machinery::Conflict { with: "example-rival", why: "both would keep the same machines in memory" }];

    fn load(setup: &Setup, host: Host) -> Result<Self> {
        let config = Config::read(setup)?;
        let infos = config.infos();
        let capabilities = config.capabilities.into();
        let machine = |keys: Configured<OwnKeys>| Arc::new(Machine::new(keys.name, keys.own, host.clone()));
        let machines: Vec<Arc<Machine>> = config.machines.into_iter().map(machine).collect();
        tracing::info!(machines = machines.len(), "example machines are in memory");
        Ok(Example { machines, infos, capabilities })
    }

    fn check(setup: &Setup, report: &mut Report) {
        if let Some(config) = report.keep(Config::read(setup)) {
            report.good(format!("{} machines in memory, which need nothing", config.infos().len()));
        }
    }

    fn version(&self, _: Deadline) -> Result<String> {
        Ok(format!("memory {}", env!("CARGO_PKG_VERSION")))
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn machines(&self) -> Vec<MachineInfo> {
        self.infos.clone()
    }

    fn state(&self, machine: &str, deadline: Deadline) -> Result<State> {
        self.find(machine)?.state(deadline)
    }

    fn restore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.find(machine)?.start(Action::RestoreStart, deadline)
    }

    fn norestore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.supports(self.capabilities.norestore_start, "norestore_start")?;
        self.find(machine)?.start(Action::NorestoreStart, deadline)
    }

    fn stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.find(machine)?.stop(Action::Stop, deadline)
    }

    fn acpi_stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.supports(self.capabilities.acpi_stop, "acpi_stop")?;
        self.find(machine)?.stop(Action::AcpiStop, deadline)
    }

    fn dump_memory(&self, machine: &str, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        self.supports(self.capabilities.dump_memory, "dump_memory")?;
        if format != DumpFormat::Elf {
            return Err(Error::unsupported(&format!("the memory dump format '{}'", format.as_str())));
        }
        self.find(machine)?.dump_memory(path, deadline)
    }

    fn screenshot(&self, machine: &str, path: &Path, deadline: Deadline) -> Result<()> {
        self.supports(self.capabilities.screenshot, "screenshot")?;
        self.find(machine)?.screenshot(path, deadline)
    }

    fn prepare(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.supports(self.capabilities.prepare, "prepare")?;
        self.find(machine)?.prepare(deadline)
    }

    fn shutdown(&self, _: Deadline) -> Result<()> {
        self.machines.iter().for_each(|machine| machine.forget());
        Ok(())
    }
}

impl Example {
    fn find(&self, name: &str) -> Result<&Arc<Machine>> {
        let found = self.machines.iter().find(|machine| machine.name() == name);
        found.ok_or_else(|| Error::no_such_machine(name))
    }

    fn supports(&self, capability: bool, what: &str) -> Result<()> {
        if capability { Ok(()) } else { Err(Error::unsupported(what)) }
    }
}
