//! Everything that the machines of one host have in common, as the toolkit's [`Adapter`](machinery_backend::Adapter)
//! needs it.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use machinery::{Capabilities, Deadline, Host, Report, Result, Setup};
use machinery_backend::{Budget, MachineSet, QemuImg, ReloadPlan, Shared};

use crate::config::{Config, MachineFiles};
use crate::machine::Machine;
use crate::peers::Peers;
use crate::prepare::Templates;
use crate::version::Program;
use crate::{check, reload};

/// Everything that the machines of one host have in common.
pub struct Qemu {
    pub qemu_img: QemuImg,
    pub program: Program,
    pub instant_dir: PathBuf,
    /// The templates. The folder is opened only if a machine wants a template or has had one.
    pub templates: OnceLock<Templates>,
    pub peers: Peers,
    pub budget: Arc<Budget>,
    pub host: Host,
}

impl Shared for Qemu {
    const NAME: &'static str = "qemu";
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

    fn open(_: &Setup, config: &Config, host: Host) -> Result<Self> {
        let qemu = Qemu {
            qemu_img: QemuImg::new(&config.binaries.qemu_img),
            program: Program::new(&config.binaries.qemu_system_x86_64, config.version)?,
            instant_dir: config.instant_dir.clone(),
            templates: OnceLock::new(),
            peers: Peers::default(),
            budget: Budget::new(config.standby_memory_limit),
            host,
        };
        // A folder that no machine needs any more may contain templates, which are removed.
        if config.machines.iter().any(|machine| machine.prepare.instant) || qemu.instant_dir.is_dir() {
            qemu.open_templates()?;
        }
        Ok(qemu)
    }

    fn host(&self) -> &Host {
        &self.host
    }

    fn machine(self: &Arc<Self>, setup: &Setup, files: MachineFiles) -> Arc<Machine> {
        Machine::new(files, &setup.sockets_dir, Arc::clone(self))
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
        self.apply_template_settings(&config, &machines.all());
        Ok(())
    }

    fn expect_unchanged(&self, setup: &Setup, config: &Config) -> Result<()> {
        reload::expect_unchanged(self, setup, config)
    }

    fn get_ready(&self, _: &Config, plan: &ReloadPlan<Machine>, _: Deadline) -> Result<()> {
        let wants_template = plan.machines().iter().any(|machine| machine.is_instant());
        if wants_template { self.open_templates() } else { Ok(()) }
    }

    fn committed(&self, config: &Config, _: &[Arc<Machine>], machines: &[Arc<Machine>]) {
        self.budget.set_limit(config.standby_memory_limit);
        self.apply_template_settings(config, machines);
    }
}

impl Qemu {
    /// Opens the folder of the templates, unless it is open.
    ///
    /// # Errors
    /// As [`Templates::open`].
    fn open_templates(&self) -> Result<()> {
        if self.templates.get().is_none() {
            // No other thread opens the folder meanwhile: the folder has a lock.
            let _ = self.templates.set(Templates::open(&self.instant_dir)?);
        }
        Ok(())
    }

    /// Removes the templates of machines that are not to have one, and sets the limit of their disk space.
    fn apply_template_settings(&self, config: &Config, machines: &[Arc<Machine>]) {
        let Some(templates) = self.templates.get() else { return };
        let instant = machines.iter().filter(|machine| machine.is_instant());
        templates.space().set_limit(config.instant_space_limit);
        templates.keep_only(&instant.map(|machine| machine.name()).collect::<Vec<_>>());
    }
}
