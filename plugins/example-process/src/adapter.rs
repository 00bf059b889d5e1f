//! The machinery for the toolkit's adapter: its name, its configuration, its checks.

use std::sync::Arc;
use std::time::Duration;

use machinery::{Capabilities, Deadline, Host, Report, Result, Setup};
use machinery_backend::{Budget, Shared, expect_unchanged};

use crate::config::{Config, Keys};
use crate::hypervisor;
use crate::machine::Machine;
use crate::shared::ExampleProcess;

/// The time that the program has to report its version in a check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);

impl Shared for ExampleProcess {
    /// The name in Cuckoo's list, and in the name of the library.
    const NAME: &'static str = "example-process";
    type Machine = Machine;
    type Config = Config;

    fn read(setup: &Setup) -> Result<Config> {
        Config::read(setup, Self::NAME)
    }

    fn take_machines(config: &mut Config) -> Vec<Keys> {
        std::mem::take(&mut config.machines)
    }

    fn open(setup: &Setup, config: &Config, host: Host) -> Result<Self> {
        let (state_dir, program) = (setup.state_dir.clone(), config.program.clone());
        let budget = Budget::new(config.standby_memory_limit, config.standby_memory_reserve);
        Ok(ExampleProcess { host, state_dir, budget, program })
    }

    fn machine(self: &Arc<Self>, _: &Setup, keys: Keys) -> Arc<Machine> {
        Machine::new(keys, self)
    }

    /// Changes nothing: another host may be running.
    fn check(setup: &Setup, report: &mut Report) {
        let Some(config) = report.keep(Self::read(setup)) else { return };
        let version = hypervisor::version(&config.program, Deadline::after(CHECK_TIMEOUT));
        if let Some(version) = report.keep(version) {
            report.good(format!("{version} for {} machines", config.machines.len()));
        }
    }

    fn version(&self, deadline: Deadline) -> Result<String> {
        hypervisor::version(&self.program, deadline)
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

    /// The version is that of the program at the load.
    fn expect_unchanged(&self, setup: &Setup, config: &Config) -> Result<()> {
        let (now, wanted) = (self.program.display(), config.program.display());
        expect_unchanged(Some(&setup.config), &["program"], now, wanted)
    }

    /// The other keys are parts of each machine's keys, so the reload replaces machines for which they have changed.
    fn committed(&self, config: &Config, _: &[Arc<Machine>], _: &[Arc<Machine>]) {
        self.budget.set_limits(config.standby_memory_limit, config.standby_memory_reserve);
    }

    fn budget(&self) -> Option<&Arc<Budget>> {
        Some(&self.budget)
    }
}
