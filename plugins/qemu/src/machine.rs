//! One machine: its files, and its run if it has one.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use machinery::{Deadline, DumpFormat, Error, Host, MachineInfo, Result, State};
use qapi::qmp;

use crate::config::{Binaries, MachineFiles};
use crate::disk::DisposableDisk;
use crate::launch::Start;
use crate::leftovers;
use crate::run::{NotStarted, Run};
use crate::snapshot::Snapshot;
use crate::states::state_of_status;
use crate::version::Version;
use crate::views;

/// What all machines share.
pub struct Shared {
    pub binaries: Binaries,
    pub version: Version,
    pub keep_disks: bool,
    pub host: Host,
}

pub struct Machine {
    files: MachineFiles,
    socket: PathBuf,
    shared: Arc<Shared>,
    now: Mutex<Now>,
}

enum Now {
    Off,
    Starting,
    On(Arc<Run>),
}

impl Machine {
    pub fn new(files: MachineFiles, sockets: &Path, shared: Arc<Shared>) -> Self {
        let socket = sockets.join(format!("qemu_{}.sock", files.info.name));
        Machine { files, socket, shared, now: Mutex::new(Now::Off) }
    }

    pub fn info(&self) -> &MachineInfo {
        &self.files.info
    }

    /// Clears away what a host that died left of this machine.
    ///
    /// # Errors
    /// A file stays.
    pub fn clear_leftovers(&self) -> Result<()> {
        let program = &self.shared.binaries.qemu_system_x86_64;
        leftovers::clear(&self.files.disposable, &self.socket, program, self.shared.keep_disks)
    }

    pub fn state(&self, deadline: Deadline) -> Result<State> {
        let run = match &*self.lock() {
            Now::Off => return Ok(State::Poweroff),
            Now::Starting => return Ok(State::Starting),
            Now::On(run) => Arc::clone(run),
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
        self.start(|| Snapshot::open(&self.files.snapshot).map(Some), deadline)
    }

    /// Starts cold.
    ///
    /// # Errors
    /// As [`restore_start`](Machine::restore_start).
    pub fn norestore_start(&self, deadline: Deadline) -> Result<()> {
        self.start(|| Ok(None), deadline)
    }

    fn start(&self, snapshot: impl FnOnce() -> Result<Option<Snapshot>>, deadline: Deadline) -> Result<()> {
        self.set_starting()?;
        let started = snapshot().map_err(NotStarted::from).and_then(|snapshot| self.run(snapshot, deadline));
        let mut now = self.lock();
        match started {
            Ok(run) => {
                *now = Now::On(run);
                Ok(())
            }
            Err(NotStarted { error, left }) => {
                // A QEMU that does not end still has the disk and the socket.
                *now = left.map_or(Now::Off, Now::On);
                Err(error)
            }
        }
    }

    fn set_starting(&self) -> Result<()> {
        let mut now = self.lock();
        let running = match &*now {
            Now::Off => false,
            Now::Starting => true,
            Now::On(run) => !run.has_ended(),
        };
        if running {
            return Err(Error::unexpected_state("the machine is not powered off").advice("Stop it first"));
        }
        *now = Now::Starting;
        Ok(())
    }

    fn run(&self, snapshot: Option<Snapshot>, deadline: Deadline) -> Result<Arc<Run>, NotStarted> {
        let shared = &self.shared;
        let disposable = &self.files.disposable;
        let name = &self.files.info.name;
        let base = &self.files.disk;
        let mut disk = DisposableDisk::create(&shared.binaries.qemu_img, name, base, disposable, deadline)?;
        disk.keep = shared.keep_disks;
        let start = Start {
            machine: name,
            program: &shared.binaries.qemu_system_x86_64,
            version: shared.version,
            args: self.files.start_args.with_disk(&disposable.to_string_lossy()).collect(),
            disk,
            socket: &self.socket,
            snapshot,
        };
        Run::start(start, &shared.host, deadline)
    }

    /// Pulls the plug.
    ///
    /// # Errors
    /// It is off already; the process does not end.
    pub fn stop(&self, deadline: Deadline) -> Result<()> {
        let run = self.running().ok_or_else(off_already)?;
        run.stop(deadline)?;
        *self.lock() = Now::Off;
        Ok(())
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// It is off already; the guest does not react.
    pub fn acpi_stop(&self, deadline: Deadline) -> Result<()> {
        let run = self.running().ok_or_else(off_already)?;
        run.power_button(deadline)?;
        *self.lock() = Now::Off;
        Ok(())
    }

    /// See [`views::dump_memory`].
    ///
    /// # Errors
    /// It is off; as there.
    pub fn dump_memory(&self, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        let run = self.running().ok_or_else(off)?;
        views::dump_memory(&run, &self.files.info.name, path, format, &self.shared.host, deadline)
    }

    /// See [`views::screenshot`].
    ///
    /// # Errors
    /// It is off; as there.
    pub fn screenshot(&self, path: &Path, deadline: Deadline) -> Result<()> {
        let run = self.running().ok_or_else(off)?;
        views::screenshot(&run, path, deadline)
    }

    fn running(&self) -> Option<Arc<Run>> {
        match &*self.lock() {
            Now::On(run) if !run.has_ended() => Some(Arc::clone(run)),
            _ => None,
        }
    }

    /// Each statement that holds the lock leaves it whole, so poison means nothing.
    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn off_already() -> Error {
    Error::state_reached("the machine is powered off already")
}

fn off() -> Error {
    Error::unexpected_state("the machine is powered off").advice("Start it first")
}
