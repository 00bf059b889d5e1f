//! What is done ahead of a restore: the template, and the run that stands by.
//!
//! ```text
//! prepare ─▶ a template is there, or can be built ─▶ instant ─┬─▶ budget ─▶ a run is loaded, and stands by
//!        └─▶ it cannot: why ─▶ plain ────── standby: on ──────┘
//! ```
//!
//! A machine can be prepared when it is off, and for nobody but itself: its arguments may name what can
//! be had only once, such as a tap device. So what is prepared is in the place that its next run will be
//! in, and whatever else comes in between first lets go of it.

use std::path::Path;
use std::sync::{Arc, PoisonError};

use machinery::{Deadline, Error, Readiness, Reloadable, RestoreReadiness, Result, Share, Standby as Wanted};

use super::{INSTANT, Machine};
use crate::launch::Memory;
use crate::peers::Rival;
use crate::run::{Load, Purpose, Run, Stage, StartError};
use crate::snapshot::{Format, Snapshot};
use crate::standby::Standby;
use crate::template::{Build, BuildError, Identity, Template, Templates, build, unavailable_reason};

/// What a run holds that was restored from a template and is idle, whatever the size of its RAM; measured
/// with QEMU 7.2 and 10.0. What one really holds is measured when it is there.
const WITH_TEMPLATE: u64 = 64 << 20;
/// How much larger a guest's memory can be than its packed snapshot.
const PACKED: u64 = 3;
/// A template is not tried to be built from the same more often.
const TRIES: u32 = 3;

/// What a template could not be built from, how often that was tried, and why it failed.
pub struct BuildFailures {
    identity: Identity,
    tries: u32,
    why: String,
}

/// Why a machine has none that the operator wants to have none.
const OFF: &str = "instant restores are off (machinery-host.yaml)";

/// Why there is no template.
struct NoTemplate {
    why: String,
    /// What went wrong, where something did.
    failed: Option<StartError>,
}

impl From<String> for NoTemplate {
    fn from(why: String) -> Self {
        NoTemplate { why, failed: None }
    }
}

/// How a preparation has gone.
struct Prepared {
    standby: Option<Box<Standby>>,
    ready: RestoreReadiness,
}

impl Machine {
    /// Does ahead of time all that a restore will need.
    ///
    /// # Errors
    /// The machine is on; what cannot be prepared, or was given up for a stop.
    pub fn prepare(&self, deadline: Deadline) -> Result<()> {
        self.wait_for_pending_end(deadline);
        let deciding = self.shared.peers.decide();
        let standby = self.set_preparing(deadline)?;
        let rival = self.rival_in_the_way();
        drop(deciding);
        let prepared = match rival {
            // A template cannot be built either: building starts a QEMU with all arguments.
            Some(Rival { machine, resource }) if standby.is_none() => {
                Ok(self.no_standby(format!("machine '{}' has {resource}, too", machine.name())))
            }
            _ => self.prepared(standby, deadline),
        };
        match prepared {
            Ok(Prepared { standby, ready }) => {
                self.shared.host.ready(&self.files().info.name, &ready);
                let has_ended = standby.as_ref().is_some_and(|standby| standby.has_ended());
                let was_cancelled = self.set_prepared(standby, None);
                if was_cancelled || has_ended {
                    self.report_readiness();
                }
                if was_cancelled { Err(cancelled()) } else { Ok(()) }
            }
            Err(StartError { error, still_running, .. }) => {
                let was_cancelled = self.set_prepared(None, still_running);
                self.report_readiness();
                Err(if was_cancelled { cancelled() } else { error })
            }
        }
    }

    fn prepared(
        &self,
        mut standby: Option<Box<Standby>>,
        deadline: Deadline,
    ) -> Result<Prepared, StartError> {
        let identity = self.identity_now(&mut standby, deadline)?;
        if let Some(standby) = standby {
            if standby.fault(&identity).is_none() {
                let ready = self.ready_with(&standby);
                return Ok(Prepared { standby: Some(standby), ready });
            }
            standby.end(deadline)?;
        }
        let template = self.template_ahead(&identity, deadline)?;
        let wanted = match self.files().prepare.standby {
            Wanted::Off => false,
            Wanted::On => true,
            Wanted::Auto => template.is_some(),
        };
        if !wanted {
            return Ok(Prepared { standby: None, ready: self.without_standby() });
        }
        if self.files().keep_disk {
            // What stands by has its disk where that of the last run is.
            return Ok(self.no_standby("none stands by, because disposable disks are kept".to_owned()));
        }
        let share = match self.shared.budget.take(self.likely_memory(&identity, template.as_ref())?) {
            Ok(share) => share,
            Err(why) => return Ok(self.no_standby(why)),
        };
        let standby = self.stand_by(identity, template, share, deadline)?;
        let ready = self.ready_with(&standby);
        Ok(Prepared { standby: Some(Box::new(standby)), ready })
    }

    fn no_standby(&self, why: String) -> Prepared {
        self.set_without_standby(|ready| ready.reason = why);
        Prepared { standby: None, ready: self.without_standby() }
    }

    fn stand_by(
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
        let limit = if mapped { deadline.within(INSTANT) } else { deadline };
        let started = self.start(&self.files().disposable, memory, load, limit);
        let run = started.inspect_err(|failed| {
            if mapped {
                self.template_failed(&identity, failed);
            }
        })?;
        if let Some(bytes) = run.memory() {
            share.set_actual(bytes);
        }
        run.stand_by(self.without_standby());
        if run.has_ended() {
            return Err(Error::failed("QEMU ended as soon as it stood by").into());
        }
        Ok(Standby::new(run, identity, ram, share))
    }

    fn likely_memory(&self, identity: &Identity, template: Option<&Template>) -> Result<u64> {
        Ok(match template {
            Some(_) => WITH_TEMPLATE,
            None if self.snapshot()?.format() == Format::Plain => identity.snapshot_size(),
            None => identity.snapshot_size().saturating_mul(PACKED),
        })
    }

    /// The template, which is built if there is none; and notes how ready the machine is with it.
    fn template_ahead(
        &self,
        identity: &Identity,
        deadline: Deadline,
    ) -> Result<Option<Template>, StartError> {
        let template = match self.why_no_template() {
            Some(why) => Err(NoTemplate::from(why)),
            None => self.found_or_built(identity, deadline),
        };
        self.set_without_standby(|ready| {
            *ready = match &template {
                Ok(template) => RestoreReadiness {
                    mode: Readiness::Instant,
                    disk: template.disk,
                    ..RestoreReadiness::default()
                },
                Err(none) => RestoreReadiness { reason: none.why.clone(), ..RestoreReadiness::default() },
            }
        });
        match template {
            Ok(template) => Ok(Some(template)),
            Err(NoTemplate { failed: None, .. }) => Ok(None),
            Err(NoTemplate { failed: Some(failed), .. }) => Err(failed),
        }
    }

    /// All templates, if this machine is to have one.
    fn templates(&self) -> Option<&Templates> {
        self.shared.templates.get().filter(|_| self.is_instant())
    }

    /// Why the machine cannot have a template, or is not to have one.
    fn why_no_template(&self) -> Option<String> {
        let Some(templates) = self.templates() else { return Some(OFF.to_owned()) };
        if !templates.fits_into_arguments() {
            return Some("its instant_dir has a comma, quote or backslash in its path".to_owned());
        }
        unavailable_reason(&self.files().start_args, self.shared.program.version())
    }

    fn found_or_built(&self, identity: &Identity, deadline: Deadline) -> Result<Template, NoTemplate> {
        if let Some(template) = self.template(identity) {
            return Ok(template);
        }
        if let Some(why) = self.not_tried_again(identity) {
            return Err(why.into());
        }
        let templates = self.templates().ok_or_else(|| OFF.to_owned())?;
        match build(templates, &self.files().info.name, self, deadline) {
            Ok(()) => {
                let built = self.template(identity);
                built.ok_or_else(|| "its template was changed as soon as it was built".to_owned().into())
            }
            Err(BuildError::NoSpace(why)) => Err(why.into()),
            Err(BuildError::Failed(failed)) => Err(self.not_built(identity, templates, failed)),
        }
    }

    fn not_built(&self, identity: &Identity, templates: &Templates, failed: StartError) -> NoTemplate {
        let StartError { error, at, still_running } = failed;
        let error = templates.is_full().map_or(error.clone(), |full| error.detail(&full));
        let why = format!("its template could not be built: {}", error.reason());
        if !self.is_cancelled() && at != Stage::Process {
            self.note_build_failure(identity, &why);
        }
        let error = error.action("building its template");
        NoTemplate { why, failed: Some(StartError { error, at, still_running }) }
    }

    fn not_tried_again(&self, identity: &Identity) -> Option<String> {
        let build_failures = self.build_failures.lock().unwrap_or_else(PoisonError::into_inner);
        let known =
            build_failures.as_ref().filter(|known| known.identity == *identity && known.tries >= TRIES)?;
        Some(format!("tried {} times: {}", known.tries, known.why))
    }

    /// Drops a template that cannot be loaded; after a few failures no further one is built. A start that
    /// failed for another reason, such as a port that is in use, keeps its template.
    pub fn template_failed(&self, identity: &Identity, failed: &StartError) {
        if !self.is_cancelled() && failed.still_running.is_none() && self.is_of_template(failed) {
            let why = format!("its template could not be loaded: {}", failed.error.reason());
            self.note_build_failure(identity, &why);
            self.drop_template(&why);
        }
    }

    /// Whether loading failed, or QEMU reports an error about the template's own file.
    fn is_of_template(&self, failed: &StartError) -> bool {
        let ram = self.templates().map(|all| all.ram(&self.files().info.name).display().to_string());
        failed.at == Stage::Load || ram.is_some_and(|ram| failed.error.reason().contains(&ram))
    }

    /// Forgets the template's failures after a restore that worked.
    pub fn forget_failures(&self) {
        *self.build_failures.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn note_build_failure(&self, identity: &Identity, why: &str) {
        let mut build_failures = self.build_failures.lock().unwrap_or_else(PoisonError::into_inner);
        let before = build_failures.take().filter(|known| known.identity == *identity);
        let tries = before.map_or(0, |known| known.tries) + 1;
        *build_failures = Some(BuildFailures { identity: identity.clone(), tries, why: why.to_owned() });
    }

    /// The machine's template, if it has one that fits. One that does not is dropped.
    pub fn template(&self, identity: &Identity) -> Option<Template> {
        match self.templates()?.find(&self.files().info.name, identity) {
            Ok(template) => template,
            Err(why) => {
                tracing::info!(machine = self.files().info.name, why, "its template is stale");
                self.drop_template(&why);
                None
            }
        }
    }

    /// Drops the machine's template.
    pub fn drop_template(&self, why: &str) {
        self.set_without_standby(|ready| {
            *ready = RestoreReadiness { reason: why.to_owned(), ..RestoreReadiness::default() }
        });
        let dropped = self.templates().map_or(Ok(()), |all| all.remove(&self.files().info.name));
        if let Err(error) = dropped {
            tracing::warn!(machine = self.files().info.name, %error, "a template of no use stays behind");
        }
        self.report_readiness();
    }

    /// Reports to the host why there is no standby any more.
    pub fn report_standby_lost(&self, why: String) {
        self.set_without_standby(|ready| ready.reason = why);
        self.report_readiness();
    }

    /// Tells the host how ready the machine is, with nothing that stands by.
    pub fn report_readiness(&self) {
        self.shared.host.ready(&self.files().info.name, &self.without_standby());
    }

    fn without_standby(&self) -> RestoreReadiness {
        self.without_standby.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_without_standby(&self, change: impl FnOnce(&mut RestoreReadiness)) {
        change(&mut self.without_standby.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn ready_with(&self, standby: &Standby) -> RestoreReadiness {
        let disk = self.without_standby().disk;
        RestoreReadiness { mode: Readiness::Standby, reason: String::new(), memory: standby.memory(), disk }
    }
}

impl Build for Machine {
    fn start(
        &self,
        disk: &Path,
        memory: Option<Memory>,
        load: Load,
        deadline: Deadline,
    ) -> Result<Arc<Run>, StartError> {
        self.goes_on()?;
        self.paused(disk, memory, load, Purpose::Preparation, &mut self.steps(), deadline)
    }

    fn identity(&self) -> Result<Identity> {
        Identity::of(self.files(), &self.shared.program)
    }

    fn snapshot(&self) -> Result<Snapshot> {
        Snapshot::open(&self.files().snapshot)
    }

    fn goes_on(&self) -> Result<()> {
        if self.is_cancelled() { Err(cancelled()) } else { Ok(()) }
    }

    fn opens_for_writing(&self) -> bool {
        !self.shared.program.version().maps_readonly_files()
    }
}

fn cancelled() -> Error {
    Error::failed("the preparation was given up, because something else is to be done with the machine")
}
