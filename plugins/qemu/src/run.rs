//! One run of a machine: from its QEMU process to the end of that process.
//!
//! ```text
//!  begin ─▶ process up, monitor connected ─▶ load ─▶ paused ─▶ resume ─▶ running
//!                                                      │                  │ stop, power button,
//!                                      standby until a ▼ restore          ▼ guest, accident
//!  ended ◀─ end reported, waiters woken ◀─ overlays and socket removed ◀─ process ended
//! ```
//!
//! A standby is powered off for everybody but this plugin, so its states are not reported. When a standby
//! ends by itself, the host gets the event that a preparation is lost, and its memory is free for other standbys.
//!
//! One thread per run, the watcher, reads the monitor and waits for the process. It does all of the cleanup,
//! whoever ended the run, and before anybody learns of the end.
//!
//! | module | content |
//! | --- | --- |
//! | `cell` | the network of an isolated machine |
//! | `end` | the ways to end a run |
//! | `parts` | the parts and the purpose of a run |
//! | `record` | what the next host has to know, to adopt the run |
//! | `resume` | the guest begins to run |
//! | `start_error` | a start that failed, and at which stage |

mod cell;
pub mod end;
#[cfg(test)]
pub mod fake_qemu;
mod parts;
pub mod record;
mod resume;
pub mod start_error;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use machinery::{Deadline, Error, Host, RestoreReadiness, Result, State};
use machinery_backend::jail::Cgroup;
use machinery_backend::process::{End, Handle, Process};
use machinery_backend::sync::{lock, wait_while};
use machinery_backend::{DiskWriter, Overlays, Share, Steps, files};
use serde_json::Value;

use record::{Record, RecordFile};

pub use cell::MachineCell;
pub use parts::{Parts, Purpose};

use crate::launch::{QEMU, Start, connect};
use crate::qmp::{Event, Qmp};
use crate::states::{ReportLimit, reason_of_shutdown, state_of_event};
use crate::version::Version;

/// The grace of a QEMU whose monitor has closed, before it is killed.
const MONITOR_CLOSED_GRACE: Duration = Duration::from_secs(2);
/// The grace of a QEMU that ends by itself, and again of one that was asked to end.
pub const EXIT_GRACE: Duration = Duration::from_millis(200);
/// The maximum time between SIGKILL and the end of the process.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// The time for which QEMU's event that the guest runs replaces a query. In the guest's first moments QEMU
/// takes milliseconds to answer one.
const RESUME_EVENT_VALIDITY: Duration = Duration::from_millis(100);

/// A run whose monitor has answered.
pub struct Run {
    machine: String,
    host: Host,
    qmp: Qmp,
    process: Arc<Handle>,
    version: Version,
    /// The end of the process, once it has ended.
    end: Mutex<Option<End>>,
    ended: Condvar,
    /// True if this plugin ends the run.
    stopping: AtomicBool,
    /// QEMU's reason for a shutdown of the machine.
    shutdown: Mutex<Option<String>>,
    /// The limit that the run has exceeded, for which this plugin has killed it.
    condemned: Mutex<Option<String>>,
    /// The files that QEMU writes: overlays, and logs that the arguments name.
    writes: Vec<PathBuf>,
    /// The state of the run's own TPM.
    pub tpm: Option<std::fs::File>,
    record: RecordFile,
    /// The states that QEMU may report.
    reports: Mutex<ReportLimit>,
    /// True if the guest has ever run.
    has_run: AtomicBool,
    /// True if the guest was resumed. Earlier states are steps of the start and not reported.
    started: AtomicBool,
    purpose: Mutex<Purpose>,
    /// The time of QEMU's last event, if that event was that the guest runs.
    resumed: Mutex<Option<Instant>>,
}

impl Run {
    /// Starts QEMU with a paused guest.
    ///
    /// # Errors
    /// QEMU does not start. Nothing of the run remains then.
    pub fn begin(
        mut start: Start<'_>,
        record: RecordFile,
        cell: MachineCell,
        purpose: Purpose,
        steps: &mut Steps,
        host: &Host,
        deadline: Deadline,
    ) -> Result<Arc<Run>> {
        let (process, stream) = connect(&mut start, steps, deadline)?;
        let parts = Parts {
            machine: start.machine.to_owned(),
            version: start.version,
            overlays: start.overlays,
            writes: start.writes,
            sockets: start.sockets.into_iter().chain([start.socket.to_owned()]).collect(),
            cgroup: start.confinement.cgroup().cloned(),
            tpm: start.tpm.and_then(|tpm| tpm.memory),
            cell,
            record,
        };
        if let Some(process) = process.identity() {
            let overlays = parts.overlays.paths().into_iter().map(PathBuf::from).collect();
            let (writes, sockets) = (parts.writes.clone(), parts.sockets.clone());
            let record = Record::new(process, parts.version, overlays, writes, sockets);
            parts.record.begin(&record.with_interface(start.interface));
        }
        Run::watched(process, stream, parts, purpose, host)
    }

    /// Continues a run whose guest an earlier host has resumed, or that an earlier host has loaded as a standby. Its
    /// monitor is not negotiated yet.
    ///
    /// # Errors
    /// The thread cannot be started. The run is ended then.
    pub fn adopt(process: Process, stream: UnixStream, parts: Parts, host: &Host) -> Result<Arc<Run>> {
        Run::watched(process, stream, parts, Purpose::Preparation, host)
    }

    /// Negotiates the monitor, which is the first step of each connection.
    ///
    /// # Errors
    /// QEMU does not answer.
    pub fn negotiate(&self, deadline: Deadline) -> Result<()> {
        self.qmp.batch().negotiating()?.run(None, deadline).map(drop)
    }

    /// Watches the process in a thread of its own.
    fn watched(
        process: Process,
        stream: UnixStream,
        parts: Parts,
        purpose: Purpose,
        host: &Host,
    ) -> Result<Arc<Run>> {
        let Parts { machine, version, overlays, writes, sockets, cgroup, tpm, cell, record } = parts;
        let run = Arc::new(Run {
            machine,
            host: host.clone(),
            qmp: Qmp::new(stream),
            process: Arc::clone(process.handle()),
            version,
            end: Mutex::new(None),
            ended: Condvar::new(),
            stopping: AtomicBool::new(false),
            shutdown: Mutex::new(None),
            condemned: Mutex::new(None),
            writes,
            tpm,
            record,
            reports: Mutex::default(),
            has_run: AtomicBool::new(false),
            started: AtomicBool::new(false),
            purpose: Mutex::new(purpose),
            resumed: Mutex::new(None),
        });
        let watched = Arc::clone(&run);
        let handle = Arc::clone(&run.process);
        std::thread::Builder::new()
            .name("qemu-watcher".to_owned())
            .spawn(move || {
                let end = watched.watch(process);
                cgroup.iter().for_each(Cgroup::end);
                watched.clean_up(end, overlays, &sockets);
                // QEMU's network is not closed before its end, whoever drops the machine.
                drop(cell);
            })
            .map_err(|error| {
                handle.kill();
                Error::environment(format!("cannot start a thread to watch QEMU: {error}"))
            })?;
        Ok(run)
    }

    /// Reads the monitor to its end, and returns the end of the process. Runs in the watcher thread.
    fn watch(&self, process: Process) -> End {
        if let Err(why) = self.qmp.read(|event| self.on_event(event)) {
            self.condemn(why);
        }
        process.end(MONITOR_CLOSED_GRACE).named(QEMU)
    }

    /// Cleans up after the end of the process, and reports the end. Runs in the watcher thread.
    fn clean_up(&self, end: End, mut overlays: Overlays, sockets: &[PathBuf]) {
        if !matches!(*self.purpose(), Purpose::Run) {
            overlays.set_keep(false);
        }
        drop(overlays);
        for error in sockets.iter().filter_map(|socket| files::remove_socket(socket).err()) {
            tracing::warn!(machine = self.machine, %error, "cannot remove a socket");
        }
        self.record.remove();
        self.report_end(end);
    }

    fn report_end(&self, end: End) {
        let (shutdown, condemned) = (lock(&self.shutdown).take(), lock(&self.condemned).take());
        let reason = match (self.stopping.load(Ordering::SeqCst), condemned, shutdown) {
            (true, ..) => String::new(),
            (false, Some(why), _) => format!("{QEMU} was killed: {why}"),
            (false, None, Some(shutdown)) if end.was_clean() => shutdown,
            (false, ..) => end.describe(),
        };
        tracing::debug!(machine = self.machine, reason, end = end.describe(), "the run has ended");
        match &*self.purpose() {
            // A failed start is reported by its error, and another start may follow at once.
            Purpose::Run if self.has_run.load(Ordering::SeqCst) => {
                self.host.state_changed(&self.machine, State::Poweroff, &reason);
            }
            Purpose::Run | Purpose::Preparation | Purpose::Standby { .. } => {}
        }
        // An action that waits for the end may need the memory for another standby.
        if let Purpose::Standby { share, .. } = &mut *self.purpose() {
            share.take();
        }
        *lock(&self.end) = Some(end);
        self.ended.notify_all();
        // The host may prepare the machine at once, so `end` has to be set by now.
        let purpose = std::mem::replace(&mut *self.purpose(), Purpose::Preparation);
        if let Purpose::Standby { without, .. } = purpose
            && !self.stopping.load(Ordering::SeqCst)
        {
            self.host.ready(&self.machine, &without);
            self.host.preparation_invalidated(&self.machine, &reason);
        }
    }

    fn purpose(&self) -> MutexGuard<'_, Purpose> {
        lock(&self.purpose)
    }

    /// Makes the loaded run a standby with that share of the memory budget, which it holds until the guest is resumed
    /// or the run ends. `without` is the machine's readiness without it.
    pub fn set_standby(&self, without: RestoreReadiness, share: Share, record: Value) {
        self.record.set_standby(record);
        *self.purpose() = Purpose::Standby { without, share: Some(share) };
    }

    /// Kills a QEMU that has exceeded a limit. The end of the run is reported with that reason.
    pub fn condemn(&self, why: String) {
        lock(&self.condemned).get_or_insert(why);
        self.process.kill();
    }

    /// Returns the run for the watch of the free space.
    pub fn as_disk_writer(self: &Arc<Self>) -> Weak<dyn DiskWriter> {
        let run: Arc<dyn DiskWriter> = Arc::clone(self) as Arc<dyn DiskWriter>;
        Arc::downgrade(&run)
    }

    /// Reports a change of state that nobody requested.
    ///
    /// # Errors
    /// QEMU reports its state too often. The text has the reason.
    fn on_event(&self, event: &Event) -> Result<(), String> {
        tracing::trace!(machine = self.machine, event = event.name, data = %event.data, "QEMU event");
        if let Some(why) = reason_of_shutdown(event) {
            *lock(&self.shutdown) = Some(why);
        }
        let resumes = event.name == "RESUME";
        self.has_run.fetch_or(resumes, Ordering::SeqCst);
        *self.resumed() = resumes.then(Instant::now);
        let Some((state, reason)) = state_of_event(event) else { return Ok(()) };
        lock(&self.reports).admit(state)?;
        if self.started.load(Ordering::SeqCst) && !self.stopping.load(Ordering::SeqCst) {
            self.host.state_changed(&self.machine, state, &reason);
        }
        Ok(())
    }

    fn resumed(&self) -> MutexGuard<'_, Option<Instant>> {
        lock(&self.resumed)
    }

    /// Runs a command of the monitor.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn execute<C: qapi::Command>(&self, command: &C, deadline: Deadline) -> Result<Value> {
        self.qmp.execute(command, deadline)
    }

    pub fn machine(&self) -> &str {
        &self.machine
    }

    pub fn host(&self) -> &Host {
        &self.host
    }

    pub fn process(&self) -> &Handle {
        &self.process
    }

    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    pub fn version(&self) -> Version {
        self.version
    }

    /// Waits a moment for the end of a run whose monitor fails; returns whether the run has ended.
    pub fn ends_within_grace(&self, deadline: Deadline) -> bool {
        let grace = if self.qmp.is_closed() { KILL_TIMEOUT } else { EXIT_GRACE };
        self.wait_end(deadline.within(grace).remaining()).is_some()
    }

    pub fn has_ended(&self) -> bool {
        self.wait_end(Duration::ZERO).is_some()
    }

    /// Waits for the end of the run; returns none after the timeout.
    pub fn wait_end(&self, timeout: Duration) -> Option<End> {
        wait_while(&self.ended, lock(&self.end), Deadline::after(timeout), |end| end.is_none()).clone()
    }
}

impl DiskWriter for Run {
    fn files(&self) -> Vec<PathBuf> {
        if self.has_ended() { Vec::new() } else { self.writes.clone() }
    }

    fn end_for(&self, reason: String) {
        self.condemn(reason);
    }
}
