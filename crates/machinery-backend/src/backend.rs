//! What an author writes: the machinery's shared part, and one machine.

use std::path::Path;
use std::sync::Arc;

use machinery::{
    Capabilities, Conflict, Deadline, Diagnosis, DumpFormat, Error, Host, MachineInfo, Report, Result, Setup,
    State,
};

use crate::machine_set::{MachineSet, ReloadPlan, Reloadable};

/// Everything that the machines of a machinery share.
pub trait Shared: Sized + Send + Sync + 'static {
    /// See [`Machinery::NAME`].
    const NAME: &'static str;
    /// See [`Machinery::CONFLICTS`].
    const CONFLICTS: &'static [Conflict] = &[];
    /// One machine.
    type Machine: Backend<Shared = Self>;
    /// The configuration, which is valid.
    type Config;

    /// Reads the configuration.
    ///
    /// # Errors
    /// The configuration is wrong.
    fn read(setup: &Setup) -> Result<Self::Config>;

    /// Takes the keys of the machines out of the configuration, in their order.
    fn take_machines(config: &mut Self::Config) -> Vec<<Self::Machine as Reloadable>::Keys>;

    /// Returns warnings about the configuration, which the load logs.
    fn warnings(_setup: &Setup, _config: &Self::Config) -> Vec<String> {
        Vec::new()
    }

    /// Opens what the machines share. It starts no machine.
    ///
    /// # Errors
    /// The machinery cannot work on this host.
    fn open(setup: &Setup, config: &Self::Config, host: Host) -> Result<Self>;

    /// Returns the host.
    fn host(&self) -> &Host;

    /// Makes a machine. It must not change anything: a plan of a reload calls it.
    fn machine(
        self: &Arc<Self>,
        setup: &Setup,
        keys: <Self::Machine as Reloadable>::Keys,
    ) -> Arc<Self::Machine>;

    /// See [`Machinery::check`].
    fn check(setup: &Setup, report: &mut Report);

    /// See [`Machinery::version`].
    ///
    /// # Errors
    /// The hypervisor does not answer.
    fn version(&self, deadline: Deadline) -> Result<String>;

    /// See [`Machinery::capabilities`].
    fn capabilities(&self) -> Capabilities;

    /// Ends the leftovers of these machines, which a killed host has left. Their machines are not in use yet.
    ///
    /// # Errors
    /// A leftover does not end; the load or the reload fails then.
    fn adopt(&self, machines: &[Arc<Self::Machine>], _deadline: Deadline) -> Result<()> {
        machines.iter().try_for_each(|machine| machine.clear_leftovers())
    }

    /// Ends a load: all machines exist and are off.
    ///
    /// # Errors
    /// The machinery cannot work; the load fails.
    fn ready(
        self: &Arc<Self>,
        _machines: &Arc<MachineSet<Self::Machine>>,
        _config: Self::Config,
        _deadline: Deadline,
    ) -> Result<()> {
        Ok(())
    }

    /// Compares the keys that only a load can apply, such as an address, with [`expect_unchanged`](crate::expect_unchanged).
    ///
    /// # Errors
    /// Such a key has changed; the reload is refused.
    fn expect_unchanged(&self, _setup: &Setup, _config: &Self::Config) -> Result<()> {
        Ok(())
    }

    /// Gets ready for the plan of a reload, in which nothing of a machine may change yet.
    ///
    /// # Errors
    /// The plan cannot be applied; the reload is refused.
    fn get_ready(
        &self,
        _config: &Self::Config,
        _plan: &ReloadPlan<Self::Machine>,
        _deadline: Deadline,
    ) -> Result<()> {
        Ok(())
    }

    /// Applies the rest of a configuration after a reload: limits, and files of machines that are gone. The host may
    /// reload the old configuration afterwards.
    fn committed(
        &self,
        _config: &Self::Config,
        _gone: &[Arc<Self::Machine>],
        _machines: &[Arc<Self::Machine>],
    ) {
    }

    /// Diagnoses these machines. See [`Machinery::diagnose`].
    ///
    /// # Errors
    /// The diagnosis as a whole fails, or is too late.
    fn diagnose(&self, machines: &[Arc<Self::Machine>], deadline: Deadline) -> Result<Vec<Diagnosis>> {
        let diagnose = |machine: &Arc<Self::Machine>| {
            deadline.check("all machines to be diagnosed")?;
            Ok(machine.diagnose())
        };
        machines.iter().map(diagnose).collect()
    }

    /// Closes what the machines share: after a shutdown, and after a load that failed.
    fn close(&self, _deadline: Deadline) {}
}

/// The origin of a preparation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrepareOrigin {
    /// Somebody has requested the preparation.
    Request,
    /// The host prepares the machine by itself, so no changes of somebody else may be lost.
    Automatic,
}

/// One machine. The methods with the name of an action are those of [`Machinery`] for this machine.
pub trait Backend: Reloadable + Sized + Send + Sync + 'static {
    /// Everything that the machines share.
    type Shared: Shared<Machine = Self>;

    /// Returns the machine's description.
    fn info(&self) -> &MachineInfo;

    /// See [`Machinery::state`].
    ///
    /// # Errors
    /// The hypervisor does not answer.
    fn state(self: &Arc<Self>, deadline: Deadline) -> Result<State>;

    /// See [`Machinery::restore_start`].
    ///
    /// # Errors
    /// The machine is on, or does not start.
    fn restore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()>;

    /// See [`Machinery::norestore_start`].
    ///
    /// # Errors
    /// The machine is on, or does not start.
    fn norestore_start(self: &Arc<Self>, _deadline: Deadline) -> Result<()> {
        Err(Error::unsupported("norestore_start"))
    }

    /// See [`Machinery::stop`]. It ends a standby, and cancels a preparation.
    ///
    /// # Errors
    /// The machine is off already, or does not end.
    fn stop(self: &Arc<Self>, deadline: Deadline) -> Result<()>;

    /// See [`Machinery::acpi_stop`].
    ///
    /// # Errors
    /// The machine is off already, or its guest does not react.
    fn acpi_stop(self: &Arc<Self>, _deadline: Deadline) -> Result<()> {
        Err(Error::unsupported("acpi_stop"))
    }

    /// See [`Machinery::dump_memory`].
    ///
    /// # Errors
    /// The machine is off; the format is not supported; the dump fails.
    fn dump_memory(self: &Arc<Self>, _path: &Path, _format: DumpFormat, _deadline: Deadline) -> Result<()> {
        Err(Error::unsupported("dump_memory"))
    }

    /// See [`Machinery::screenshot`].
    ///
    /// # Errors
    /// The machine is off; the screenshot fails.
    fn screenshot(self: &Arc<Self>, _path: &Path, _deadline: Deadline) -> Result<()> {
        Err(Error::unsupported("screenshot"))
    }

    /// See [`Machinery::prepare`].
    ///
    /// # Errors
    /// The machine is on; the preparation fails or is cancelled.
    fn prepare(self: &Arc<Self>, _origin: PrepareOrigin, _deadline: Deadline) -> Result<()> {
        Err(Error::unsupported("prepare"))
    }

    /// Returns what makes the machine unusable, and its warnings.
    fn diagnose(&self) -> Diagnosis {
        Diagnosis::new(self.name())
    }

    /// Ends the leftovers of a killed host, before the first start.
    ///
    /// # Errors
    /// A leftover does not end.
    fn clear_leftovers(&self) -> Result<()> {
        Ok(())
    }

    /// Expects that the machine is off, so that a reload can change or remove it. It may have a standby.
    ///
    /// # Errors
    /// The machine is on: [`refuse::on_in_reload`](crate::refuse::on_in_reload).
    fn ensure_off(&self, deadline: Deadline) -> Result<()>;

    /// Asks the machine's standby to end, without waiting for it: the ends of many machines then take as long as one.
    fn begin_end(&self) {}

    /// Cancels a preparation and ends the standby, for a reload.
    ///
    /// # Errors
    /// The standby does not end.
    fn discard_standby(self: &Arc<Self>, _deadline: Deadline) -> Result<()> {
        Ok(())
    }

    /// Ends the machine's own run and standby, for a shutdown.
    ///
    /// # Errors
    /// The machine does not end. A machine that is off already is no failure.
    fn end(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.stop(deadline)
    }
}
