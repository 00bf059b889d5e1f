//! Changes that are made, and not on disk yet.
//!
//! A change is visible to every later request at once. Its client gets a reply only when the change is on
//! disk. A new lock or reservation that cannot be saved is released again.

use std::sync::Arc;

use machinery::Error;

use crate::actions::capture;
use crate::fleet::Machine;
use crate::fleet::availability::TaskLock;
use crate::fleet::state_file::StateStore;

/// A machine that was unlocked, unreserved, enabled or disabled.
pub struct UnsavedChange {
    pub(super) machine: Arc<Machine>,
    pub(super) state: Arc<StateStore>,
}

impl UnsavedChange {
    /// Ends the capture of a task that does not have the machine any more, and saves.
    ///
    /// # Errors
    /// The change cannot be saved; it is made nevertheless.
    pub async fn save(self) -> Result<(), String> {
        capture::end_of_task(&self.machine).await;
        self.state.save().await.map_err(|error| error.machine(self.machine.name()).to_string())
    }
}

/// A lock, or a repeated one.
pub struct UnsavedLock {
    pub(super) machine: Arc<Machine>,
    pub(super) lock: TaskLock,
    pub(super) new: bool,
    pub(super) state: Arc<StateStore>,
}

impl UnsavedLock {
    /// Saves the lock, and returns the machine.
    ///
    /// # Errors
    /// The lock cannot be saved and is released, or somebody has released it meanwhile.
    pub async fn save(self) -> Result<Arc<Machine>, String> {
        let UnsavedLock { machine, lock, new, state } = self;
        match state.save().await {
            // A repeated lock may have been released by the first one's failure.
            Ok(()) if machine.task_lock().as_ref() != Some(&lock) => {
                Err(format!("the lock of machine '{}' was taken back. Ask again.", machine.name()))
            }
            Ok(()) => Ok(machine),
            Err(error) => {
                if new {
                    // Somebody may have released it already.
                    let _ = machine.unlock(Some(&lock.task_id));
                    state.flush_pending().await;
                }
                Err(failed("lock", &machine, error))
            }
        }
    }
}

/// A reservation, or a repeated one.
pub struct UnsavedReservation {
    pub(super) machine: Arc<Machine>,
    pub(super) new: bool,
    pub(super) state: Arc<StateStore>,
}

impl UnsavedReservation {
    /// Saves the reservation.
    ///
    /// # Errors
    /// The reservation cannot be saved, and is cancelled.
    pub async fn save(self) -> Result<(), String> {
        let UnsavedReservation { machine, new, state } = self;
        let Err(error) = state.save().await else { return Ok(()) };
        if new {
            let _ = machine.unreserve();
            state.flush_pending().await;
        }
        Err(failed("reserve", &machine, error))
    }
}

fn failed(action: &str, machine: &Machine, error: Error) -> String {
    error.action(action).machine(machine.name()).to_string()
}
