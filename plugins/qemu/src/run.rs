//! One run of a machine: from the QEMU process to its end.
//!
//! ```text
//!  begin ─▶ process up, monitor connected ─▶ (load) ─▶ paused ─▶ cont ─▶ running
//!                                                        │               │ stop, power button,
//!                                        stands by until ▼               ▼ guest, accident
//!  gone  ◀─ reported, then told to all who wait ◀─ overlays, socket removed ◀─ process ended
//! ```
//!
//! A run that only stands by is nobody's news: to the outside the machine is off. That it has ended by
//! itself is told to the host as a preparation that is gone.
//!
//! One thread, the watcher, reads the monitor and sees the end of the run, whoever caused it; all
//! cleaning up happens there, in one place, and before anyone hears of the end.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use machinery::{Deadline, Error, ErrorKind, Host, RestoreReadiness, Result, State};
use qapi::qmp::{self, MigrationCapability};
use serde_json::Value;

use crate::disk::{self, Overlays};
use crate::launch::{Start, connect, with_words};
use crate::process::{End, Handle, Process};
use crate::progress;
use crate::qmp::{Event, Qmp, wait, wait_with_progress};
use crate::refusal::{self, Refusal};
use crate::snapshot::{self, Feeder, Format, Snapshot};
use crate::states::{reason_of_shutdown, state_of_event};
use crate::steps::Steps;
use crate::template::Devices;
use crate::version::Version;

/// How long QEMU may take to end after its monitor has closed, before it is ended.
const AFTER_MONITOR: Duration = Duration::from_secs(2);
/// How long QEMU may take to end after `quit`, before it is ended.
const AFTER_QUIT: Duration = Duration::from_secs(3);
/// The time that a failing QEMU has to end by itself, and then again after a request to end.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How long what QEMU has said of the guest is as good as an answer to a question. The guest's first
/// moments keep QEMU from answering one for milliseconds.
const FRESH: Duration = Duration::from_millis(100);
/// How long a process may take to end after SIGKILL, before that is an error.
const AFTER_KILL: Duration = Duration::from_secs(10);

/// A run. It exists from the moment its monitor answers.
pub struct Run {
    machine: String,
    host: Host,
    qmp: Qmp,
    process: Arc<Handle>,
    version: Version,
    /// How it ended, once it has.
    end: Mutex<Option<End>>,
    ended: Condvar,
    /// Whether the end was asked for.
    stopping: AtomicBool,
    /// Why QEMU says that the machine shuts down.
    shutdown: Mutex<Option<String>>,
    /// Whether the guest has ever run.
    has_run: AtomicBool,
    /// Whether the guest runs by our will; before that its states are steps of the start.
    started: AtomicBool,
    purpose: Mutex<Purpose>,
    /// When QEMU has said that the guest runs, as long as it has said nothing else since.
    resumed: Mutex<Option<Instant>>,
}

/// What a run is for.
pub enum Purpose {
    /// To be let go at once.
    Run,
    /// To prepare a later one.
    Preparation,
    /// To be let go some time; how ready the machine is without it.
    Standby(RestoreReadiness),
}

/// What is loaded before the guest runs.
pub enum Load {
    /// Nothing: a cold boot.
    Nothing,
    Snapshot(Snapshot),
    /// The state of the devices; the RAM is there already.
    Devices(Devices),
}

/// A start that failed.
pub struct StartError {
    pub error: Error,
    /// The stage that failed.
    pub at: Stage,
    /// The run, in the rare case that its QEMU does not end.
    pub still_running: Option<Arc<Run>>,
}

/// The stages of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The disk, the process and its monitor: independent of what is loaded.
    Process,
    /// Loading the memory that the guest continues from.
    Load,
    /// Resuming the guest, or ending it.
    Run,
}

impl From<Error> for StartError {
    fn from(error: Error) -> Self {
        StartError { error, at: Stage::Process, still_running: None }
    }
}

impl Run {
    /// Starts QEMU; the guest is paused.
    ///
    /// # Errors
    /// It does not come up. Nothing of the run is left then.
    pub fn begin(
        start: Start<'_>,
        purpose: Purpose,
        steps: &mut Steps<'_>,
        host: &Host,
        deadline: Deadline,
    ) -> Result<Arc<Run>> {
        let (process, stream) = connect(&start, steps, deadline)?;
        let run = Arc::new(Run {
            machine: start.machine.to_owned(),
            host: host.clone(),
            qmp: Qmp::new(stream),
            process: Arc::clone(process.handle()),
            version: start.version,
            end: Mutex::new(None),
            ended: Condvar::new(),
            stopping: AtomicBool::new(false),
            shutdown: Mutex::new(None),
            has_run: AtomicBool::new(false),
            started: AtomicBool::new(false),
            purpose: Mutex::new(purpose),
            resumed: Mutex::new(None),
        });
        let (watched, socket) = (Arc::clone(&run), start.socket.to_owned());
        let handle = Arc::clone(&run.process);
        std::thread::Builder::new()
            .name("qemu-watcher".to_owned())
            .spawn(move || watched.until_the_end(process, start.overlays, &socket))
            .map_err(|error| {
                handle.kill();
                Error::environment(format!("cannot start a thread to watch QEMU: {error}"))
            })?;
        Ok(run)
    }

    /// The watcher's work.
    fn until_the_end(&self, process: Process, mut overlays: Overlays, socket: &Path) {
        self.qmp.read(|event| self.report(event));
        let end = process.end(AFTER_MONITOR);
        if !matches!(*self.purpose(), Purpose::Run) {
            overlays.set_keep(false);
        }
        drop(overlays);
        if let Err(error) = disk::remove(socket) {
            tracing::warn!(machine = self.machine, %error, "the monitor's socket stays behind");
        }
        let told = self.shutdown.lock().unwrap_or_else(PoisonError::into_inner).take();
        let reason = match (self.stopping.load(Ordering::SeqCst), told) {
            (true, _) => String::new(),
            (false, Some(told)) if end.was_clean() => told,
            (false, _) => end.describe(),
        };
        tracing::debug!(machine = self.machine, reason, how = end.describe(), "the run has ended");
        match &*self.purpose() {
            // A start that has failed is told by its own error, and another one may follow at once.
            Purpose::Run if self.has_run.load(Ordering::SeqCst) => {
                self.host.state_changed(&self.machine, State::Poweroff, &reason);
            }
            Purpose::Run | Purpose::Preparation | Purpose::Standby(_) => {}
        }
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
        self.ended.notify_all();
        // The host may prepare the machine at once, so it has to be seen to have ended by then.
        if let Purpose::Standby(without) = &*self.purpose()
            && !self.stopping.load(Ordering::SeqCst)
        {
            self.host.ready(&self.machine, without);
            self.host.preparation_invalidated(&self.machine, &reason);
        }
    }

    fn purpose(&self) -> MutexGuard<'_, Purpose> {
        self.purpose.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is loaded, and waits to be let go.
    pub fn stand_by(&self, without: RestoreReadiness) {
        *self.purpose() = Purpose::Standby(without);
    }

    /// What happens by itself while the guest runs.
    fn report(&self, event: &Event) {
        tracing::trace!(machine = self.machine, event = event.name, data = %event.data, "QEMU reports");
        if let Some(why) = reason_of_shutdown(event) {
            *self.shutdown.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        }
        let resumes = event.name == "RESUME";
        self.has_run.fetch_or(resumes, Ordering::SeqCst);
        *self.resumed() = resumes.then(Instant::now);
        let Some((state, reason)) = state_of_event(event) else { return };
        if self.started.load(Ordering::SeqCst) && !self.stopping.load(Ordering::SeqCst) {
            self.host.state_changed(&self.machine, state, &reason);
        }
    }

    /// Loads what the guest goes on from; it is paused afterwards. The first thing to do with a run.
    ///
    /// # Errors
    /// QEMU does not like it, or takes too long. The run is still there then.
    pub fn load(&self, load: Load, deadline: Deadline) -> Result<()> {
        self.qmp.batch().negotiating()?.run(None, deadline)?;
        // A QEMU that answers has already reported all problems of its devices.
        self.process.begin_step();
        match load {
            Load::Nothing => Ok(()),
            Load::Snapshot(snapshot) => self.load_snapshot(snapshot, deadline),
            Load::Devices(devices) => self.load_devices(devices, deadline),
        }
    }

    /// Lets the guest go on, and returns when it does.
    ///
    /// # Errors
    /// QEMU does not let it.
    pub fn resume(&self, deadline: Deadline) -> Result<()> {
        *self.purpose() = Purpose::Run;
        self.process.begin_step();
        let events = self.qmp.listen();
        self.qmp.execute(&qmp::cont {}, deadline)?;
        wait(&events, deadline, "the guest to run", |event| (event.name == "RESUME").then_some(()))?;
        self.started.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Whether QEMU has just said that the guest runs, and nothing else since. True for one question only.
    pub fn has_just_resumed(&self) -> bool {
        let resumed = self.resumed().take();
        resumed.is_some_and(|resumed| resumed.elapsed() < FRESH) && !self.qmp.is_closed()
    }

    fn resumed(&self) -> MutexGuard<'_, Option<Instant>> {
        self.resumed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The RAM is there already. Nothing is waited for but the end.
    fn load_devices(&self, devices: Devices, deadline: Deadline) -> Result<()> {
        let events = self.qmp.listen();
        let capabilities = capabilities(&[MigrationCapability::events, MigrationCapability::x_ignore_shared]);
        let batch = self.qmp.batch().with(&capabilities)?;
        match self.file_uri(&devices.path) {
            Some(uri) => batch.with(&incoming(uri))?.run(None, deadline)?,
            None => {
                let name = qmp::getfd { fdname: "devices".to_owned() };
                let batch = batch.with(&name)?.with(&incoming("fd:devices".to_owned()))?;
                batch.run(Some(devices.file.as_fd()), deadline)?
            }
        };
        wait(&events, deadline, "the template to be loaded", migration_end)?.map_err(|why| {
            Error::failed(format!("the template's {} cannot be loaded: {why}", devices.path.display()))
        })
    }

    /// Writes the paused guest's state without its RAM to the new file `path`.
    ///
    /// # Errors
    /// QEMU cannot, or takes too long.
    pub fn save_devices(&self, path: &Path, deadline: Deadline) -> Result<()> {
        let file = File::create_new(path).map_err(|error| Error::io("make", path, &error))?;
        self.process.begin_step();
        self.qmp.execute(&capabilities(&[MigrationCapability::x_ignore_shared]), deadline)?;
        let events = self.qmp.listen();
        let uri = match self.file_uri(path) {
            Some(uri) => uri,
            None => self.pass(file.into(), deadline)?,
        };
        self.qmp.execute(
            &qmp::migrate { uri: Some(uri), channels: None, detach: None, resume: None },
            deadline,
        )?;
        wait(&events, deadline, "the devices to be saved", migration_end)?
            .map_err(|why| Error::failed(format!("the devices cannot be saved to {}: {why}", path.display())))
    }

    /// How QEMU is told of that file by name, if this one can be.
    fn file_uri(&self, path: &Path) -> Option<String> {
        // In the name QEMU takes this for an option of its own; such a file goes as a descriptor.
        let nameable = !path.to_string_lossy().contains(",offset=");
        (nameable && self.version.reads_snapshot_files()).then(|| format!("file:{}", path.display()))
    }

    fn load_snapshot(&self, snapshot: Snapshot, deadline: Deadline) -> Result<()> {
        self.qmp.execute(&capabilities(&[MigrationCapability::events]), deadline)?;
        let events = self.qmp.listen();
        let (path, format) = (snapshot.path().to_owned(), snapshot.format());
        let plain = format == Format::Plain;
        let (uri, feeder) = if !plain {
            let (pipe, feeder) = snapshot.decompress()?;
            (self.pass(pipe.into(), deadline)?, Some(feeder))
        } else if let Some(uri) = self.file_uri(&path) {
            (uri, None)
        } else {
            (self.pass(snapshot.into_file(), deadline)?, None)
        };
        self.qmp.execute(&incoming(uri), deadline)?;
        let reader = if plain { self.process.pid() } else { std::process::id() };
        let tell = || self.host.progress(&self.machine, progress::of(reader, &path));
        let loaded = wait_with_progress(&events, deadline, "the snapshot to be loaded", tell, migration_end)
            .and_then(|outcome| outcome.map_err(Error::failed));
        match loaded {
            Ok(()) => feeder.map_or(Ok(()), |feeder| feeder.finish(true)),
            Err(error) => Err(self.why_not_loaded(error, feeder, &path, format)),
        }
    }

    /// Distinguishes the causes of a failed load: a file that cannot be read to its end, a QEMU that is too
    /// slow or was killed, and a QEMU that refuses the content.
    fn why_not_loaded(&self, error: Error, feeder: Option<Feeder>, path: &Path, format: Format) -> Error {
        let too_slow = error.kind() == ErrorKind::Timeout;
        let end = if too_slow { None } else { self.wait_end(LAST_WORDS) };
        if end.is_none() {
            self.end_soon();
        }
        let read = feeder.map_or_else(|| snapshot::is_whole(path), |feeder| feeder.finish(false));
        if too_slow || end.as_ref().is_some_and(End::by_signal) {
            return error;
        }
        match (read, refusal::refused(path, format, end.as_ref().map_or("", End::words))) {
            (_, Refusal::Known(refused)) => refused,
            (Err(unreadable), _) => unreadable,
            (Ok(()), Refusal::EndsEarly) => snapshot::broken(path, format, "it ends early"),
            (Ok(()), Refusal::Unknown(refused)) => refused,
        }
    }

    fn pass(&self, file: OwnedFd, deadline: Deadline) -> Result<String> {
        let name = self.qmp.pass(file.as_fd(), self.version.incoming_by_name(), deadline)?;
        Ok(format!("fd:{name}"))
    }

    /// Ends a run whose start failed at that stage, and adds QEMU's own message to the error.
    pub fn abandon(self: &Arc<Self>, error: Error, at: Stage) -> StartError {
        let error = self.end_with_words(error);
        StartError { error, at, still_running: (!self.has_ended()).then(|| Arc::clone(self)) }
    }

    fn end_with_words(&self, error: Error) -> Error {
        self.stopping.store(true, Ordering::SeqCst);
        // A QEMU that is just ending by itself gets the time to say why.
        if self.wait_end(LAST_WORDS).is_none() {
            self.end_soon();
        }
        match self.wait_end(AFTER_KILL) {
            Some(end) => with_words(error, &end),
            None => error.detail(&format!("and QEMU (pid {}) does not end", self.process.pid())),
        }
    }

    /// Asks QEMU to end, so that its helpers end too, and kills it if it does not end soon.
    fn end_soon(&self) {
        self.process.terminate();
        if self.wait_end(LAST_WORDS).is_none() {
            self.process.kill();
        }
    }

    /// Ends a run that was only for preparation.
    ///
    /// # Errors
    /// The process does not end.
    pub fn end(self: &Arc<Self>, deadline: Deadline) -> Result<(), StartError> {
        let left = |error| StartError { error, at: Stage::Run, still_running: Some(Arc::clone(self)) };
        self.stop(deadline).map_err(left)
    }

    /// Asks the QEMU of a cancelled run to end.
    pub fn terminate(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.process.terminate();
    }

    /// Kills the QEMU of a cancelled run that does not end.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Ends the run without waiting for its end.
    pub fn discard(self: &Arc<Self>) {
        let run = Arc::clone(self);
        let end = move || run.stop(Deadline::after(AFTER_QUIT));
        if std::thread::Builder::new().name("qemu-discard".to_owned()).spawn(end).is_err() {
            self.terminate();
            self.kill();
        }
    }

    /// Pulls the plug.
    ///
    /// # Errors
    /// The process does not end.
    pub fn stop(&self, deadline: Deadline) -> Result<()> {
        self.stopping.store(true, Ordering::SeqCst);
        let grace = deadline.within(AFTER_QUIT);
        let quit = self.qmp.execute(&qmp::quit {}, grace);
        if let Err(error) = &quit {
            tracing::debug!(machine = self.machine, %error, "quit was not answered");
        }
        if self.wait_end(grace.remaining()).is_some() {
            return Ok(());
        }
        tracing::warn!(machine = self.machine, pid = self.process.pid(), "QEMU does not quit: it is killed");
        self.process.kill();
        match self.wait_end(AFTER_KILL) {
            Some(_) => Ok(()),
            None => Err(Error::timeout(format!(
                "QEMU (pid {}) does not end, not even by SIGKILL",
                self.process.pid()
            ))
            .advice("It hangs in the kernel: look at its disk and at dmesg")),
        }
    }

    /// Presses the power button, and waits for the guest to power off.
    ///
    /// # Errors
    /// It does not in time.
    pub fn power_button(&self, deadline: Deadline) -> Result<()> {
        self.qmp.execute(&qmp::system_powerdown {}, deadline)?;
        match self.wait_end(deadline.remaining()) {
            Some(_) => Ok(()),
            None => Err(deadline.timeout("the guest to react to its power button")),
        }
    }

    /// Runs a command of the monitor.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn execute<C: qapi::Command>(&self, command: &C, deadline: Deadline) -> Result<Value> {
        self.qmp.execute(command, deadline)
    }

    /// What it holds of this computer's memory, in bytes, with its share of what it has in common with
    /// others.
    pub fn memory(&self) -> Option<u64> {
        self.process.memory()
    }

    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    pub fn version(&self) -> Version {
        self.version
    }

    /// Whether it has ended, or does so now that its monitor fails.
    pub fn has_ended_soon(&self, deadline: Deadline) -> bool {
        let patience = if self.qmp.is_closed() { AFTER_KILL } else { LAST_WORDS };
        self.wait_end(deadline.within(patience).remaining()).is_some()
    }

    pub fn has_ended(&self) -> bool {
        self.wait_end(Duration::ZERO).is_some()
    }

    fn wait_end(&self, timeout: Duration) -> Option<End> {
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.ended.wait_timeout_while(end, timeout, |end| end.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}

fn capabilities(on: &[MigrationCapability]) -> qmp::migrate_set_capabilities {
    let status = |capability: &MigrationCapability| qmp::MigrationCapabilityStatus {
        capability: *capability,
        state: true,
    };
    qmp::migrate_set_capabilities { capabilities: on.iter().map(status).collect() }
}

fn incoming(uri: String) -> qmp::migrate_incoming {
    qmp::migrate_incoming { uri: Some(uri), channels: None, exit_on_error: None }
}

/// A migration that has come to its end: well, or with the reason why not.
fn migration_end(event: &Event) -> Option<Result<(), String>> {
    if event.name != "MIGRATION" {
        return None;
    }
    match event.data["status"].as_str()? {
        "completed" => Some(Ok(())),
        status @ ("failed" | "cancelled") => Some(Err(format!("QEMU says the migration has {status}"))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_migration_ends_in_either_way() {
        let end = |status: &str| {
            migration_end(&Event { name: "MIGRATION".into(), data: json!({"status": status}) })
        };
        assert_eq!(end("completed"), Some(Ok(())));
        assert!(end("failed").unwrap().is_err());
        assert_eq!(end("active"), None);
        assert_eq!(end("from-the-future"), None);
    }
}
