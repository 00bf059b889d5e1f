//! Prepares the next restore: the template, and a standby.
//!
//! ```text
//! prepare ─▶ template exists, or can be built ─▶ instant ─┬─▶ budget ─▶ a run is loaded: standby
//!        └─▶ it cannot: reason ─▶ plain ── standby: on ───┘
//! ```
//!
//! Only a machine that is off can be prepared. Its arguments may name resources that exist only once, such as
//! a tap device. The standby is therefore in the place of the next run, and every other action discards it.

use machinery::{Deadline, Error, RestoreReadiness, Result, Share, Standby as StandbyMode};

use super::Machine;
use super::templates::INSTANT_TIMEOUT;
use crate::peers::Rival;
use crate::run::load::Load;
use crate::run::start_error::StartError;
use crate::run_slot::RunSlot;
use crate::snapshot::Format;
use crate::standby::Standby;
use crate::template::{Build, Identity, Template};

/// The memory that a standby with a template holds while it is idle, in bytes, whatever the size of its RAM.
/// Measured with QEMU 7.2 and 10.0. The real value is measured once the standby exists.
const MEMORY_WITH_TEMPLATE: u64 = 64 << 20;
/// The maximum ratio of a guest's memory and its compressed snapshot.
const COMPRESSION_RATIO: u64 = 3;

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
    pub fn prepare(&self, deadline: Deadline) -> Result<()> {
        let deciding = self.shared.peers.decide();
        let standby = self.slot.begin_prepare(deadline)?;
        let rival = self.shared.peers.rival_with_qemu(self);
        drop(deciding);
        let prepared = match rival {
            // A template cannot be built either: building starts a QEMU with all arguments.
            Some(Rival { machine, resource }) if standby.is_none() => {
                Ok(self.without_standby(format!("machine '{}' has {resource}, too", machine.name())))
            }
            _ => self.prepared(standby, deadline),
        };
        match prepared {
            Ok(Prepared { standby, readiness }) => {
                self.readiness.report_as(&readiness);
                let has_ended = standby.as_ref().is_some_and(|standby| standby.has_ended());
                let was_cancelled = self.slot.finish_prepare(standby, None);
                if was_cancelled || has_ended {
                    self.readiness.report();
                }
                if was_cancelled { Err(RunSlot::cancelled()) } else { Ok(()) }
            }
            Err(StartError { error, still_running, .. }) => {
                let was_cancelled = self.slot.finish_prepare(None, still_running);
                self.readiness.report();
                Err(if was_cancelled { RunSlot::cancelled() } else { error })
            }
        }
    }

    fn prepared(
        &self,
        mut standby: Option<Box<Standby>>,
        deadline: Deadline,
    ) -> Result<Prepared, StartError> {
        let identity = self.current_identity(&mut standby, deadline)?;
        if let Some(standby) = standby {
            if standby.stale_reason(&identity).is_none() {
                let readiness = self.readiness.with_standby(standby.memory());
                return Ok(Prepared { standby: Some(standby), readiness });
            }
            standby.end(deadline)?;
        }
        let template = self.find_or_build_template(&identity, deadline)?;
        let wanted = match self.files().prepare.standby {
            StandbyMode::Off => false,
            StandbyMode::On => true,
            StandbyMode::Auto => template.is_some(),
        };
        if !wanted {
            return Ok(Prepared { standby: None, readiness: self.readiness.without_standby() });
        }
        if self.files().keep_disk {
            // The overlays of a standby would replace the kept overlays of the last run.
            return Ok(self.without_standby("no standby, because disposable disks are kept".to_owned()));
        }
        let share = match self.shared.budget.take(self.likely_memory(&identity, template.as_ref())?) {
            Ok(share) => share,
            Err(why) => return Ok(self.without_standby(why)),
        };
        let standby = self.load_standby(identity, template, share, deadline)?;
        let readiness = self.readiness.with_standby(standby.memory());
        Ok(Prepared { standby: Some(Box::new(standby)), readiness })
    }

    fn without_standby(&self, why: String) -> Prepared {
        self.readiness.set_reason(why);
        Prepared { standby: None, readiness: self.readiness.without_standby() }
    }

    fn load_standby(
        &self,
        identity: Identity,
        template: Option<Template>,
        mut share: Share,
        deadline: Deadline,
    ) -> Result<Standby, StartError> {
        let (memory, load, ram) = match template {
            Some(template) => (Some(template.memory), Load::Devices(template.devices), Some(template.ram)),
            None => (None, Load::Snapshot(self.snapshot()?), None),
        };
        let mapped = ram.is_some();
        let limit = if mapped { deadline.within(INSTANT_TIMEOUT) } else { deadline };
        let started = self.start(&self.files().disposable, memory, load, limit);
        let run = started.inspect_err(|failed| {
            if mapped {
                self.on_template_failed(&identity, failed);
            }
        })?;
        if let Some(bytes) = run.memory() {
            share.set_actual(bytes);
        }
        run.set_standby(self.readiness.without_standby());
        if run.has_ended() {
            return Err(Error::failed("QEMU ended as soon as the standby was loaded").into());
        }
        Ok(Standby::new(run, identity, ram, share))
    }

    fn likely_memory(&self, identity: &Identity, template: Option<&Template>) -> Result<u64> {
        Ok(match template {
            Some(_) => MEMORY_WITH_TEMPLATE,
            None if self.snapshot()?.format() == Format::Plain => identity.snapshot_size(),
            None => identity.snapshot_size().saturating_mul(COMPRESSION_RATIO),
        })
    }
}
