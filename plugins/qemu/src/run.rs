//! One run of a machine: from the QEMU process to its end.
//!
//! ```text
//!  start ─▶ process up, monitor connected ─▶ (load the snapshot) ─▶ cont ─▶ running
//!                                                                     │ stop, power button,
//!                                                                     ▼ guest, accident
//!  gone  ◀─ reported, then told to all who wait ◀─ disk and socket removed ◀─ process ended
//! ```
//!
//! One thread, the watcher, reads the monitor and sees the end of the run, whoever caused it; all
//! cleaning up happens there, in one place, and before anyone hears of the end.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use machinery::{Deadline, Error, ErrorKind, Host, Result, State};
use qapi::qmp;
use serde_json::Value;

use crate::disk::{self, DisposableDisk};
use crate::launch::{Start, connect, with_words};
use crate::process::{End, Handle, Process};
use crate::qmp::{Event, Qmp, wait};
use crate::snapshot::{self, Feeder, Format, Snapshot};
use crate::states::{reason_of_shutdown, state_of_event};
use crate::version::Version;

/// How long QEMU may take to end after its monitor has closed, before it is ended.
const AFTER_MONITOR: Duration = Duration::from_secs(2);
/// How long QEMU may take to end after `quit`, before it is ended.
const AFTER_QUIT: Duration = Duration::from_secs(3);
/// How long a QEMU that fails may take to end by itself.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How long a process may take to end after SIGKILL, before that is an error.
const AFTER_KILL: Duration = Duration::from_secs(10);

/// A run. It exists from the moment its monitor answers.
pub struct Run {
    machine: String,
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
    /// Whether the guest runs by our will; before that its states are steps of the start.
    started: AtomicBool,
}

/// A start that failed.
pub struct NotStarted {
    pub error: Error,
    /// The run, in the rare case that its QEMU does not end.
    pub left: Option<Arc<Run>>,
}

impl From<Error> for NotStarted {
    fn from(error: Error) -> Self {
        NotStarted { error, left: None }
    }
}

impl Run {
    /// Starts QEMU and brings the guest to running.
    ///
    /// # Errors
    /// Whatever kept it from running. Nothing of the run is left then.
    pub fn start(start: Start<'_>, host: &Host, deadline: Deadline) -> Result<Arc<Run>, NotStarted> {
        let (process, stream) = connect(&start, deadline)?;
        let Start { machine, version, disk, socket, snapshot, .. } = start;
        let run = Run::watch(machine, version, process, stream, disk, socket, host)?;
        match run.bring_up(snapshot, deadline) {
            Ok(()) => Ok(run),
            Err(error) => {
                let error = run.abandon(error);
                Err(NotStarted { error, left: (!run.has_ended()).then_some(run) })
            }
        }
    }

    fn watch(
        machine: &str,
        version: Version,
        process: Process,
        stream: UnixStream,
        disk: DisposableDisk,
        socket: &Path,
        host: &Host,
    ) -> Result<Arc<Run>> {
        let run = Arc::new(Run {
            machine: machine.to_owned(),
            qmp: Qmp::new(stream),
            process: Arc::clone(process.handle()),
            version,
            end: Mutex::new(None),
            ended: Condvar::new(),
            stopping: AtomicBool::new(false),
            shutdown: Mutex::new(None),
            started: AtomicBool::new(false),
        });
        let (watched, host, socket) = (Arc::clone(&run), host.clone(), socket.to_owned());
        let handle = Arc::clone(&run.process);
        std::thread::Builder::new()
            .name("qemu-watcher".to_owned())
            .spawn(move || watched.until_the_end(process, disk, &socket, &host))
            .map_err(|error| {
                handle.kill();
                Error::environment(format!("cannot start a thread to watch QEMU: {error}"))
            })?;
        Ok(run)
    }

    /// The watcher's work.
    fn until_the_end(&self, process: Process, disk: DisposableDisk, socket: &Path, host: &Host) {
        self.qmp.read(|event| self.report(event, host));
        let end = process.end(AFTER_MONITOR);
        drop(disk);
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
        host.state_changed(&self.machine, State::Poweroff, &reason);
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
        self.ended.notify_all();
    }

    /// What happens by itself while the guest runs.
    fn report(&self, event: &Event, host: &Host) {
        tracing::trace!(machine = self.machine, event = event.name, data = %event.data, "QEMU reports");
        if let Some(why) = reason_of_shutdown(event) {
            *self.shutdown.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        }
        let Some((state, reason)) = state_of_event(event) else { return };
        if self.started.load(Ordering::SeqCst) && !self.stopping.load(Ordering::SeqCst) {
            host.state_changed(&self.machine, state, &reason);
        }
    }

    fn bring_up(&self, snapshot: Option<Snapshot>, deadline: Deadline) -> Result<()> {
        self.qmp.negotiate(deadline)?;
        if let Some(snapshot) = snapshot {
            self.load(snapshot, deadline)?;
        }
        let events = self.qmp.listen();
        self.qmp.execute(&qmp::cont {}, deadline)?;
        wait(&events, deadline, "the guest to run", |event| (event.name == "RESUME").then_some(()))?;
        self.started.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Has QEMU load the snapshot; it is paused afterwards.
    fn load(&self, snapshot: Snapshot, deadline: Deadline) -> Result<()> {
        let events_on =
            qmp::MigrationCapabilityStatus { capability: qmp::MigrationCapability::events, state: true };
        self.qmp.execute(&qmp::migrate_set_capabilities { capabilities: vec![events_on] }, deadline)?;
        let events = self.qmp.listen();
        let (path, format) = (snapshot.path().to_owned(), snapshot.format());
        let plain = format == Format::Plain;
        // In the name QEMU takes this for an option of its own; such a file goes as a descriptor.
        let nameable = !path.to_string_lossy().contains(",offset=");
        let feeder = if plain && nameable && self.version.reads_snapshot_files() {
            self.load_from(format!("file:{}", path.display()), deadline)?;
            None
        } else if plain {
            self.load_from(self.pass(snapshot.into_file(), deadline)?, deadline)?;
            None
        } else {
            let (pipe, feeder) = snapshot.decompress()?;
            self.load_from(self.pass(pipe.into(), deadline)?, deadline)?;
            Some(feeder)
        };
        let loaded = wait(&events, deadline, "the snapshot to be loaded", migration_end)
            .and_then(|outcome| outcome.map_err(Error::failed));
        match loaded {
            Ok(()) => feeder.map_or(Ok(()), Feeder::finish),
            Err(error) => Err(self.why_not_loaded(error, feeder, &path, format)),
        }
    }

    /// Tells apart a file that cannot be unpacked, a QEMU that is too slow or was killed, and one
    /// that does not like what it reads.
    fn why_not_loaded(&self, error: Error, feeder: Option<Feeder>, path: &Path, format: Format) -> Error {
        let too_slow = error.kind() == ErrorKind::Timeout;
        // One that ends by itself gets the time to: how it ended is worth telling.
        let end = if too_slow { None } else { self.wait_end(LAST_WORDS) };
        if end.is_none() {
            self.process.kill();
        }
        if let Some(Err(unreadable)) = feeder.map(Feeder::finish) {
            return unreadable;
        }
        if too_slow || end.is_some_and(|end| end.by_signal()) {
            return error;
        }
        snapshot::broken(path, format, error.reason())
            .advice("If the file is whole, it was taken with other arguments or a newer QEMU")
    }

    fn pass(&self, file: OwnedFd, deadline: Deadline) -> Result<String> {
        let name = self.qmp.pass(file.as_fd(), self.version.incoming_by_name(), deadline)?;
        Ok(format!("fd:{name}"))
    }

    fn load_from(&self, uri: String, deadline: Deadline) -> Result<()> {
        let incoming = qmp::migrate_incoming { uri: Some(uri), channels: None, exit_on_error: None };
        self.qmp.execute(&incoming, deadline).map(|_| ())
    }

    /// Ends a run whose start failed, and puts QEMU's own words into the error.
    fn abandon(&self, error: Error) -> Error {
        self.stopping.store(true, Ordering::SeqCst);
        // A QEMU that is just ending by itself gets the time to say why.
        if self.wait_end(LAST_WORDS).is_none() {
            self.process.kill();
        }
        match self.wait_end(AFTER_KILL) {
            Some(end) => with_words(error, &end),
            None => error.detail(&format!("and QEMU (pid {}) does not end", self.process.pid())),
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
