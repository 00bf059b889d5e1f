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
//! Every action has the same shape: look at the state, act, wait for the hypervisor to confirm it until
//! the deadline, and put things in order again if it does not. The lock is held to look and to act, and
//! never to wait: so `state` has an answer at any time.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use machinery::{Deadline, Error, ErrorKind, GUEST_POWERED_OFF, Host, Reloadable, Result, State};
use machinery_views::{Output, ppm_to_png};

use crate::config::Keys;
use crate::disk::Disk;
use crate::hypervisor::{Guest, Status};

/// What a start that failed may take to clear away behind itself. Its own time may be over by then, and
/// a call that is two seconds late costs the machine.
const CLEARING: Duration = Duration::from_secs(1);

/// Where a start begins.
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

/// A guest that is there, and all that goes with it.
struct Run {
    guest: Arc<Guest>,
    /// An action is ending it: its end is no news.
    ending: bool,
    _disk: Disk,
}

impl Drop for Run {
    /// No guest is left behind, on whatever way it is forgotten.
    fn drop(&mut self) {
        self.guest.unplug();
    }
}

/// For a new configuration while machines run: what to compare.
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

    /// Before its first start: nothing of a host that was killed may be left.
    pub fn make_ready(&self) -> Result<()> {
        Disk::clear_place(&self.keys.disk)
    }

    /// What the hypervisor says, in Cuckoo's words. It waits for no action that goes on.
    pub fn state(&self) -> State {
        match &*self.lock() {
            None => State::Poweroff,
            Some(run) if run.ending => State::Stopping,
            Some(run) => match run.guest.status() {
                Status::Loading => State::Starting,
                Status::Running => State::Running,
                // Its end is about to be reported.
                Status::Off => State::Stopping,
            },
        }
    }

    /// Returns when the hypervisor has confirmed that the guest runs. A start that fails leaves nothing.
    pub fn start(self: &Arc<Self>, start: Start, deadline: Deadline) -> Result<()> {
        let guest = self.begin(start)?;
        runs(&guest, deadline).inspect_err(|_| self.clear_away())
    }

    /// Looks and acts: a machine that is on is left alone. What takes long is not done here, but waited for
    /// without the lock.
    fn begin(self: &Arc<Self>, start: Start) -> Result<Arc<Guest>> {
        let mut run = self.lock();
        match &*run {
            None => Ok(Arc::clone(&run.insert(self.launch(start)?).guest)),
            Some(_) => Err(Error::unexpected_state("the machine is on").advice("Stop it first")),
        }
    }

    /// After a start that failed. The error of that start is the one to tell.
    fn clear_away(&self) {
        match self.end(Guest::unplug, Deadline::after(CLEARING)) {
            Err(error) if error.kind() != ErrorKind::StateReached => {
                tracing::warn!(machine = self.name(), %error, "a start that failed cannot be cleared away");
            }
            _ => {}
        }
    }

    pub fn stop(&self, deadline: Deadline) -> Result<()> {
        self.end(Guest::unplug, deadline)
    }

    pub fn acpi_stop(&self, deadline: Deadline) -> Result<()> {
        self.end(Guest::press_power_button, deadline)
    }

    /// Has the guest ended that way, and returns when the hypervisor has confirmed it.
    fn end(&self, how: fn(&Guest), deadline: Deadline) -> Result<()> {
        let guest = self.begin_to_end()?;
        how(&guest);
        guest.wait_for(Status::Off, deadline);
        let mut run = self.lock();
        if guest.status() == Status::Off {
            *run = None;
            return Ok(());
        }
        // It runs on, and when it ends after all, that is news again.
        run.iter_mut().for_each(|run| run.ending = false);
        Err(deadline.timeout("the guest to power off"))
    }

    fn begin_to_end(&self) -> Result<Arc<Guest>> {
        let mut run = self.lock();
        let off = || Error::state_reached("the machine is powered off already");
        let run = run.as_mut().ok_or_else(off)?;
        run.ending = true;
        Ok(Arc::clone(&run.guest))
    }

    fn launch(self: &Arc<Self>, start: Start) -> Result<Run> {
        let disk = Disk::make(&self.keys.disk)?;
        let memory = if start == Start::Snapshot { self.keys.own.snapshot } else { 0 };
        let life = self.keys.own.poweroff_after_ms.map(Duration::from_millis);
        // A guest keeps no machine alive that is gone.
        let machine = Arc::downgrade(self);
        let ended = move |guest: &Arc<Guest>| {
            if let Some(machine) = machine.upgrade() {
                machine.ended(guest);
            }
        };
        let guest = Guest::launch(memory, life, ended).map_err(|error| {
            Error::environment(format!("the guest cannot be launched: {error}"))
                .advice("Look at the limits of the user that the host runs as")
        })?;
        tracing::debug!(machine = self.name(), ?start, "launched");
        Ok(Run { guest, ending: false, _disk: disk })
    }

    /// The hypervisor's event: a guest has ended. What nobody has asked for is reported, at once and only
    /// once, and under the lock: told later, it could be taken for the end of the run that comes next.
    fn ended(&self, guest: &Arc<Guest>) {
        let mut run = self.lock();
        let by_itself = |run: &mut Run| Arc::ptr_eq(&run.guest, guest) && !run.ending;
        if run.take_if(by_itself).is_some() {
            self.host.state_changed(self.name(), State::Poweroff, GUEST_POWERED_OFF);
        }
    }

    /// Progress is told where something takes long, and once at least.
    pub fn dump_memory(&self, path: &Path, deadline: Deadline) -> Result<()> {
        let guest = self.running()?;
        let output = Output::at(path)?;
        self.host.progress(self.name(), 0.0);
        guest.dump(output.file()).map_err(|error| Error::io("dump the memory to", path, &error))?;
        deadline.check("the memory to be dumped")?;
        self.host.progress(self.name(), 1.0);
        // Only now is there a file at the path. On every way that does not come here there is none.
        output.finish()
    }

    pub fn screenshot(&self, path: &Path, deadline: Deadline) -> Result<()> {
        let guest = self.running()?;
        let output = Output::at(path)?;
        ppm_to_png(&guest.screen(), output.file())?;
        deadline.check("the screen to be written")?;
        output.finish()
    }

    fn running(&self) -> Result<Arc<Guest>> {
        let run = self.lock();
        let running = run.as_ref().filter(|run| run.guest.status() == Status::Running);
        let off = || Error::unexpected_state("the machine does not run").advice("Start it first");
        running.map(|run| Arc::clone(&run.guest)).ok_or_else(off)
    }

    /// A thread that panicked with the lock has cost its own action; what it guards is whole all the same.
    fn lock(&self) -> MutexGuard<'_, Option<Run>> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for the hypervisor to confirm that the guest runs, until the deadline and no longer.
fn runs(guest: &Guest, deadline: Deadline) -> Result<()> {
    match guest.wait_for(Status::Running, deadline) {
        Status::Running => Ok(()),
        Status::Off => Err(Error::failed("the guest has ended before it ran")),
        Status::Loading => Err(deadline.timeout("the guest to run")),
    }
}
