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
//! Every action has the same form. It begins an operation, which checks the state. Then it acts, and waits until the
//! deadline for the hypervisor's confirmation. `Work` has a lock that is held to look and to change, and never while
//! waiting: `state` can therefore return at any time.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, DumpFormat, Error, GUEST_POWERED_OFF, Result, State};
use machinery_backend::elf::{self, Architecture};
use machinery_backend::{Backend, Operation, Output, Reloadable, RunFolder, Work, refuse, rgb_to_png};

use crate::config::Keys;
use crate::hypervisor::{Guest, SCREEN, Status};
use crate::shared::Example;

pub struct Machine {
    keys: Keys,
    shared: Arc<Example>,
    work: Arc<Work<Option<Run>>>,
}

/// A run: the guest, and everything that is removed with it. A failed start drops it.
struct Run {
    guest: Arc<Guest>,
    /// The place for the run's disk, sockets and logs.
    _folder: RunFolder,
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
    fn keys(&self) -> &Keys {
        &self.keys
    }
}

impl Backend for Machine {
    /// Returns the hypervisor's status as a state of Cuckoo's. It does not wait for an action.
    fn state(self: &Arc<Self>, _: Deadline) -> Result<State> {
        let work = self.work.lock();
        Ok(match (work.operation(), work.as_ref().map(|run| run.guest.status())) {
            (Operation::Starting, _) => State::Starting,
            (_, None) => State::Poweroff,
            (Operation::Stopping, _) => State::Stopping,
            (_, Some(Status::Running)) => State::Running,
            (_, Some(Status::Loading)) => State::Starting,
            // The end of the guest is about to be reported.
            (_, Some(Status::Off)) => State::Stopping,
        })
    }

    fn restore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.start(self.keys.own.snapshot, deadline)
    }

    fn norestore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.start(0, deadline)
    }

    fn stop(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.end_guest(Guest::kill, deadline)
    }

    fn acpi_stop(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.end_guest(Guest::press_power_button, deadline)
    }

    /// Reports progress at least at the start and at the end. An unsupported format fails the action; the machine stays
    /// in the pool.
    fn dump_memory(self: &Arc<Self>, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        if format != DumpFormat::Elf {
            return Err(Error::unsupported(&format!("the memory dump format '{}'", format.as_str())));
        }
        let memory = self.running_guest()?.memory();
        let output = Output::at(path)?;
        let host = &self.shared.host;
        host.progress(self.name(), 0.0);
        elf::write_memory(output.file(), Architecture::X86_64, &memory)
            .map_err(|error| Error::io("dump the memory to", path, &error))?;
        deadline.check("the memory to be dumped")?;
        host.progress(self.name(), 1.0);
        // Only a finished output appears at the path.
        output.finish()
    }

    fn screenshot(self: &Arc<Self>, path: &Path, deadline: Deadline) -> Result<()> {
        let guest = self.running_guest()?;
        let output = Output::at(path)?;
        rgb_to_png(SCREEN, SCREEN, &guest.screen(), output.file())?;
        deadline.check("the screen to be written")?;
        output.finish()
    }

    /// Removes the folder of a run of a host that was killed, before the first start.
    fn clear_leftovers(&self) -> Result<()> {
        RunFolder::clear_leftovers(&self.keys.run_dir, self.name())
    }

    fn ensure_off(&self, _: Deadline) -> Result<()> {
        if self.work.lock().is_none() { Ok(()) } else { Err(refuse::on_in_reload(self.name())) }
    }
}

impl Machine {
    pub fn new(keys: Keys, shared: &Arc<Example>) -> Arc<Self> {
        Arc::new(Machine { keys, shared: Arc::clone(shared), work: Work::new(None) })
    }

    /// Returns when the hypervisor has confirmed that the guest runs. A failed start drops the run, which removes all of
    /// it.
    fn start(self: &Arc<Self>, memory: u32, deadline: Deadline) -> Result<()> {
        let is_off = |run: &mut Option<Run>| run.as_ref().map_or(Ok(()), |_| Err(refuse::not_off()));
        let (starting, ()) = self.work.begin(Operation::Starting, deadline, is_off)?;
        let run = self.launch(memory)?;
        match run.guest.wait_for(Status::Running, deadline) {
            Status::Running => starting.commit(|current| *current = Some(run)),
            Status::Off => Err(Error::failed("the guest ended before it ran")),
            Status::Loading => Err(deadline.timeout("the guest to run")),
        }
    }

    fn launch(self: &Arc<Self>, memory: u32) -> Result<Run> {
        let name = self.name();
        let folder = RunFolder::create(&self.keys.run_dir, name)?;
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
        tracing::debug!(machine = name, memory, "launched the guest");
        Ok(Run { guest, _folder: folder })
    }

    /// Ends the guest with that function, and returns when the hypervisor has confirmed the end.
    fn end_guest(&self, end: fn(&Guest), deadline: Deadline) -> Result<()> {
        let guest = |run: &mut Option<Run>| {
            run.as_ref().map(|run| Arc::clone(&run.guest)).ok_or_else(refuse::off_already)
        };
        let (stopping, guest) = self.work.begin(Operation::Stopping, deadline, guest)?;
        end(&guest);
        if guest.wait_for(Status::Off, deadline) != Status::Off {
            return Err(deadline.timeout("the guest to power off"));
        }
        // The folder is removed without the lock.
        let run = stopping.lock().take();
        drop(run);
        Ok(())
    }

    /// Handles the hypervisor's event that a guest has ended. The action under way, if there is one, decides first about
    /// the guest: a failed start or a stop has dropped it. Any other end is reported once, and under the lock: a later
    /// report could be mistaken for the end of the next run.
    fn on_guest_end(&self, guest: &Arc<Guest>) {
        let mut run = self.work.lock_when_idle();
        if run.take_if(|run| Arc::ptr_eq(&run.guest, guest)).is_some() {
            self.shared.host.state_changed(self.name(), State::Poweroff, GUEST_POWERED_OFF);
        }
    }

    fn running_guest(&self) -> Result<Arc<Guest>> {
        let work = self.work.lock();
        let running = work.as_ref().filter(|run| run.guest.status() == Status::Running);
        running.map(|run| Arc::clone(&run.guest)).ok_or_else(refuse::off)
    }
}
