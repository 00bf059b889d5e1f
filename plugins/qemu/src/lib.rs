//! The `qemu` machinery: QEMU processes, spoken to over QMP, restored by migration from a memory
//! snapshot.
//!
//! A machine is three files that VMCloak makes: a disk, a memory snapshot, and the arguments QEMU
//! is started with. A restore makes a disposable disk on top of the disk, starts QEMU paused, has
//! it load the snapshot as an incoming migration, and lets the guest go on. No disk snapshots are
//! involved, and no shell. What can be done ahead of that is done ahead: most restores only map a
//! template, or let a run go that stands by.
//!
//! | room | what it holds |
//! | --- | --- |
//! | `config`, `machineinfo` | the configuration and what is wrong with it |
//! | `images`, `options` | what the arguments open, and an option's value |
//! | `machine` | one machine, and its run if it has one; in `prepare`, what is done ahead of its restores |
//! | `template` | a snapshot in the form that makes a restore instant |
//! | `run`, `standby` | one run, from the process to its end; one that waits to be let go |
//! | `launch` | from arguments to a process whose monitor is connected |
//! | `process`, `qmp`, `states` | the process, the monitor, and what QEMU's states mean |
//! | `stderr`, `group` | QEMU's output on stderr; the processes that QEMU starts |
//! | `snapshot`, `disk` | the memory snapshot and the overlays of a run |
//! | `refusal` | why QEMU refuses a snapshot |
//! | `steps`, `progress` | how long it takes, how far it is |
//! | `inspection` | memory dump and screenshot |
//! | `run_marker` | what a host that died left behind |
//! | `reload` | a new configuration while machines run |
//! | `resources`, `peers` | resources that only one machine at a time can use, and the machines that claim them |
//! | `needs` | tests of what machines need of this computer |
//! | `diagnose` | machines that cannot be used, and why |
//! | `check`, `version` | the environment |

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
mod refusal;
mod reload;
mod resources;
mod run;
mod run_marker;
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
use machine::{Machine, Shared};
use peers::Peers;
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
        // Where none is wanted, those of a time when they were are removed.
        if machines.iter().any(|machine| machine.is_instant()) || shared.instant_dir.is_dir() {
            shared.open_templates()?;
        }
        shared.apply_template_settings(&machines, config.instant_space_limit);
        machines.iter().for_each(|machine| machine.clear_leftovers());
        Ok(Qemu { machines: MachineSet::new(machines), shared })
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
            deadline.check("the files of all machines to be looked at")?;
            diagnoses.push(machine.diagnose());
        }
        diagnoses.retain(Diagnosis::says_anything);
        Ok(diagnoses)
    }

    fn shutdown(&self, deadline: Deadline) -> Result<()> {
        let machines = self.machines.all();
        machines.iter().for_each(|machine| machine.begin_discard());
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
    /// Does something with the machine of that name, which is named in its errors.
    fn on<T>(&self, name: &str, act: impl FnOnce(&Machine) -> Result<T>) -> Result<T> {
        act(&*self.machines.find(name)?).map_err(|error| error.machine(name))
    }
}
