//! The `qemu` machinery: QEMU processes, controlled over QMP, restored by migration from a memory snapshot.
//!
//! A machine consists of three files that VMCloak makes: a disk, a memory snapshot, and the arguments of QEMU.
//! A restore creates overlays of the disk, starts QEMU with a paused guest, loads the snapshot as an incoming
//! migration, and resumes the guest. No disk snapshots are involved, and no shell. Most restores are prepared:
//! they only map a template, or resume a standby.
//!
//! | module | content |
//! | --- | --- |
//! | `reload` | a new configuration while machines run |
//! | `check`, `needs` | the environment, and what machines need of this computer |
//! | `machine` | one machine and its actions |
//! | `shared`, `peers` | everything that machines have in common; machines that claim the same resources |
//! | `run_slot`, `readiness` | one machine's state; its readiness for a restore |
//! | `standby` | a run that is loaded and paused |
//! | `template` | a snapshot in the form that makes a restore instant |
//! | `inspection` | memory dump and screenshot |
//! | `run` | one run, from its process to its end |
//! | `launch` | a process whose monitor is connected |
//! | `qmp`, `states` | the monitor, and the meaning of QEMU's states |
//! | `refusal` | the reasons why QEMU refuses a snapshot |
//! | `run_marker` | the runs that a host which died has left |
//! | `diagnose` | machines that cannot be used, and why |
//! | `resources` | the resources that only one QEMU at a time can use |
//! | `config` | the configuration and its checks |
//! | `disk` | the overlays of a run |
//! | `machineinfo`, `images`, `options` | the arguments, the files that they open, an option's value |
//! | `process`, `stderr`, `group` | a process, its output, and its helpers |
//! | `snapshot`, `version` | the memory snapshot; the version of QEMU |
//! | `steps`, `progress` | the duration of each step; the progress of a load |

mod check;
mod config;
mod diagnose;
mod disk;
mod group;
mod images;
mod inspection;
mod launch;
mod machine;
mod machineinfo;
mod needs;
mod options;
mod peers;
mod process;
mod progress;
mod qmp;
mod readiness;
mod refusal;
mod reload;
mod resources;
mod run;
mod run_marker;
mod run_slot;
mod shared;
mod snapshot;
mod standby;
mod states;
mod stderr;
mod steps;
mod template;
mod version;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use machinery::{
    Budget, Capabilities, Deadline, Diagnosis, DumpFormat, Error, Host, MachineInfo, MachineSet, Machinery,
    Reloaded, Report, Result, Setup, State,
};

use config::Config;
use machine::Machine;
use peers::Peers;
use shared::Shared;
use version::Program;

machinery::export_machinery!(Qemu);

struct Qemu {
    machines: MachineSet<Machine>,
    shared: Arc<Shared>,
}

impl Machinery for Qemu {
    const NAME: &'static str = "qemu";

    fn load(setup: &Setup, host: Host) -> Result<Self> {
        let config = Config::read(setup)?;
        config.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        let shared = Arc::new(Shared {
            qemu_img: config.binaries.qemu_img,
            program: Program::new(&config.binaries.qemu_system_x86_64, config.version)?,
            instant_dir: config.instant_dir,
            templates: OnceLock::new(),
            peers: Peers::default(),
            budget: Budget::new(config.standby_memory_limit),
            host,
        });
        let machine = |files| Machine::new(files, &setup.sockets_dir, Arc::clone(&shared));
        let machines: Vec<Arc<Machine>> = config.machines.into_iter().map(machine).collect();
        // A folder that no machine needs any more may contain templates, which are removed.
        if machines.iter().any(|machine| machine.is_instant()) || shared.instant_dir.is_dir() {
            shared.open_templates()?;
        }
        let qemu = Qemu { machines: MachineSet::new(machines), shared };
        qemu.apply_template_settings(config.instant_space_limit);
        qemu.machines.all().iter().for_each(|machine| machine.clear_leftovers());
        Ok(qemu)
    }

    fn check(setup: &Setup, report: &mut Report) {
        check::check(setup, report);
    }

    fn version(&self, _: Deadline) -> Result<String> {
        Ok(format!("QEMU {}", self.shared.program.version()))
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

    fn machines(&self) -> Vec<MachineInfo> {
        self.machines.all().iter().map(|machine| machine.info().clone()).collect()
    }

    fn state(&self, machine: &str, deadline: Deadline) -> Result<State> {
        self.on(machine, |machine| machine.state(deadline))
    }

    fn restore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.restore_start(deadline))
    }

    fn norestore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.norestore_start(deadline))
    }

    fn stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.stop(deadline))
    }

    fn acpi_stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.acpi_stop(deadline))
    }

    fn dump_memory(&self, machine: &str, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.dump_memory(path, format, deadline))
    }

    fn screenshot(&self, machine: &str, path: &Path, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.screenshot(path, deadline))
    }

    fn prepare(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.on(machine, |machine| machine.prepare(deadline))
    }

    fn reload(&self, setup: &Setup, in_use: &[String], deadline: Deadline) -> Result<Reloaded> {
        self.apply(setup, in_use, deadline)
    }

    fn diagnose(&self, machines: &[String], deadline: Deadline) -> Result<Vec<Diagnosis>> {
        let mut diagnoses = Vec::new();
        for machine in machines.iter().filter_map(|name| self.machines.find(name).ok()) {
            deadline.check("the files of all machines to be checked")?;
            diagnoses.push(machine.diagnose());
        }
        diagnoses.retain(Diagnosis::says_anything);
        Ok(diagnoses)
    }

    fn shutdown(&self, deadline: Deadline) -> Result<()> {
        let machines = self.machines.all();
        machines.iter().for_each(|machine| machine.terminate_standby());
        let stopped = machines.iter().map(|machine| match machine.stop(deadline) {
            Err(error) if error.kind() == machinery::ErrorKind::StateReached => Ok(()),
            other => other.map_err(|error| error.machine(&machine.info().name)),
        });
        match Error::all(stopped.filter_map(Result::err).collect()) {
            None => Ok(()),
            Some(errors) => Err(errors),
        }
    }
}

impl Qemu {
    /// Runs an action on the machine of that name, and names the machine in errors.
    fn on<T>(&self, name: &str, act: impl FnOnce(&Machine) -> Result<T>) -> Result<T> {
        act(&*self.machines.find(name)?).map_err(|error| error.machine(name))
    }

    /// Removes the templates of machines that are not to have one, and sets the limit of their disk space.
    fn apply_template_settings(&self, limit: Option<u64>) {
        let machines = self.machines.all();
        let instant = machines.iter().filter(|machine| machine.is_instant());
        let names: Vec<&str> = instant.map(|machine| machine.name()).collect();
        self.shared.apply_template_settings(&names, limit);
    }
}
