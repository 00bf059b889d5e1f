//! Starts a machine: from its snapshot, the fastest way first, or cold.
//!
//! A restore resumes the standby, or else maps the template, or else loads the snapshot. If one way fails,
//! the next slower one follows in the same action.

use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, Result};
use machinery_backend::Operation;

use super::base::Machine;
use super::start::{INSTANT_TIMEOUT, resume};
use super::state::{MachineOperation, MachineState, finish};
use crate::prepare::Identity;
use crate::restore::Load;
use crate::run::Run;
use crate::run::start_error::StartError;
use crate::snapshot::Snapshot;
use crate::standby::Standby;

/// The maximum time to resume a standby: many times its duration, and a small part of an action's deadline.
const RESUME_TIMEOUT: Duration = Duration::from_secs(5);

impl Machine {
    /// Starts the machine from its snapshot.
    ///
    /// # Errors
    /// The machine is on, or no way to restore it works.
    pub(super) fn start_from_snapshot(&self, deadline: Deadline) -> Result<()> {
        self.start_with(deadline, |starting, standby| self.restore(starting, standby, deadline))
    }

    /// Starts the machine cold.
    ///
    /// # Errors
    /// The machine is on, or QEMU does not start.
    pub(super) fn start_cold(&self, deadline: Deadline) -> Result<()> {
        self.cancel_preparation(deadline);
        self.start_with(deadline, |starting, standby| {
            standby.map_or(Ok(()), |standby| standby.end(deadline))?;
            self.start_running(starting, None, Load::Nothing, deadline)
        })
    }

    /// Starts the machine with `start`, which gets the standby.
    fn start_with(
        &self,
        deadline: Deadline,
        start: impl FnOnce(&MachineOperation, Option<Box<Standby>>) -> Result<Arc<Run>, StartError>,
    ) -> Result<()> {
        self.expect_free_space()?;
        let (starting, standby) =
            self.work.begin(Operation::Starting, deadline, MachineState::take_standby)?;
        let had_standby = standby.is_some();
        let discarded = self.shared.peers.discard_rivals(self, deadline);
        let started = match (discarded, standby) {
            (Ok(()), standby) => start(&starting, standby),
            (Err(error), None) => Err(error.into()),
            (Err(error), Some(standby)) => standby.end(deadline).and(Err(error.into())),
        };
        let started = started.inspect(|run| self.shared.space.watch(run.as_disk_writer()));
        let started = finish(&starting, started.map(Some));
        drop(starting);
        if had_standby {
            self.readiness.report();
        }
        started
    }

    /// Restores the machine the fastest way that works.
    fn restore(
        &self,
        starting: &MachineOperation,
        mut standby: Option<Box<Standby>>,
        deadline: Deadline,
    ) -> Result<Arc<Run>, StartError> {
        let known = starting.lock().identity.take();
        let identity = match known.filter(|known| known.is_current(self.files(), &self.shared.program)) {
            Some(identity) => identity,
            None => self.current_identity(&mut standby, deadline)?,
        };
        if let Some(standby) = standby {
            match self.resume_standby(standby, &identity, deadline.within(RESUME_TIMEOUT)) {
                Ok(run) => {
                    self.on_template_loaded();
                    return Ok(run);
                }
                Err(why) => self.fall_back("the standby is not used", why, deadline)?,
            }
        }
        if let Some(template) = self.usable_template(&identity, starting, deadline.within(INSTANT_TIMEOUT)) {
            let ram = template.ram.clone();
            let (memory, devices) = (Some(template.memory), Load::Devices(template.devices));
            match self.start_running(starting, memory, devices, deadline.within(INSTANT_TIMEOUT)) {
                Ok(run) => {
                    self.on_template_loaded();
                    return Ok(run);
                }
                Err(why) => {
                    self.on_template_failed(&identity, &ram, &why);
                    self.fall_back("the template is not used", why, deadline)?;
                }
            }
        }
        let snapshot = Snapshot::open(&self.files().snapshot)?;
        self.start_running(starting, None, Load::Snapshot(snapshot), deadline)
    }

    fn resume_standby(
        &self,
        standby: Box<Standby>,
        identity: &Identity,
        deadline: Deadline,
    ) -> Result<Arc<Run>, StartError> {
        let mut steps = self.steps();
        resume(standby.take(identity, deadline)?, &mut steps, deadline)
    }

    /// Logs the failed restore method and falls back to the next one, unless time is up or QEMU still runs.
    fn fall_back(&self, what: &str, why: StartError, deadline: Deadline) -> Result<(), StartError> {
        if why.still_running.is_some() || deadline.check(what).is_err() {
            return Err(why);
        }
        tracing::warn!(machine = self.name(), error = %why.error, "{what}");
        Ok(())
    }
}
