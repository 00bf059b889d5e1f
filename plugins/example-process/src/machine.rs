//! One machine. The toolkit's [`ProcessMachine`] has its process, and the order of actions.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use machinery::{Deadline, Diagnosis, DumpFormat, Error, Result, State};
use machinery_backend::{Backend, Output, PrepareOrigin, ProcessMachine, Reloadable, Standby};

use crate::config::Keys;
use crate::hypervisor::{self, Hypervisor};
use crate::shared::ExampleProcess;

pub struct Machine {
    keys: Keys,
    shared: Arc<ExampleProcess>,
    process: ProcessMachine<Hypervisor>,
}

impl Machine {
    pub fn new(keys: Keys, shared: &Arc<ExampleProcess>) -> Arc<Self> {
        let hypervisor = Hypervisor { program: shared.program.clone() };
        let process = ProcessMachine::new(&shared.host, &keys.info.name, &shared.state_dir, hypervisor);
        Arc::new(Machine { keys, shared: Arc::clone(shared), process })
    }
}

/// The values that a reload compares.
impl Reloadable for Machine {
    type Keys = Keys;

    fn keys(&self) -> &Keys {
        &self.keys
    }
}

impl Backend for Machine {
    fn state(self: &Arc<Self>, _: Deadline) -> Result<State> {
        Ok(self.process.state())
    }

    fn restore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.process.start(Some(&self.keys.snapshot), deadline)
    }

    fn norestore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.process.start(None, deadline)
    }

    fn stop(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.process.stop(deadline)
    }

    fn acpi_stop(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.process.acpi_stop(hypervisor::press_power_button, deadline)
    }

    /// Loads the snapshot, and leaves the guest paused: a standby, which a restore only resumes.
    fn prepare(self: &Arc<Self>, _: PrepareOrigin, deadline: Deadline) -> Result<()> {
        let share = || match self.keys.standby {
            Standby::Off => Err("standby is off".to_owned()),
            mode => {
                // A guest needs about as much memory as its snapshot has.
                let memory = fs::metadata(&self.keys.snapshot).map_or(0, |file| file.len());
                self.shared.budget.take(self.name(), mode, memory)
            }
        };
        self.process.prepare(&self.keys.snapshot, share, deadline)
    }

    /// Reports progress at least at the start and at the end. Only a finished output appears at the path.
    fn dump_memory(self: &Arc<Self>, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        let DumpFormat::Elf = format else {
            return Err(Error::unsupported(&format!("the memory dump format '{}'", format.as_str())));
        };
        let (guest, output) = (self.process.running()?, Output::at(path)?);
        self.shared.host.progress(self.name(), 0.0);
        hypervisor::dump(&guest, &output)?;
        deadline.check("the memory to be dumped")?;
        self.shared.host.progress(self.name(), 1.0);
        output.finish()
    }

    fn screenshot(self: &Arc<Self>, path: &Path, deadline: Deadline) -> Result<()> {
        let (guest, output) = (self.process.running()?, Output::at(path)?);
        hypervisor::screenshot(&guest, &output, deadline)?;
        output.finish()
    }

    /// Reports a machine without its snapshot, so that the host serves the others.
    fn diagnose(&self) -> Diagnosis {
        let mut diagnosis = Diagnosis::new(self.name());
        let found = fs::metadata(&self.keys.snapshot);
        diagnosis.keep(found.map_err(|error| Error::io("find the snapshot", &self.keys.snapshot, &error)));
        diagnosis
    }

    fn clear_leftovers(&self) -> Result<()> {
        self.process.clear_leftovers()
    }

    fn ensure_off(&self, _: Deadline) -> Result<()> {
        self.process.ensure_off()
    }

    fn discard_standby(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.process.discard_standby(deadline)
    }

    fn give_standby_back(self: &Arc<Self>, why: &str, deadline: Deadline) -> Result<()> {
        self.process.give_standby_back(why, deadline)
    }
}
