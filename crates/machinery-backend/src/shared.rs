//! The part of an author that is about all machines of a machinery, for the [`Adapter`](crate::Adapter).

use std::sync::Arc;

use machinery::{Capabilities, Conflict, Deadline, Diagnosis, Host, Report, Result, Setup};

use crate::backend::Backend;
use crate::budget::Budget;
use crate::concurrent;
use crate::machine_set::{MachineSet, ReloadPlan, Reloadable};

/// Everything that the machines of a machinery share.
pub trait Shared: Sized + Send + Sync + 'static {
    /// See [`Machinery::NAME`](machinery::Machinery::NAME).
    const NAME: &'static str;
    /// See [`Machinery::CONFLICTS`](machinery::Machinery::CONFLICTS).
    const CONFLICTS: &'static [Conflict] = &[];
    /// True if the machines adopt what an earlier host has left: [`Backend::adopt`], [`Backend::hand_over`].
    const ADOPTS: bool = false;
    /// One machine.
    type Machine: Backend;
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

    /// Makes a machine. It must not change anything: a plan of a reload calls it.
    fn machine(
        self: &Arc<Self>,
        setup: &Setup,
        keys: <Self::Machine as Reloadable>::Keys,
    ) -> Arc<Self::Machine>;

    /// See [`Machinery::check`](machinery::Machinery::check).
    fn check(setup: &Setup, report: &mut Report);

    /// See [`Machinery::version`](machinery::Machinery::version).
    ///
    /// # Errors
    /// The hypervisor does not answer.
    fn version(&self, deadline: Deadline) -> Result<String>;

    /// See [`Machinery::capabilities`](machinery::Machinery::capabilities).
    fn capabilities(&self) -> Capabilities;

    /// Ends the leftovers of these machines, which a killed host has left. Their machines are not in use yet.
    ///
    /// # Errors
    /// A leftover does not end; the load or the reload fails then.
    fn end_leftovers(&self, machines: &[Arc<Self::Machine>], _deadline: Deadline) -> Result<()> {
        concurrent::for_each(machines, |machine| machine.clear_leftovers())
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

    /// Diagnoses these machines. See [`Machinery::diagnose`](machinery::Machinery::diagnose).
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

    /// Returns the memory for automatic standbys, whose machines have [`Backend::give_standby_back`].
    fn budget(&self) -> Option<&Arc<Budget>> {
        None
    }

    /// Closes what the machines share: after a shutdown, and after a load that failed.
    fn close(&self, _deadline: Deadline) {}
}
