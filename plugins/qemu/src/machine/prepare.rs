//! Prepares the next restore: the template, and a standby.
//!
//! ```text
//! prepare ─▶ template exists, or can be built ─▶ instant ─┬─▶ budget ─▶ a run is loaded: standby
//!        └─▶ it cannot: reason ─▶ plain ── standby: on ───┘
//! ```
//!
//! Only a machine that is off can be prepared. Its arguments may name resources that exist only once, such as
//! a tap device. The standby is therefore in the place of the next run, and every other action discards it.

use machinery::{Deadline, Error, RestoreReadiness, Result};
use machinery_backend::{Operation, Share, Standby as StandbyMode};
use serde_json::json;

use super::base::Machine;
use super::start::INSTANT_TIMEOUT;
use super::state::{MachineOperation, finish};
use crate::peers::Rival;
use crate::prepare::{Build, Identity, Template};
use crate::restore::Load;
use crate::run::start_error::StartError;
use crate::snapshot::Format;
use crate::standby::{Standby, StandbyRecord};

/// The memory that a standby with a template holds while it is idle, in bytes, whatever the size of its RAM.
/// Measured with QEMU 7.2 and 10.0. The real value is measured once the standby exists.
const MEMORY_WITH_TEMPLATE: u64 = 64 << 20;
/// The maximum ratio of a guest's memory and its compressed snapshot.
const COMPRESSION_RATIO: u64 = 3;

/// A preparation under way.
pub(super) struct Preparation<'a> {
    pub machine: &'a Machine,
    pub operation: &'a MachineOperation,
    pub deadline: Deadline,
}

/// The outcome of a preparation.
struct Prepared {
    standby: Option<Box<Standby>>,
    readiness: RestoreReadiness,
}

impl Machine {
    /// Prepares everything that the next restore needs.
    ///
    /// # Errors
    /// The machine is on; the template or the standby fails; another action cancels the preparation.
    pub(super) fn prepare_restore(&self, deadline: Deadline) -> Result<()> {
        self.expect_free_space()?;
        self.wait_for_pending_end(deadline);
        // All other machines wait for the decision below.
        self.wait_for_hidden_work(deadline);
        let deciding = self.shared.peers.decide();
        let begun = self.work.begin(Operation::Preparing, deadline, |state| {
            let standby = state.take_standby();
            standby.map_err(|on| on.advice("It is prepared by itself after its next stop"))
        });
        let rival = self.shared.peers.rival_with_qemu(self);
        drop(deciding);
        let (operation, standby) = begun?;
        if standby.is_none() {
            // It is that of the last run.
            self.cell.close(self.name());
        }
        let preparation = Preparation { machine: self, operation: &operation, deadline };
        let prepared = match rival {
            // A template cannot be built either: building starts a QEMU with all arguments.
            Some(Rival { machine, resource }) if standby.is_none() => {
                Ok(self.without_standby(format!("machine '{}' has {resource}, too", machine.name())))
            }
            _ => preparation.prepare(standby),
        };
        let installed = prepared.and_then(|prepared| preparation.install(prepared));
        let outcome = finish(&operation, installed.map(|()| None));
        self.close_cell();
        if outcome.is_err() {
            self.readiness.report();
            // A QEMU that does not end is a failure, whoever wanted its end.
            if operation.lock().run.is_none() {
                operation.cancellation().ensure_wanted()?;
            }
        }
        outcome
    }

    fn without_standby(&self, why: String) -> Prepared {
        self.readiness.set_reason(why);
        Prepared { standby: None, readiness: self.readiness.without_standby() }
    }
}

impl Preparation<'_> {
    fn prepare(&self, mut standby: Option<Box<Standby>>) -> Result<Prepared, StartError> {
        let (machine, deadline) = (self.machine, self.deadline);
        let identity = machine.current_identity(&mut standby, deadline)?;
        if let Some(standby) = standby {
            if standby.stale_reason(&identity).is_none() {
                let readiness = machine.readiness.with_standby(standby.memory());
                return Ok(Prepared { standby: Some(standby), readiness });
            }
            standby.end(deadline)?;
        }
        let template = self.find_or_build_template(&identity)?;
        let wanted = match machine.files().prepare.standby {
            StandbyMode::Off => false,
            StandbyMode::On => true,
            StandbyMode::Auto => template.is_some(),
        };
        if !wanted {
            return Ok(Prepared { standby: None, readiness: machine.readiness.without_standby() });
        }
        if machine.files().keep_disk {
            // The overlays of a standby would replace the kept overlays of the last run.
            return Ok(machine.without_standby("no standby, because disposable disks are kept".to_owned()));
        }
        let memory = self.likely_memory(&identity, template.as_ref())?;
        let share = match machine.shared.budget.take(machine.name(), machine.files().prepare.standby, memory)
        {
            Ok(share) => share,
            Err(why) => return Ok(machine.without_standby(why)),
        };
        let standby = self.load_standby(identity, template, share)?;
        let readiness = machine.readiness.with_standby(standby.memory());
        Ok(Prepared { standby: Some(Box::new(standby)), readiness })
    }

    fn load_standby(
        &self,
        identity: Identity,
        template: Option<Template>,
        mut share: Share,
    ) -> Result<Standby, StartError> {
        let (memory, load, ram) = match template {
            Some(template) => (Some(template.memory), Load::Devices(template.devices), Some(template.ram)),
            None => (None, Load::Snapshot(self.snapshot()?), None),
        };
        let (machine, mapped) = (self.machine, ram.is_some());
        let limit = if mapped { self.deadline.within(INSTANT_TIMEOUT) } else { self.deadline };
        let started = self.start(&machine.files().disposable, memory, load, limit);
        let run = started.inspect_err(|failed| {
            if let Some(ram) = ram.as_ref().filter(|_| !self.operation.cancellation().is_cancelled()) {
                machine.on_template_failed(&identity, ram, failed);
            }
        })?;
        if let Some(bytes) = run.process().memory() {
            share.set_actual(bytes);
        }
        let memory = share.bytes();
        let record = StandbyRecord { identity, ram, keys: machine.checksum(), memory };
        run.set_standby(machine.readiness.without_standby(), share, json!(record));
        if run.has_ended() {
            return Err(Error::failed("QEMU ended as soon as the standby was loaded").into());
        }
        let StandbyRecord { identity, ram, memory, .. } = record;
        Ok(Standby::new(run, identity, ram, memory))
    }

    fn likely_memory(&self, identity: &Identity, template: Option<&Template>) -> Result<u64> {
        Ok(match template {
            Some(_) => MEMORY_WITH_TEMPLATE,
            None if self.snapshot()?.format() == Format::Plain => identity.snapshot_size(),
            None => identity.snapshot_size().saturating_mul(COMPRESSION_RATIO),
        })
    }

    /// Puts the standby into place and reports the machine's readiness.
    ///
    /// # Errors
    /// The preparation was cancelled; the standby is ended then.
    fn install(&self, prepared: Prepared) -> Result<(), StartError> {
        let Prepared { mut standby, readiness } = prepared;
        self.machine.readiness.report_as(&readiness);
        // The event of an end before that report was too early.
        let has_ended = standby.as_ref().is_some_and(|standby| standby.has_ended());
        let installed = self.operation.commit(|state| state.standby = standby.take());
        if has_ended {
            self.machine.readiness.report();
        }
        installed.or_else(|cancelled| {
            standby.map_or(Ok(()), |standby| standby.end(self.deadline))?;
            Err(cancelled.into())
        })
    }
}
