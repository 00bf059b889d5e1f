//! One machine.
//!
//! ```text
//!             restore_start, norestore_start
//!   poweroff ──────────▶ starting ─────────▶ running
//!      ▲ ▲                   │                  │
//!      │ └── failed start ◀──┘                  │ stop, acpi_stop, or by itself, which is reported
//!      └──────────────── stopping ◀─────────────┘
//! ```
//!
//! Every action has the same form. It checks the state and acts, and waits until the deadline for the hypervisor's
//! confirmation. If there is none, it cleans up. The lock is held to check and to act, and never while waiting:
//! `state` can therefore return at any time.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use machinery::{Deadline, Error, ErrorKind, GUEST_POWERED_OFF, Host, Reloadable, Result, State};
use machinery_backend::{Output, ppm_to_png};

use crate::config::Keys;
use crate::disk::Disk;
use crate::hypervisor::{Guest, Status};

/// The timeout for the cleanup after a failed start. The deadline may have passed by then, and the host disables a
/// machine whose call is two seconds late.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(1);

/// The beginning of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    Snapshot,
    ColdBoot,
}

pub struct Machine {
    keys: Keys,
    host: Host,
    run: Mutex<Option<Run>>,
}

/// A run: the guest, and everything that is removed with it.
struct Run {
    guest: Arc<Guest>,
    /// An action is stopping the guest, so its end is not reported.
    stopping: bool,
    _disk: Disk,
}

impl Drop for Run {
    /// Ends the guest, however the run ends.
    fn drop(&mut self) {
        self.guest.kill();
    }
}

/// The values that a reload compares.
impl Reloadable for Machine {
    type Keys = Keys;

    fn key_name(keys: &Keys) -> &str {
        &keys.info.name
    }

    fn unique(keys: &Keys) -> Vec<(&'static str, Option<&str>)> {
        keys.info.unique()
    }

    fn keys(&self) -> &Keys {
        &self.keys
    }
}

impl Machine {
    pub fn new(keys: Keys, host: Host) -> Arc<Self> {
        Arc::new(Machine { keys, host, run: Mutex::new(None) })
    }

    /// Removes the leftovers of a host that was killed, before the first start.
    pub fn remove_leftovers(&self) -> Result<()> {
        Disk::remove_leftover(&self.keys.disk)
    }

    /// Returns the hypervisor's status as a state of Cuckoo's. It does not wait for an action.
    pub fn state(&self) -> State {
        match &*self.lock() {
            None => State::Poweroff,
            Some(run) if run.stopping => State::Stopping,
            Some(run) => match run.guest.status() {
                Status::Loading => State::Starting,
                Status::Running => State::Running,
                // The end of the guest is about to be reported.
                Status::Off => State::Stopping,
            },
        }
    }

    /// Returns when the hypervisor has confirmed that the guest runs. A failed start has no leftovers.
    pub fn start(self: &Arc<Self>, start: Start, deadline: Deadline) -> Result<()> {
        let guest = self.begin_start(start)?;
        wait_until_running(&guest, deadline).inspect_err(|_| self.clean_up())
    }

    /// Checks that the machine is off, and launches the guest. It holds the lock, and so does not wait for the guest.
    fn begin_start(self: &Arc<Self>, start: Start) -> Result<Arc<Guest>> {
        let mut run = self.lock();
        match &*run {
            None => Ok(Arc::clone(&run.insert(self.launch(start)?).guest)),
            Some(_) => Err(Error::unexpected_state("the machine is on").advice("Stop it first")),
        }
    }

    /// Cleans up after a failed start. It only logs its own error, because the start returns the first one.
    fn clean_up(&self) {
        match self.end(Guest::kill, Deadline::after(CLEANUP_TIMEOUT)) {
            Err(error) if error.kind() != ErrorKind::StateReached => {
                tracing::warn!(machine = self.name(), %error, "cannot clean up after a failed start");
            }
            _ => {}
        }
    }

    pub fn stop(&self, deadline: Deadline) -> Result<()> {
        self.end(Guest::kill, deadline)
    }

    pub fn acpi_stop(&self, deadline: Deadline) -> Result<()> {
        self.end(Guest::press_power_button, deadline)
    }

    /// Ends the guest with that function, and returns when the hypervisor has confirmed the end.
    fn end(&self, end: fn(&Guest), deadline: Deadline) -> Result<()> {
        let guest = self.begin_stop()?;
        end(&guest);
        guest.wait_for(Status::Off, deadline);
        let mut run = self.lock();
        if guest.status() == Status::Off {
            *run = None;
            return Ok(());
        }
        // The guest still runs, so a later end must be reported.
        run.iter_mut().for_each(|run| run.stopping = false);
        Err(deadline.timeout("the guest to power off"))
    }

    fn begin_stop(&self) -> Result<Arc<Guest>> {
        let mut run = self.lock();
        let off = || Error::state_reached("the machine is already powered off");
        let run = run.as_mut().ok_or_else(off)?;
        run.stopping = true;
        Ok(Arc::clone(&run.guest))
    }

    fn launch(self: &Arc<Self>, start: Start) -> Result<Run> {
        let disk = Disk::create(&self.keys.disk)?;
        let memory = if start == Start::Snapshot { self.keys.own.snapshot } else { 0 };
        let poweroff_after = self.keys.own.poweroff_after_ms.map(Duration::from_millis);
        // A guest must not keep a removed machine in memory.
        let machine = Arc::downgrade(self);
        let on_end = move |guest: &Arc<Guest>| {
            if let Some(machine) = machine.upgrade() {
                machine.on_guest_end(guest);
            }
        };
        let guest = Guest::launch(memory, poweroff_after, on_end).map_err(|error| {
            Error::environment(format!("cannot launch the guest: {error}"))
                .advice("Check the limits of the user that the host runs as")
        })?;
        tracing::debug!(machine = self.name(), ?start, "launched the guest");
        Ok(Run { guest, stopping: false, _disk: disk })
    }

    /// Handles the hypervisor's event that a guest has ended. It reports an end that no action has requested, once and
    /// under the lock: a later report could be mistaken for the end of the next run.
    fn on_guest_end(&self, guest: &Arc<Guest>) {
        let mut run = self.lock();
        let by_itself = |run: &mut Run| Arc::ptr_eq(&run.guest, guest) && !run.stopping;
        if run.take_if(by_itself).is_some() {
            self.host.state_changed(self.name(), State::Poweroff, GUEST_POWERED_OFF);
        }
    }

    /// Reports progress at least at the start and at the end.
    pub fn dump_memory(&self, path: &Path, deadline: Deadline) -> Result<()> {
        let guest = self.running_guest()?;
        let output = Output::at(path)?;
        self.host.progress(self.name(), 0.0);
        guest.dump(output.file()).map_err(|error| Error::io("dump the memory to", path, &error))?;
        deadline.check("the memory to be dumped")?;
        self.host.progress(self.name(), 1.0);
        // Only a finished output appears at the path.
        output.finish()
    }

    pub fn screenshot(&self, path: &Path, deadline: Deadline) -> Result<()> {
        let guest = self.running_guest()?;
        let output = Output::at(path)?;
        ppm_to_png(&guest.screen(), output.file())?;
        deadline.check("the screen to be written")?;
        output.finish()
    }

    fn running_guest(&self) -> Result<Arc<Guest>> {
        let run = self.lock();
        let running = run.as_ref().filter(|run| run.guest.status() == Status::Running);
        let off = || Error::unexpected_state("the machine does not run").advice("Start it first");
        running.map(|run| Arc::clone(&run.guest)).ok_or_else(off)
    }

    /// Ignores a poisoned lock: a panic fails its own action, and the run is valid at any point.
    fn lock(&self) -> MutexGuard<'_, Option<Run>> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until the deadline for the hypervisor's confirmation that the guest runs.
fn wait_until_running(guest: &Guest, deadline: Deadline) -> Result<()> {
    match guest.wait_for(Status::Running, deadline) {
        Status::Running => Ok(()),
        Status::Off => Err(Error::failed("the guest ended before it ran")),
        Status::Loading => Err(deadline.timeout("the guest to run")),
    }
}
