//! One machine: its files, and its run if it has one.
//!
//! ```text
//!        ┌──────────────── stop, end of the run ───────────────┐
//!        ▼                                                     │
//!  ┌──▶ off ── restore_start, norestore_start ─▶ starting ──▶ on
//!  │     │ prepare                                  ▲
//!  │     ▼                                          │ restore_start
//!  │  preparing ─────────▶ ready: one stands by ────┘
//!  └──── stop ───────────────┘
//! ```
//!
//! All but *starting* and *on* is powered off to the outside. A restore goes the fastest way there is, and
//! the next slower one if that fails: the run that stands by is let go; the template is mapped; the
//! snapshot is loaded.

mod prepare;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use machinery::{
    Budget, Deadline, Diagnosis, DumpFormat, Error, Host, MachineInfo, Reloadable, RestoreReadiness, Result,
    State, machine_socket,
};
use qapi::qmp;

use self::prepare::BuildFailures;
use crate::config::MachineFiles;
use crate::diagnose::{faults, file_warnings};
use crate::disk::OverlayTemplates;
use crate::inspection;
use crate::launch::{Memory, Start};
use crate::machineinfo::StartArgs;
use crate::peers::{Peers, Rival};
use crate::resources::Resource;
use crate::run::{Load, Purpose, Run, Stage, StartError};
use crate::run_marker;
use crate::snapshot::Snapshot;
use crate::standby::Standby;
use crate::states::state_of_status;
use crate::steps::Steps;
use crate::template::{Build, Identity, Templates};
use crate::version::Program;

/// How long a faster way may take before it is taken for broken: many times what it takes, and little of
/// the time there is.
const STANDBY: Duration = Duration::from_secs(5);
const INSTANT: Duration = Duration::from_secs(30);

/// How long QEMU may take to connect its monitor, and `qemu-img` to make a disk. Nothing can end that
/// before, and who gives up a preparation waits for it.
const COMING_UP: Duration = Duration::from_secs(50);

/// The time that the QEMU of a cancelled preparation has to end by itself.
const GIVING_UP: Duration = Duration::from_secs(3);

/// What all machines share.
pub struct Shared {
    pub qemu_img: PathBuf,
    pub program: Program,
    pub instant_dir: PathBuf,
    /// Not opened as long as no machine is to have one, and none has.
    pub templates: OnceLock<Templates>,
    pub peers: Peers,
    pub budget: Arc<Budget>,
    pub host: Host,
}

impl Shared {
    /// Opens the folder of the templates, unless it is open already.
    ///
    /// # Errors
    /// As [`Templates::open`].
    pub fn open_templates(&self) -> Result<()> {
        if self.templates.get().is_none() {
            // Nobody else opens it meanwhile: the folder has a lock.
            let _ = self.templates.set(Templates::open(&self.instant_dir)?);
        }
        Ok(())
    }

    /// From now on only these machines have templates, which may take that much together.
    pub fn apply_template_settings(&self, machines: &[Arc<Machine>], space: Option<u64>) {
        let Some(templates) = self.templates.get() else { return };
        let instant = machines.iter().filter(|machine| machine.is_instant());
        let names: Vec<&str> = instant.map(|machine| machine.name()).collect();
        templates.set_space(space);
        templates.keep_only(&names);
    }
}

pub struct Machine {
    configured: MachineFiles,
    /// The machine's files with its arguments, if these could be read only after the configuration.
    mended: OnceLock<MachineFiles>,
    /// The resources that the machine claims, once its arguments are known.
    resources: OnceLock<Vec<Resource>>,
    /// The reason why leftovers of a host that died still exist, if they do.
    left: Mutex<Option<Error>>,
    socket: PathBuf,
    shared: Arc<Shared>,
    now: Mutex<RunState>,
    /// Wakes those who wait for a preparation to end.
    changed: Condvar,
    /// The empty overlays that a run's overlays are copied from.
    overlay_templates: OverlayTemplates,
    /// How ready it is when nothing stands by, as far as is known.
    without_standby: Mutex<RestoreReadiness>,
    /// What a template could not be built from.
    build_failures: Mutex<Option<BuildFailures>>,
}

enum RunState {
    Off,
    Starting,
    On(Arc<Run>),
    Preparing {
        /// What runs for it.
        run: Option<Arc<Run>>,
        cancelled: bool,
    },
    Ready(Box<Standby>),
}

impl RunState {
    /// What a machine that is off becomes; gives what stood by.
    fn become_from_off(&mut self, next: RunState) -> Option<Box<Standby>> {
        match std::mem::replace(self, next) {
            RunState::Ready(standby) => Some(standby),
            _ => None,
        }
    }
}

impl Reloadable for Machine {
    type Keys = MachineFiles;

    fn key_name(files: &MachineFiles) -> &str {
        &files.info.name
    }

    fn unique(files: &MachineFiles) -> Vec<(&'static str, Option<&str>)> {
        let info = &files.info;
        vec![
            ("qcow2_path", files.disk.to_str()),
            // One's disk must not be where another's disposable disk goes, either.
            ("qcow2_path", files.disposable.to_str()),
            ("snapshot_path", files.snapshot.to_str()),
            ("ip", Some(&info.ip)),
            ("mac_address", info.mac_address.as_deref()),
        ]
    }

    fn keys(&self) -> &MachineFiles {
        self.files()
    }
}

impl Machine {
    pub fn new(files: MachineFiles, sockets: &Path, shared: Arc<Shared>) -> Arc<Self> {
        let socket = machine_socket(sockets, "qemu", &files.info.name);
        let machine = Arc::new(Machine {
            configured: files,
            mended: OnceLock::new(),
            resources: OnceLock::new(),
            left: Mutex::new(None),
            socket,
            shared,
            now: Mutex::new(RunState::Off),
            changed: Condvar::new(),
            overlay_templates: OverlayTemplates::default(),
            without_standby: Mutex::default(),
            build_failures: Mutex::new(None),
        });
        machine.shared.peers.add(&machine);
        machine
    }

    pub fn info(&self) -> &MachineInfo {
        &self.files().info
    }

    /// Whether it is to have a template.
    pub fn is_instant(&self) -> bool {
        self.files().prepare.instant
    }

    /// Returns the machine's files.
    fn files(&self) -> &MachineFiles {
        self.mended.get().unwrap_or(&self.configured)
    }

    /// Removes leftovers of a host that died. As long as some remain, the machine cannot be used.
    pub fn clear_leftovers(&self) {
        let program = self.shared.program.path();
        let (files, socket) = (self.files(), &self.socket);
        let cleared = run_marker::clear(&files.overlays(), socket, program, files.keep_disk);
        *self.left() = cleared.err();
    }

    /// Diagnoses the machine by its files as they are now. Arguments that could not be read with the
    /// configuration are read as soon as that is possible.
    pub fn diagnose(&self) -> Diagnosis {
        let mut diagnosis = Diagnosis::new(self.name());
        let files = self.files();
        let now = match StartArgs::read(&files.machineinfo) {
            Err(error) => MachineFiles { args_error: Some(error), ..files.clone() },
            Ok(start_args) if files.args_error.is_some() => {
                let mended = MachineFiles { start_args, args_error: None, ..files.clone() };
                // Once `mended` is set, this error no longer occurs.
                self.mended.get_or_init(|| mended).clone()
            }
            Ok(start_args) => {
                if start_args != files.start_args {
                    diagnosis.warn("its machineinfo.json has changed since it was read: reload to use it");
                }
                files.clone()
            }
        };
        for (_, error) in faults(&now) {
            diagnosis.keep::<()>(Err(error));
        }
        now.shared_writes_warning().into_iter().for_each(|warning| diagnosis.warn(warning));
        file_warnings(&now).into_iter().for_each(|warning| diagnosis.warn(warning));
        // What a machine that is on has is no leftover.
        if self.left().is_some() && matches!(&*self.lock(), RunState::Off) {
            self.clear_leftovers();
        }
        diagnosis.keep(self.left().clone().map_or(Ok(()), Err));
        diagnosis
    }

    fn left(&self) -> MutexGuard<'_, Option<Error>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn state(&self, deadline: Deadline) -> Result<State> {
        let run = match &*self.lock() {
            RunState::Off | RunState::Preparing { .. } | RunState::Ready(_) => return Ok(State::Poweroff),
            RunState::Starting => return Ok(State::Starting),
            RunState::On(run) if run.has_just_resumed() => return Ok(State::Running),
            RunState::On(run) => Arc::clone(run),
        };
        match run.execute(&qmp::query_status {}, deadline) {
            Ok(status) => state_of_status(status["status"].as_str().unwrap_or("")),
            Err(error) => {
                // A monitor that fails is the first sign of the end.
                if run.has_ended_soon(deadline) { Ok(State::Poweroff) } else { Err(error) }
            }
        }
    }

    /// Starts from the snapshot.
    ///
    /// # Errors
    /// It runs already; whatever kept it from running.
    pub fn restore_start(&self, deadline: Deadline) -> Result<()> {
        self.start_by(deadline, |standby| self.restored(standby, deadline))
    }

    /// Starts cold.
    ///
    /// # Errors
    /// As [`restore_start`](Machine::restore_start).
    pub fn norestore_start(&self, deadline: Deadline) -> Result<()> {
        self.start_by(deadline, |standby| {
            standby.map_or(Ok(()), |standby| standby.end(deadline))?;
            self.run(None, Load::Nothing, deadline)
        })
    }

    /// Starts it in that way, which is given what stood by.
    fn start_by(
        &self,
        deadline: Deadline,
        way: impl FnOnce(Option<Box<Standby>>) -> Result<Arc<Run>, StartError>,
    ) -> Result<()> {
        let standby = self.set_starting(deadline)?;
        let stood_by = standby.is_some();
        let cleared = self.discard_rivals(deadline);
        let started = self.set_started(match (cleared, standby) {
            (Ok(()), standby) => way(standby),
            (Err(error), None) => Err(error.into()),
            (Err(error), Some(standby)) => standby.end(deadline).and(Err(error.into())),
        });
        if stood_by {
            self.report_readiness();
        }
        started
    }

    /// Returns the resources that the machine claims; none as long as its arguments cannot be read.
    pub fn resources(&self) -> &[Resource] {
        let files = self.files();
        if files.args_error.is_some() {
            return &[];
        }
        self.resources.get_or_init(|| Resource::of(files))
    }

    /// Discards the standbys and preparations of machines that claim the same resources, so that this one can
    /// start.
    fn discard_rivals(&self, deadline: Deadline) -> Result<()> {
        for Rival { machine: rival, resource } in self.shared.peers.rivals(self) {
            if rival.is_prepared() {
                let (machine, other) = (self.name(), rival.name());
                tracing::info!(machine, other, %resource, "the standby of another machine has what this one needs: discarded");
                let discarded = rival.discard_standby(deadline);
                discarded.map_err(|error| error.detail(&format!("machine '{other}' has {resource}, too")))?;
                rival.report_standby_lost(format!("machine '{machine}' needed {resource}"));
            }
        }
        Ok(())
    }

    /// Returns a machine that claims the same resource and has a QEMU: it runs, is a standby, or is being
    /// prepared.
    fn rival_in_the_way(&self) -> Option<Rival> {
        self.shared.peers.rivals(self).into_iter().find(|rival| rival.machine.has_qemu())
    }

    /// Whether the next restore is prepared or being prepared.
    fn is_prepared(&self) -> bool {
        matches!(&*self.lock(), RunState::Preparing { .. } | RunState::Ready(_))
    }

    fn has_qemu(&self) -> bool {
        match &*self.lock() {
            RunState::Off => false,
            RunState::On(run) => !run.has_ended(),
            RunState::Starting | RunState::Preparing { .. } | RunState::Ready(_) => true,
        }
    }

    /// Gives what stood by, which is the caller's now. Waits while a machine that claims the same resource
    /// discards the standby.
    fn set_starting(&self, deadline: Deadline) -> Result<Option<Box<Standby>>> {
        let is_discarding = |now: &mut RunState| matches!(now, RunState::Preparing { cancelled: true, .. });
        let waited = self.changed.wait_timeout_while(self.lock(), deadline.remaining(), is_discarding);
        let (mut now, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let running = match &*now {
            RunState::Off | RunState::Ready(_) => false,
            RunState::Starting | RunState::Preparing { .. } => true,
            RunState::On(run) => !run.has_ended(),
        };
        if running {
            return Err(Error::unexpected_state("the machine is not powered off").advice("Stop it first"));
        }
        Ok(now.become_from_off(RunState::Starting))
    }

    fn set_started(&self, started: Result<Arc<Run>, StartError>) -> Result<()> {
        let (now, result) = match started {
            Ok(run) => (RunState::On(run), Ok(())),
            // A QEMU that does not end still has the disk and the socket.
            Err(StartError { error, still_running, .. }) => {
                (still_running.map_or(RunState::Off, RunState::On), Err(error))
            }
        };
        *self.lock() = now;
        result
    }

    /// The fastest way there is.
    fn restored(
        &self,
        mut standby: Option<Box<Standby>>,
        deadline: Deadline,
    ) -> Result<Arc<Run>, StartError> {
        let identity = self.identity_now(&mut standby, deadline)?;
        if let Some(standby) = standby {
            match self.released(standby, &identity, deadline.within(STANDBY)) {
                Ok(run) => {
                    self.forget_failures();
                    return Ok(run);
                }
                Err(why) => self.no_faster("what stood by is not used", why, deadline)?,
            }
        }
        if let Some(template) = self.template(&identity) {
            let (memory, devices) = (Some(template.memory), Load::Devices(template.devices));
            match self.run(memory, devices, deadline.within(INSTANT)) {
                Ok(run) => {
                    self.forget_failures();
                    return Ok(run);
                }
                Err(why) => {
                    self.template_failed(&identity, &why);
                    self.no_faster("the template is not used", why, deadline)?;
                }
            }
        }
        self.run(None, Load::Snapshot(Snapshot::open(&self.files().snapshot)?), deadline)
    }

    /// What the machine is made from now. Nothing stands by any more if that cannot be told.
    fn identity_now(
        &self,
        standby: &mut Option<Box<Standby>>,
        deadline: Deadline,
    ) -> Result<Identity, StartError> {
        self.identity().or_else(|error| {
            standby.take().map_or(Ok(()), |standby| standby.end(deadline))?;
            Err(error.into())
        })
    }

    fn released(
        &self,
        standby: Box<Standby>,
        identity: &Identity,
        deadline: Deadline,
    ) -> Result<Arc<Run>, StartError> {
        let mut steps = self.steps();
        resume_run(standby.take(identity, deadline)?, &mut steps, deadline)
    }

    /// A way that failed is told, and the next one is gone; unless this one has used up all the time, or its
    /// QEMU does not end.
    fn no_faster(&self, what: &str, why: StartError, deadline: Deadline) -> Result<(), StartError> {
        if why.still_running.is_some() || deadline.check(what).is_err() {
            return Err(why);
        }
        tracing::warn!(machine = self.files().info.name, error = %why.error, "{what}");
        Ok(())
    }

    /// A run that was let go.
    fn run(&self, memory: Option<Memory>, load: Load, deadline: Deadline) -> Result<Arc<Run>, StartError> {
        let mut steps = self.steps();
        let run = self.paused(&self.files().disposable, memory, load, Purpose::Run, &mut steps, deadline)?;
        resume_run(run, &mut steps, deadline)
    }

    /// Starts a run that is loaded and paused. Its first overlay is at `first`.
    fn paused(
        &self,
        first: &Path,
        memory: Option<Memory>,
        load: Load,
        purpose: Purpose,
        steps: &mut Steps<'_>,
        deadline: Deadline,
    ) -> Result<Arc<Run>, StartError> {
        let files = self.files();
        files.args_error.clone().map_or(Ok(()), Err)?;
        self.left().clone().map_or(Ok(()), Err)?;
        files.expect_clean_runs()?;
        let (images, limit) = (files.images(), deadline.within(COMING_UP));
        let (img, name) = (&self.shared.qemu_img, self.name());
        let mut overlays = self.overlay_templates.overlays(img, name, &images, first, limit)?;
        overlays.set_keep(files.keep_disk);
        steps.done("overlay");
        let start = Start {
            machine: &files.info.name,
            program: self.shared.program.path(),
            folder: files.folder(),
            version: self.shared.program.version(),
            args: files.start_args.with_overlays(&overlays.paths()),
            overlays,
            socket: &self.socket,
            memory,
            incoming: !matches!(load, Load::Nothing),
        };
        let begun = Run::begin(start, purpose, steps, &self.shared.host, deadline.within(COMING_UP));
        let run = begun.map_err(|error| self.note_other_args(error))?;
        self.note_preparing(&run);
        let loaded = run.load(load, deadline).map_err(|error| self.note_other_args(error));
        loaded.map_err(|error| run.abandon(error, Stage::Load))?;
        steps.done("load");
        Ok(run)
    }

    /// Adds a note to an error if the arguments in the file have changed, because that may have corrected the
    /// error.
    fn note_other_args(&self, error: Error) -> Error {
        if !self.files().has_other_args() {
            return error;
        }
        let file = self.files().machineinfo.display();
        error.advice(format!(
            "{file} has changed since it was read: reload the configuration (cuckoo-machinery reload)"
        ))
    }

    fn steps(&self) -> Steps<'_> {
        Steps::new(&self.shared.host, self.name())
    }

    /// Pulls the plug; of a machine that is off, lets go of what was prepared.
    ///
    /// # Errors
    /// It is off already; the process does not end.
    pub fn stop(&self, deadline: Deadline) -> Result<()> {
        let Some(run) = self.running() else {
            self.discard_standby(deadline)?;
            return Err(off_already());
        };
        run.stop(deadline)?;
        *self.lock() = RunState::Off;
        Ok(())
    }

    /// Expects that nothing of it runs but what stands by, so that the machine can go.
    ///
    /// # Errors
    /// It is on.
    pub fn ensure_off(&self, deadline: Deadline) -> Result<()> {
        self.wait_for_pending_end(deadline);
        let is_on = match &*self.lock() {
            RunState::Starting => true,
            RunState::On(run) => !run.has_ended(),
            RunState::Off | RunState::Preparing { .. } | RunState::Ready(_) => false,
        };
        if !is_on {
            return Ok(());
        }
        let on = Error::unexpected_state("the machine is on, so it cannot be changed or removed");
        Err(on.machine(self.name()).advice("Stop it, and reload again"))
    }

    /// What stands by will have to end: that begins, and is not waited for yet.
    pub fn begin_discard(&self) {
        if let RunState::Ready(standby) = &*self.lock() {
            standby.terminate();
        }
    }

    /// Has a preparation give up, and lets go of what stands by.
    ///
    /// # Errors
    /// The preparation does not give up; the process does not end.
    pub fn discard_standby(&self, deadline: Deadline) -> Result<()> {
        let mut now = self.lock();
        if let RunState::Preparing { run, cancelled } = &mut *now {
            *cancelled = true;
            run.iter().for_each(|run| run.terminate());
        }
        let goes_on = |now: &mut RunState| matches!(now, RunState::Preparing { .. });
        let wait = |now, limit| {
            let waited = self.changed.wait_timeout_while(now, limit, goes_on);
            waited.unwrap_or_else(PoisonError::into_inner)
        };
        let (now, _) = wait(now, deadline.within(GIVING_UP).remaining());
        if let RunState::Preparing { run: Some(run), .. } = &*now {
            run.kill();
        }
        let (mut now, late) = wait(now, deadline.remaining());
        if late.timed_out() {
            return Err(deadline.timeout("the preparation to give up"));
        }
        let RunState::Ready(standby) = &*now else { return Ok(()) };
        // Until its QEMU has ended, nobody else may use its files.
        let discarding = RunState::Preparing { run: Some(standby.run()), cancelled: true };
        let standby = now.become_from_off(discarding);
        drop(now);
        let (next, ended) = match standby.map_or(Ok(()), |standby| standby.end(deadline)) {
            Ok(()) => (RunState::Off, Ok(())),
            Err(StartError { error, still_running, .. }) => {
                (still_running.map_or(RunState::Off, RunState::On), Err(error))
            }
        };
        *self.lock() = next;
        self.changed.notify_all();
        ended?;
        self.report_readiness();
        Ok(())
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// It is off already; the guest does not react.
    pub fn acpi_stop(&self, deadline: Deadline) -> Result<()> {
        let run = self.running().ok_or_else(off_already)?;
        run.power_button(deadline)?;
        *self.lock() = RunState::Off;
        Ok(())
    }

    /// See [`inspection::dump_memory`].
    ///
    /// # Errors
    /// It is off; as there.
    pub fn dump_memory(&self, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        let run = self.running().ok_or_else(off)?;
        inspection::dump_memory(&run, &self.files().info.name, path, format, &self.shared.host, deadline)
    }

    /// See [`inspection::screenshot`].
    ///
    /// # Errors
    /// It is off; as there.
    pub fn screenshot(&self, path: &Path, deadline: Deadline) -> Result<()> {
        let run = self.running().ok_or_else(off)?;
        inspection::screenshot(&run, path, deadline)
    }

    fn running(&self) -> Option<Arc<Run>> {
        match &*self.lock() {
            RunState::On(run) if !run.has_ended() => Some(Arc::clone(run)),
            _ => None,
        }
    }

    /// From now on the machine is being prepared; gives what stands by already.
    ///
    /// # Errors
    /// It is on.
    fn set_preparing(&self, deadline: Deadline) -> Result<Option<Box<Standby>>> {
        self.wait_for_pending_end(deadline);
        let mut now = self.lock();
        match &*now {
            RunState::Off | RunState::Ready(_) => {}
            RunState::On(run) if run.has_ended() => {}
            _ => {
                let on = Error::unexpected_state("the machine is not powered off");
                return Err(on.advice("It is prepared by itself after its next stop"));
            }
        }
        Ok(now.become_from_off(RunState::Preparing { run: None, cancelled: false }))
    }

    /// The host hears of the end of a run a moment before it is over.
    fn wait_for_pending_end(&self, deadline: Deadline) {
        let run = match &*self.lock() {
            RunState::On(run) if run.qmp().is_closed() => Arc::clone(run),
            _ => return,
        };
        run.has_ended_soon(deadline);
    }

    /// The preparation is over; tells whether it was given up.
    fn set_prepared(&self, standby: Option<Box<Standby>>, left: Option<Arc<Run>>) -> bool {
        let next = match (standby, left) {
            (_, Some(left)) => RunState::On(left),
            (Some(standby), None) => RunState::Ready(standby),
            (None, None) => RunState::Off,
        };
        let before = std::mem::replace(&mut *self.lock(), next);
        self.changed.notify_all();
        matches!(before, RunState::Preparing { cancelled: true, .. })
    }

    /// What runs for a preparation can be given up.
    fn note_preparing(&self, new: &Arc<Run>) {
        if let RunState::Preparing { run, cancelled } = &mut *self.lock() {
            *run = Some(Arc::clone(new));
            if *cancelled {
                new.terminate();
            }
        }
    }

    /// Whether a stop has come while the machine is being prepared.
    fn is_cancelled(&self) -> bool {
        matches!(&*self.lock(), RunState::Preparing { cancelled: true, .. })
    }

    /// Each statement that holds the lock leaves it whole, so poison means nothing.
    fn lock(&self) -> MutexGuard<'_, RunState> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets a paused run go on.
fn resume_run(run: Arc<Run>, steps: &mut Steps<'_>, deadline: Deadline) -> Result<Arc<Run>, StartError> {
    run.resume(deadline).map_err(|error| run.abandon(error, Stage::Run))?;
    steps.done("resume");
    Ok(run)
}

fn off_already() -> Error {
    Error::state_reached("the machine is powered off already")
}

fn off() -> Error {
    Error::unexpected_state("the machine is powered off").advice("Start it first")
}
