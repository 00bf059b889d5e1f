//! The machine's template: finds, builds and drops it.
//!
//! A template that cannot be built or loaded is dropped, and the failure is counted. After a few failures no
//! further template is built until the machine's identity changes. The template of several machines stays when only one of
//! them cannot load it, and after a few failures that machine is restored without it.

use std::path::Path;
use std::sync::Arc;

use machinery::{Deadline, Error, ErrorKind, Result};
use machinery_images::FileId;

use super::base::Machine;
use super::prepare::Preparation;
use super::start::StartOptions;
use super::state::MachineOperation;
use crate::launch::{Memory, RAM_PATH};
use crate::prepare::{Build, BuildError, Identity, Opener, Template, Templates, build, unavailable_reason};
use crate::restore::Load;
use crate::run::start_error::{Stage, StartError};
use crate::run::{Purpose, Run};
use crate::snapshot::Snapshot;
use crate::standby::Standby;

/// The reason why a machine has no template if its operator wants none.
const DISABLED: &str = "instant restores are off (machinery-host.yaml)";

/// A template that is missing.
struct MissingTemplate {
    why: String,
    /// The error, if the template is missing because of one.
    failed: Option<StartError>,
}

impl From<String> for MissingTemplate {
    fn from(why: String) -> Self {
        MissingTemplate { why, failed: None }
    }
}

impl Machine {
    /// Returns the machine's current identity. Ends the standby if the identity cannot be determined.
    pub(super) fn current_identity(
        &self,
        standby: &mut Option<Box<Standby>>,
        deadline: Deadline,
    ) -> Result<Identity, StartError> {
        self.identity().or_else(|error| {
            standby.take().map_or(Ok(()), |standby| standby.end(deadline))?;
            Err(error.into())
        })
    }

    /// Returns the machine's template, if it has one that matches. A stale one is dropped.
    pub(super) fn template(&self, identity: &Identity) -> Option<Template> {
        let found = self.templates()?.find(self.template_name(), identity, self.opener());
        found.unwrap_or_else(|why| {
            tracing::info!(machine = self.name(), why, "a stale template was dropped");
            self.on_template_dropped(&why);
            None
        })
    }

    /// Returns the machine's template for a restore, if it has one that can be mapped in time.
    pub(super) fn usable_template(
        &self,
        identity: &Identity,
        starting: &MachineOperation,
        deadline: Deadline,
    ) -> Option<Template> {
        if self.load_failures.reason_to_give_up(identity).is_some() {
            return None;
        }
        let mapped = self.mappable(self.template(identity)?, starting, deadline);
        let warn =
            |error: &Error| tracing::warn!(machine = self.name(), %error, "the template cannot be mapped");
        mapped.inspect_err(warn).ok()
    }

    /// Returns the template in the form that QEMU maps. A QEMU that opens the RAM for writing could change that of other
    /// machines.
    fn mappable(
        &self,
        template: Template,
        operation: &MachineOperation,
        deadline: Deadline,
    ) -> Result<Template> {
        match self.files().is_shared && self.opens_for_writing() {
            true => self.shared_template.in_memory(template, operation.cancellation(), deadline),
            false => Ok(template),
        }
    }

    /// Counts the failure to load the template, which is dropped unless only this one of several machines cannot load it. A
    /// start that failed for another reason, such as a port in use, counts nothing.
    pub(super) fn on_template_failed(&self, identity: &Identity, ram: &FileId, failed: &StartError) {
        if failed.still_running.is_some() || !self.is_load_failed(failed) {
            return;
        }
        let why = format!("its template could not be loaded: {}", failed.error.reason());
        if self.files().is_shared && !self.shared_template.is_at_fault(ram, self.name()) {
            self.load_failures.add(identity, &why);
            if let Some(why) = self.load_failures.reason_to_give_up(identity) {
                self.readiness.set_plain(&why);
                self.readiness.report();
            }
            return;
        }
        self.shared_template.failures.add(identity, &why);
        if let Some(templates) = self.templates() {
            templates.remove_failed(self.template_name(), ram);
        }
        self.on_template_dropped(&why);
    }

    /// Notes that the template is good, and that this machine can load it.
    pub(super) fn on_template_loaded(&self) {
        self.load_failures.clear();
        self.shared_template.loaded();
    }

    /// Reports whether loading failed, or QEMU's error is about the template's RAM file.
    /// A failure of several machines does not count when a busy computer is late.
    fn is_load_failed(&self, failed: &StartError) -> bool {
        let is_late = self.files().is_shared && failed.error.kind() == ErrorKind::Timeout;
        failed.at == Stage::Load && !is_late || failed.error.reason().contains(RAM_PATH)
    }

    /// Reports whether QEMU opens its RAM for writing, although it maps the file privately.
    fn opens_for_writing(&self) -> bool {
        !self.shared.program.version().maps_readonly_files()
    }

    fn opener(&self) -> Opener {
        match (self.files().is_shared, self.opens_for_writing()) {
            // QEMU gets a copy in memory.
            (true, true) => Opener::default(),
            (true, false) => Opener { group: self.jail.shared_group(), writes: false },
            (false, writes) => Opener { group: self.jail.user().map(|user| user.gid), writes },
        }
    }

    /// Notes that the machine has a template of that size on disk. The first machine of a template has all of its space.
    pub(super) fn set_instant(&self, disk: u64) {
        self.readiness.set_instant(if self.files().is_first_of_template { disk } else { 0 });
    }

    fn on_template_dropped(&self, why: &str) {
        self.shared_template.forget_memory();
        self.readiness.set_plain(why);
        self.readiness.report();
    }

    /// Returns all templates, if this machine is configured to have one.
    fn templates(&self) -> Option<&Templates> {
        self.shared.templates.get().filter(|_| self.is_instant())
    }

    /// Returns the reason why the machine cannot have a template, or is not configured to have one.
    fn template_unavailable_reason(&self) -> Option<String> {
        let Some(templates) = self.templates() else { return Some(DISABLED.to_owned()) };
        if !templates.fits_into_arguments() {
            return Some("the path of instant_dir has a comma, quote or backslash".to_owned());
        }
        unavailable_reason(&self.files().start_args, self.shared.program.version())
    }
}

impl Preparation<'_> {
    /// Returns the machine's template, which is built if there is none, and notes the machine's readiness.
    ///
    /// # Errors
    /// The template could not be built.
    pub(super) fn find_or_build_template(&self, identity: &Identity) -> Result<Option<Template>, StartError> {
        let template = match self.machine.template_unavailable_reason() {
            Some(why) => Err(MissingTemplate::from(why)),
            None => self.build_if_missing(identity).and_then(|template| self.mappable(template)),
        };
        match template {
            Ok(template) => {
                self.machine.set_instant(template.disk);
                Ok(Some(template))
            }
            Err(MissingTemplate { why, failed }) => {
                self.machine.readiness.set_plain(&why);
                failed.map_or(Ok(None), Err)
            }
        }
    }

    fn build_if_missing(&self, identity: &Identity) -> Result<Template, MissingTemplate> {
        let machine = self.machine;
        if let Some(template) = self.find(identity)? {
            return Ok(template);
        }
        let templates = machine.templates().ok_or_else(|| DISABLED.to_owned())?;
        let turn = machine.shared_template.turn(self.operation.cancellation(), self.deadline);
        let _turn = turn.map_err(|error| MissingTemplate {
            why: error.reason().to_string(),
            failed: Some(error.into()),
        })?;
        // Another machine may have built it meanwhile.
        if let Some(template) = self.find(identity)? {
            return Ok(template);
        }
        machine.shared_template.forget_memory();
        match build(templates, machine.template_name(), self, self.deadline) {
            Ok(()) => {
                let built = machine.template(identity);
                built.ok_or_else(|| "its template was changed as soon as it was built".to_owned().into())
            }
            Err(BuildError::NoSpace(why)) => Err(why.into()),
            Err(BuildError::Failed(failed)) => Err(self.on_build_failed(identity, templates, failed)),
        }
    }

    /// Returns the template; none if it has to be built.
    fn find(&self, identity: &Identity) -> Result<Option<Template>, MissingTemplate> {
        if let Some(why) = self.machine.load_failures.reason_to_give_up(identity) {
            return Err(why.into());
        }
        if let Some(template) = self.machine.template(identity) {
            return Ok(Some(template));
        }
        let reason = self.machine.shared_template.failures.reason_to_give_up(identity);
        reason.map_or(Ok(None), |why| Err(why.into()))
    }

    fn mappable(&self, template: Template) -> Result<Template, MissingTemplate> {
        let mappable = self.machine.mappable(template, self.operation, self.deadline);
        mappable.map_err(|error| {
            let failed = self.operation.cancellation().is_cancelled().then(|| error.clone().into());
            MissingTemplate { why: format!("its template cannot be mapped: {}", error.reason()), failed }
        })
    }

    fn on_build_failed(
        &self,
        identity: &Identity,
        templates: &Templates,
        failed: StartError,
    ) -> MissingTemplate {
        let StartError { error, at, still_running } = failed;
        let error = templates.space().full_reason().map_or(error.clone(), |full| error.detail(&full));
        let why = format!("its template could not be built: {}", error.reason());
        if !self.operation.cancellation().is_cancelled() && at != Stage::Process {
            self.machine.shared_template.failures.add(identity, &why);
        }
        let error = error.action("building its template");
        MissingTemplate { why, failed: Some(StartError { error, at, still_running }) }
    }
}

impl Build for Preparation<'_> {
    fn start(
        &self,
        disk: &Path,
        memory: Option<Memory>,
        load: Load,
        deadline: Deadline,
    ) -> Result<Arc<Run>, StartError> {
        self.ensure_wanted()?;
        let options = StartOptions { first_overlay: disk, memory, load, purpose: Purpose::Preparation };
        self.machine.start_paused(self.operation, options, &mut self.machine.steps(), deadline)
    }

    fn identity(&self) -> Result<Identity> {
        self.machine.identity()
    }

    fn snapshot(&self) -> Result<Snapshot> {
        Snapshot::open(&self.machine.files().snapshot)
    }

    fn ensure_wanted(&self) -> Result<()> {
        self.operation.cancellation().ensure_wanted()
    }

    fn opener(&self) -> Opener {
        self.machine.opener()
    }
}
