//! Starts a QEMU of the machine whose guest is loaded and paused, and resumes the guest.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use machinery::trust::expect_trusted;
use machinery::{Deadline, Error, Result};
use machinery_backend::jail::Confinement;
use machinery_backend::{Overlays, RUN_VARIABLE, Steps};
use rustix::fs::OFlags;

use super::base::Machine;
use super::state::{MachineOperation, end_when_cancelled};
use crate::isolation::{expect_isolated, expect_own_files};
use crate::jail::policy_of;
use crate::launch::{Memory, Start};
use crate::resources::Resource;
use crate::restore::Load;
use crate::run::start_error::{Stage, StartError};
use crate::run::{Purpose, Run};
use crate::tpm::{self, Tpm};

/// The maximum time for QEMU to connect its monitor, and for `qemu-img` to make an overlay. A cancelled
/// preparation cannot end these steps earlier.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(50);

/// The maximum time for a restore from a template: many times its duration, and a small part of an action's
/// deadline.
pub(super) const INSTANT_TIMEOUT: Duration = Duration::from_secs(30);

/// The options of a start.
pub(super) struct StartOptions<'a> {
    /// The path of the first overlay.
    pub first_overlay: &'a Path,
    /// The RAM, if it is a file of the plugin.
    pub memory: Option<Memory>,
    pub load: Load,
    pub purpose: Purpose,
}

impl Machine {
    /// Starts a run, and resumes its guest.
    pub(super) fn start_running(
        &self,
        starting: &MachineOperation,
        memory: Option<Memory>,
        load: Load,
        deadline: Deadline,
    ) -> Result<Arc<Run>, StartError> {
        let mut steps = self.steps();
        let first_overlay = &self.files().disposable;
        let options = StartOptions { first_overlay, memory, load, purpose: Purpose::Run };
        let run = self.start_paused(starting, options, &mut steps, deadline)?;
        resume(run, &mut steps, deadline)
    }

    /// Starts a run that is loaded and paused.
    pub(super) fn start_paused(
        &self,
        operation: &MachineOperation,
        options: StartOptions<'_>,
        steps: &mut Steps,
        deadline: Deadline,
    ) -> Result<Arc<Run>, StartError> {
        let StartOptions { first_overlay, memory, load, purpose } = options;
        let files = self.files();
        files.args_error.clone().map_or(Ok(()), Err)?;
        self.clear_unknown_leftovers()?;
        self.expect_no_leftovers()?;
        files.expect_safe_args()?;
        files.expect_clean_runs()?;
        expect_own_files(files)?;
        expect_isolated(files)?;
        // Before any program opens an image.
        files.chain()?;
        let (images, limit) = (files.images(), deadline.within(LAUNCH_TIMEOUT));
        let (img, name) = (&self.shared.qemu_img, self.name());
        let mut overlays = self.shared_template.overlays.overlays(img, &images, first_overlay, limit)?;
        overlays.set_keep(files.keep_disk);
        steps.done("overlay");
        let resources = Resource::of(files);
        let confinement = self.confine(&overlays, &resources)?;
        let cell = self.cell_of_start(deadline)?;
        steps.done("network");
        let files_of =
            |path: fn(&Resource) -> Option<&Path>| resources.iter().filter_map(path).map(Path::to_owned);
        let start = Start {
            machine: name,
            program: self.shared.program.path(),
            folder: files.folder(),
            version: self.shared.program.version(),
            args: files.start_args.with_overlays(&overlays.paths()),
            console: files.info.console,
            writes: overlays.paths().into_iter().map(PathBuf::from).chain(files_of(Resource::file)).collect(),
            overlays,
            socket: &self.socket,
            memory,
            incoming: !matches!(load, Load::Nothing),
            sockets: files_of(Resource::socket).collect(),
            confinement,
            tpm: self.tpm()?,
            cell,
            interface: files.isolation.as_ref().map(|isolation| isolation.interface.as_str()),
        };
        let (record, limit) = (self.record.clone(), deadline.within(LAUNCH_TIMEOUT));
        let (cell, host) = (self.cell.clone(), &self.shared.host);
        let begun = Run::begin(start, record, cell, purpose, steps, host, limit);
        let run = begun.map_err(|error| self.advise_reload(error))?;
        end_when_cancelled(operation, &run);
        let loaded = run.load(load, deadline).map_err(|error| self.advise_reload(error));
        loaded.map_err(|error| run.fail_start(error, Stage::Load))?;
        steps.done("load");
        Ok(run)
    }

    /// Returns the jail of a run with these overlays, which belong to the machine's user from now on. The other files that
    /// QEMU writes are made if they do not exist: in the jail, QEMU makes no file.
    fn confine(&self, overlays: &Overlays, resources: &[Resource]) -> Result<Confinement> {
        let files = self.files();
        let overlays: Vec<PathBuf> = overlays.paths().into_iter().map(PathBuf::from).collect();
        let mut policy = policy_of(files, self.shared.program.path(), overlays.clone());
        policy.environment.push((RUN_VARIABLE.to_owned(), self.socket.display().to_string()));
        let confinement = self.jail.confine(policy)?;
        if !confinement.is_confined() {
            return Ok(confinement);
        }
        for path in resources.iter().filter_map(Resource::file) {
            make_file(path, &confinement)?;
        }
        for overlay in &overlays {
            let file = File::open(overlay).map_err(|error| Error::io("open the overlay", overlay, &error))?;
            confinement.give(&file, overlay)?;
        }
        Ok(confinement)
    }

    /// Returns the run's own TPM, in a jail like QEMU's, if the machine has one.
    fn tpm(&self) -> Result<Option<Tpm>> {
        let args = &self.files().start_args;
        if tpm::socket(args.named()).is_none() {
            return Ok(None);
        }
        let mut policy = tpm::policy(tpm::program()?, self.policy().limits);
        policy.environment.push((RUN_VARIABLE.to_owned(), self.socket.display().to_string()));
        let state = args.tpm_state().map(|path| self.files().folder().join(path));
        Ok(Some(Tpm { confinement: self.jail.confine(policy)?, state, memory: None }))
    }

    /// Adds the advice to reload, if the arguments in the file have changed: that may have corrected the
    /// error.
    fn advise_reload(&self, error: Error) -> Error {
        if !self.files().has_other_args() {
            return error;
        }
        let file = self.files().machineinfo.display();
        error.advice(format!(
            "{file} has changed since it was read: reload the configuration (cuckoo-machinery reload)"
        ))
    }

    /// Checks that the file system of the overlays has free space.
    ///
    /// # Errors
    /// It has less than the reserve.
    pub(super) fn expect_free_space(&self) -> Result<()> {
        let folder = self.files().disposable.parent().unwrap_or(Path::new("/"));
        self.shared.space.check(folder).inspect_err(|error| {
            tracing::warn!(machine = self.name(), %error, "no run is started");
        })
    }

    pub(super) fn steps(&self) -> Steps {
        Steps::new(&self.shared.host, self.name())
    }
}

/// Makes a file that QEMU writes, if it does not exist, and gives it to the machine's user. A pipe stays as it is. A link is
/// refused: the host must not give away the file behind it.
fn make_file(path: &Path, confinement: &Confinement) -> Result<()> {
    let failed = |error: io::Error| Error::io("make a file of the start_args,", path, &error);
    if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_fifo()) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        expect_trusted(folder)?;
    }
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut options = File::options();
    options.append(true).create(true).mode(0o600).custom_flags(flags.bits().cast_signed());
    let file = options.open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    if !found.is_file() || found.nlink() != 1 {
        return Err(Error::configuration(format!("{} is no file of its own", path.display()))
            .advice("Name another file in the start_args"));
    }
    confinement.give(&file, path)
}

/// Resumes the guest of a paused run.
pub(super) fn resume(run: Arc<Run>, steps: &mut Steps, deadline: Deadline) -> Result<Arc<Run>, StartError> {
    run.resume(deadline).map_err(|error| run.fail_start(error, Stage::Run))?;
    steps.done("resume");
    Ok(run)
}
