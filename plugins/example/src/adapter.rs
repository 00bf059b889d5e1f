//! The machinery for the toolkit's adapter: its name, its configuration, its checks.

use std::sync::Arc;

use machinery::{Capabilities, Deadline, Host, Report, Result, Setup};
use machinery_backend::Shared;

use crate::config::{Config, Keys};
use crate::machine::Machine;
use crate::shared::Example;

impl Shared for Example {
    /// The name in Cuckoo's list, and in the name of the library.
    const NAME: &'static str = "example";
    type Machine = Machine;
    type Config = Config;

    fn read(setup: &Setup) -> Result<Config> {
        Config::read(setup)
    }

    fn take_machines(config: &mut Config) -> Vec<Keys> {
        std::mem::take(&mut config.keys)
    }

    fn warnings(_: &Setup, config: &Config) -> Vec<String> {
        config.warnings.clone()
    }

    fn open(_: &Setup, _: &Config, host: Host) -> Result<Self> {
        Ok(Example { host })
    }

    fn machine(self: &Arc<Self>, _: &Setup, keys: Keys) -> Arc<Machine> {
        Machine::new(keys, self)
    }

    /// Changes nothing: another host may be running.
    fn check(setup: &Setup, report: &mut Report) {
        if let Some(config) = report.keep(Config::read(setup)) {
            config.warnings.into_iter().for_each(|warning| report.warning(warning));
            report.good(format!("{} machines in memory, which need no hypervisor", config.keys.len()));
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
}
