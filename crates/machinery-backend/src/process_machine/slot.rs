//! The process of a machine, from its start to its end.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, Error, GUEST_POWERED_OFF, Host, Result, State};
use machinery_images::FileId;

use crate::budget::Share;
use crate::process::{End, Handle, LineKind, Process};
use crate::readiness::ReadinessReport;
use crate::refuse;
use crate::run_folder::RunFolder;
use crate::work::{Operation, Work};

/// The time to clean up after a failure, when the deadline may have passed. It is longer than the second that helpers of the
/// process have to end, and shorter than the two seconds that the host waits.
const CLEANUP_TIMEOUT: Duration = Duration::from_millis(1700);

/// A guest in its process. It derefs to the handle of the process.
#[derive(Debug)]
pub struct Guest {
    process: Arc<Handle>,
    folder: PathBuf,
}

impl Guest {
    /// Returns the path of a file in the folder of the run.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

impl Deref for Guest {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.process
    }
}

/// The place of a machine's process.
#[derive(Debug)]
pub struct Slot {
    pub host: Host,
    pub machine: String,
    pub state_dir: PathBuf,
    pub readiness: ReadinessReport,
    pub work: Arc<Work<Option<Current>>>,
}

/// The process of the machine. There is at most one, because there is one run folder.
#[derive(Debug)]
pub struct Current {
    pub guest: Arc<Guest>,
    pub phase: Phase,
    /// The identity of the snapshot when the process was started.
    snapshot: Option<FileId>,
    /// The memory of a standby.
    _share: Option<Share>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Loading,
    Standby,
    Running,
}

impl Current {
    /// Reports whether the process is a standby of the snapshot as it is now.
    pub fn is_standby_of(&self, snapshot: &Path) -> bool {
        let now = FileId::of(snapshot).ok();
        self.phase == Phase::Standby && now.is_some() && self.snapshot == now
    }
}

impl Slot {
    /// Returns the state. A guest whose process is stopped by a signal is paused.
    pub fn state(&self) -> State {
        let work = self.work.lock();
        let running = work.as_ref().filter(|current| current.phase == Phase::Running);
        match (work.operation(), running) {
            (Operation::Starting, _) => State::Starting,
            (Operation::Stopping, Some(_)) => State::Stopping,
            // The process has ended, and its helpers are about to.
            (_, Some(current)) if current.guest.wait(Duration::ZERO) => State::Stopping,
            (_, Some(current)) if current.guest.is_stopped() => State::Paused,
            (_, Some(_)) => State::Running,
            // The host regards a standby, and the work on it, as powered off.
            (_, None) => State::Poweroff,
        }
    }

    /// Returns the guest, if the machine runs.
    ///
    /// # Errors
    /// The machine is off.
    pub fn running(&self) -> Result<Arc<Guest>> {
        let work = self.work.lock();
        let runs =
            |current: &&Current| current.phase == Phase::Running && !current.guest.wait(Duration::ZERO);
        let running = work.as_ref().filter(runs);
        running.map(|current| Arc::clone(&current.guest)).ok_or_else(refuse::off)
    }

    /// Reports whether that guest is a standby, and lives.
    pub fn is_standby(&self, guest: &Arc<Guest>) -> bool {
        let work = self.work.lock();
        let is_same =
            |current: &Current| current.phase == Phase::Standby && Arc::ptr_eq(&current.guest, guest);
        work.as_ref().is_some_and(is_same) && !guest.wait(Duration::ZERO)
    }

    /// Starts the process in that folder. The lock makes its end wait until the process is known here.
    pub fn launch(
        self: &Arc<Self>,
        mut command: Command,
        folder: RunFolder,
        snapshot: Option<FileId>,
        kind_of: fn(&str) -> LineKind,
    ) -> Result<Arc<Guest>> {
        let path = folder.path().to_owned();
        folder.enter(&mut command);
        // A process must not keep a removed machine in memory.
        let slot = Arc::downgrade(self);
        let mut current = self.work.lock();
        let process = Process::start_with_commands(command, &self.machine, kind_of)?;
        let process = process.watch(move |end| {
            drop(folder);
            if let Some(slot) = slot.upgrade() {
                slot.on_end(&end);
            }
        })?;
        let guest = Arc::new(Guest { process, folder: path });
        **current =
            Some(Current { guest: Arc::clone(&guest), phase: Phase::Loading, snapshot, _share: None });
        Ok(guest)
    }

    /// Handles the end of the process. An end that no action has requested is reported under the lock: a later report could
    /// be mistaken for the end of the next run.
    fn on_end(&self, end: &End) {
        let mut work = self.work.lock();
        let phase = work.take().map(|current| current.phase);
        match (phase, work.operation()) {
            // The action that has requested this end did not wait for it: its time was up.
            (Some(Phase::Running), Operation::Idle) if end.was_requested() => {
                self.host.state_changed(&self.machine, State::Poweroff, "");
            }
            (Some(Phase::Standby), Operation::Idle) if end.was_requested() => self.readiness.report(),
            _ if end.was_requested() => {}
            (Some(Phase::Running), operation) if operation != Operation::Stopping => {
                let reason = if end.was_clean() { GUEST_POWERED_OFF.to_owned() } else { end.describe() };
                self.host.state_changed(&self.machine, State::Poweroff, &reason);
            }
            (Some(Phase::Standby), operation) if operation != Operation::Starting => {
                self.readiness.report();
                self.host.preparation_invalidated(&self.machine, &end.describe());
            }
            // The action under way fails with the last lines of the process.
            _ => {}
        }
        drop(work);
        self.work.notify();
    }

    /// Ends the process with that function, and returns when it is reaped and its folder is removed.
    pub fn end_process(&self, end: impl FnOnce(&Guest), deadline: Deadline) -> Result<()> {
        if let Some(current) = &**self.work.lock() {
            end(&current.guest);
        }
        self.wait_for_end(deadline, "the process to end")
    }

    pub fn wait_for_end(&self, deadline: Deadline, waiting_for: &str) -> Result<()> {
        match **self.work.wait_while(deadline, |current| current.is_some()) {
            None => Ok(()),
            Some(_) => Err(deadline.timeout(waiting_for)),
        }
    }

    /// Cleans up after a failure. It only logs its own error, because the action returns the first one.
    pub fn clean_up(&self) {
        if let Err(error) = self.end_process(|guest| guest.kill(), Deadline::after(CLEANUP_TIMEOUT)) {
            let machine = &self.machine;
            tracing::warn!(machine, %error, "cannot clean up after a failure");
        }
    }

    pub fn set_phase(&self, phase: Phase, share: Option<Share>) -> Result<()> {
        let mut work = self.work.lock();
        let current = work.as_mut().ok_or_else(|| Error::failed("the process has just ended"))?;
        (current.phase, current._share) = (phase, share);
        Ok(())
    }
}
