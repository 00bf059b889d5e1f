//! A plugin built against interface 1.0, as somebody installed it long ago. It uses all that 1.0 has:
//! every method, every service of the host, every record. Its memory comes from an allocator of its own,
//! which notices when anybody else's is given back to it.
//!
//! Its machines are in memory, and count the runs they have had from their snapshot.

mod allocator;

use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use machinery::config::{Configured, Machines};
use machinery::{
    Capabilities, Deadline, DumpFormat, Error, Host, MachineInfo, Machinery, Readiness, Report,
    RestoreReadiness, Result, Setup, State,
};
use serde::Deserialize;

#[global_allocator]
static ALLOCATOR: allocator::Marked = allocator::Marked;

machinery::export_machinery!(Elder);

struct Elder {
    machines: Vec<Machine>,
    host: Host,
}

struct Machine {
    info: MachineInfo,
    state: Mutex<State>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    machines: Machines<OwnKeys>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OwnKeys {
    label: String,
}

/// Its section of `machinery-host.yaml`.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Section {
    motto: String,
}

impl Machinery for Elder {
    const NAME: &'static str = "elder";
    const CONFLICTS: &'static [machinery::Conflict] =
        &[machinery::Conflict { with: "double-rival", why: "it was there first" }];

    fn load(setup: &Setup, host: Host) -> Result<Self> {
        let section: Section = setup.section("elder")?;
        let config: Config = setup.config.parse()?;
        let machine = |keys: Configured<OwnKeys>| {
            let info = MachineInfo::new(&keys.name, &keys.shared, keys.own.label, None, "lo");
            Machine { info, state: Mutex::new(State::Poweroff) }
        };
        tracing::info!(motto = section.motto, "loaded as in the old days");
        Ok(Elder { machines: config.machines.into_iter().map(machine).collect(), host })
    }

    fn check(setup: &Setup, report: &mut Report) {
        if let Some(config) = report.keep(setup.config.parse::<Config>()) {
            report.good(format!("{} machines of the old kind", config.machines.iter().count()));
            report.warning("they are not getting younger");
        }
    }

    fn version(&self, _: Deadline) -> Result<String> {
        Ok("of 1.0".to_owned())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            norestore_start: true,
            acpi_stop: true,
            dump_memory: true,
            screenshot: false,
            prepare: true,
        }
    }

    fn machines(&self) -> Vec<MachineInfo> {
        self.machines.iter().map(|machine| machine.info.clone()).collect()
    }

    fn state(&self, machine: &str, _: Deadline) -> Result<State> {
        Ok(*self.find(machine)?.state())
    }

    fn restore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.start(machine, deadline)
    }

    fn norestore_start(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.start(machine, deadline)
    }

    fn stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.end(machine, deadline)
    }

    fn acpi_stop(&self, machine: &str, deadline: Deadline) -> Result<()> {
        self.end(machine, deadline)
    }

    fn dump_memory(&self, machine: &str, path: &Path, format: DumpFormat, _: Deadline) -> Result<()> {
        if format != DumpFormat::Elf {
            return Err(Error::unsupported(format.as_str()));
        }
        if *self.find(machine)?.state() != State::Running {
            return Err(Error::unexpected_state("it is off").machine(machine));
        }
        self.host.progress(machine, 0.5);
        fs::write(path, machine).map_err(|error| Error::io("write the dump", path, &error))?;
        self.host.progress(machine, 1.0);
        Ok(())
    }

    fn prepare(&self, machine: &str, _: Deadline) -> Result<()> {
        let found = self.find(machine)?;
        if *found.state() != State::Poweroff {
            return Err(Error::unexpected_state("it is on").machine(machine));
        }
        let how = RestoreReadiness {
            mode: Readiness::Instant,
            reason: "as ready as ever".to_owned(),
            ..RestoreReadiness::default()
        };
        self.host.ready(machine, &how);
        Ok(())
    }

    fn shutdown(&self, _: Deadline) -> Result<()> {
        Ok(())
    }
}

impl Elder {
    fn find(&self, name: &str) -> Result<&Machine> {
        let machine = self.machines.iter().find(|machine| machine.info.name == name);
        machine.ok_or_else(|| Error::no_such_machine(name))
    }

    fn start(&self, name: &str, deadline: Deadline) -> Result<()> {
        let begun = Instant::now();
        let machine = self.find(name)?;
        let mut state = machine.state();
        if *state != State::Poweroff {
            return Err(Error::unexpected_state("it is on").machine(name));
        }
        deadline.check("time to start")?;
        *state = State::Running;
        self.host.step(name, "wake", begun.elapsed().max(Duration::from_nanos(1)));
        Ok(())
    }

    fn end(&self, name: &str, deadline: Deadline) -> Result<()> {
        let mut state = self.find(name)?.state();
        if *state == State::Poweroff {
            return Err(Error::state_reached("it is off").machine(name));
        }
        deadline.check("time to end")?;
        *state = State::Poweroff;
        self.host.state_changed(name, State::Poweroff, "went to bed");
        self.host.preparation_invalidated(name, "what was prepared is used up");
        Ok(())
    }
}

impl Machine {
    /// A state is whole after each statement, so poison means nothing.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
