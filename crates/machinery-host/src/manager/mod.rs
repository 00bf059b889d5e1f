//! The manager: owns all shared state, and has a method for everything that a client may request.
//!
//! The methods return values. [`server`](crate::server) renders them, and only a connection writes to its
//! client.
//!
//! | state | owner |
//! | --- | --- |
//! | the machines, their states and locks | [`Fleet`] |
//! | the locks on disk | [`StateStore`] |
//! | the queues of actions | [`Queues`] |
//! | the configuration | [`Reloader`] |
//! | counts and durations | [`Metrics`] |
//! | subscribers | [`Events`] |

pub mod console;
#[cfg(test)]
pub mod lab;
mod queries;
pub mod replacement;
mod unsaved;

use std::error::Error as StdError;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use machinery::Result;
use tokio::sync::{Notify, broadcast, mpsc, watch};

use crate::actions::diagnose::diagnose_one;
use crate::actions::message::Responder;
use crate::actions::metrics::Metrics;
use crate::actions::queues::Queues;
use crate::actions::{Action, ActionResult};
use crate::events::{Event, Events, ReloadSummary};
use crate::fleet::availability::{NotHeld, TaskLock};
use crate::fleet::pool::{AcquireError, MachineQuery};
use crate::fleet::state_file::StateStore;
use crate::fleet::{Fleet, Machine, Roster};
use crate::origin::Origin;
use crate::reload::Reloader;

use replacement::Replacement;
pub use unsaved::{UnsavedChange, UnsavedLock, UnsavedReservation};

/// The reason for refusing a request; its text is for the client.
pub type Refused = Box<dyn StdError + Send + Sync>;

/// The shared state of the host.
pub struct Manager {
    fleet: Arc<Fleet>,
    queues: Arc<Queues>,
    reloader: Reloader,
    metrics: Arc<Metrics>,
    state: Arc<StateStore>,
    events: Events,
    /// While false, only requests that end something, or that only read, are accepted.
    enabled: AtomicBool,
    /// True once nothing more happens: connections write their last replies and close.
    ended: watch::Sender<bool>,
    replacement: Replacement,
    origin: Origin,
    /// Notified when a client asks the host to end.
    end_asked: Notify,
    wall_address: watch::Sender<Option<String>>,
}

impl Manager {
    /// Returns a manager of these parts.
    pub fn new(
        fleet: Arc<Fleet>,
        queues: Arc<Queues>,
        reloader: Reloader,
        metrics: Arc<Metrics>,
        state: Arc<StateStore>,
        events: Events,
        replacement: Replacement,
    ) -> Self {
        let (enabled, ended) = (AtomicBool::new(true), watch::Sender::new(false));
        let (origin, end_asked) = (Origin::of_this_process(), Notify::new());
        Manager {
            fleet,
            queues,
            reloader,
            metrics,
            state,
            events,
            enabled,
            ended,
            replacement,
            origin,
            end_asked,
            wall_address: watch::Sender::new(None),
        }
    }

    /// Returns who has started this host, and when.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Asks the host to end, with all machines whose runs it has started.
    pub fn ask_to_end(&self) {
        tracing::info!("a client asks the host to end");
        self.end_asked.notify_one();
    }

    /// Waits until a client asks the host to end.
    pub async fn end_asked(&self) {
        self.end_asked.notified().await;
    }

    /// Returns the machine of that name.
    pub fn find(&self, name: &str) -> Option<Arc<Machine>> {
        self.fleet.find(name)
    }

    /// Returns all machineries and machines.
    pub fn roster(&self) -> Arc<Roster> {
        self.fleet.roster()
    }

    /// Returns the counts and durations of all actions.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Returns the queues of actions.
    pub fn queues(&self) -> &Queues {
        &self.queues
    }

    /// Returns the reloader of the configuration.
    pub fn reloader(&self) -> &Reloader {
        &self.reloader
    }

    /// Returns the folder below which every client may name files.
    pub fn storage(&self) -> &Path {
        &self.queues.context().folders.storage
    }

    /// Subscribes to all later events.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Reports whether the manager accepts all requests.
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Enables or disables the manager.
    pub fn set_enabled(&self, enabled: bool) {
        // Cuckoo3's node enables the manager at each of its starts.
        if self.enabled.swap(enabled, Ordering::SeqCst) != enabled {
            tracing::warn!(enabled, "the machinery manager was switched");
        }
    }

    /// Returns the switch that is true once nothing more happens.
    pub fn ended(&self) -> &watch::Sender<bool> {
        &self.ended
    }

    /// Returns the address of the wall, if it is served.
    pub fn wall_address(&self) -> &watch::Sender<Option<String>> {
        &self.wall_address
    }

    /// Reads the configuration again and applies it.
    ///
    /// # Errors
    /// The configuration has a fault, or a plugin refuses it; nothing has changed then.
    pub async fn reload(&self) -> Result<ReloadSummary> {
        self.reloader.reload().await
    }

    /// Stops all machines whose runs the host has started.
    ///
    /// # Errors
    /// Some could not be stopped: one line for each.
    pub async fn shutdown_all(&self) -> ActionResult {
        let roster = self.fleet.roster();
        // The action of a busy machine may be a start whose run has not begun yet.
        let running = roster
            .machines()
            .iter()
            .filter(|machine| self.queues.is_busy(machine) || machine.status().own_run);
        let (results, mut responses) = mpsc::unbounded_channel();
        for machine in running {
            let results = results.clone();
            let responder = Responder::new(move |result: ActionResult| {
                // The client may have left.
                let _ = results.send(result);
            });
            self.queues.submit(machine, Action::StopOwn, responder);
        }
        drop(results);
        let mut failures = Vec::new();
        while let Some(result) = responses.recv().await {
            failures.extend(result.err());
        }
        if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
    }

    /// Returns the replacement of this host by a newer program.
    pub fn replacement(&self) -> &Replacement {
        &self.replacement
    }

    /// Puts the machine back into the pool.
    ///
    /// # Errors
    /// The plugin cannot use the machine.
    pub async fn enable_machine(&self, machine: Arc<Machine>) -> Result<UnsavedChange, String> {
        let limit = self.queues.context().timeouts().state;
        diagnose_one(&machine, limit)
            .await
            .map_err(|why| format!("machine '{}' cannot be used yet: {why}", machine.name()))?;
        machine.enable();
        Ok(self.unsaved(machine))
    }

    /// Takes the machine out of the pool.
    pub fn disable_machine(&self, machine: Arc<Machine>, reason: &str) -> UnsavedChange {
        machine.disable(reason);
        self.unsaved(machine)
    }

    /// Takes the machine out of the pool until it is released.
    pub fn hold_machine(&self, machine: &Machine, reason: &str) {
        machine.hold(reason);
    }

    /// Releases a machine that is held, which then is as it was before.
    pub fn release_machine(&self, machine: &Machine) {
        machine.release();
    }

    /// Locks the machine for a task. Waits while a reload is applied.
    ///
    /// # Errors
    /// The machine is not available to the task, or the host ends.
    pub async fn lock(&self, machine: Arc<Machine>, lock: TaskLock) -> Result<UnsavedLock, Refused> {
        let new = self.allocate(|fleet| fleet.lock(&machine, &lock)).await?;
        Ok(UnsavedLock { machine, lock, new, state: Arc::clone(&self.state) })
    }

    /// Locks the first machine that matches the query. Waits while a reload is applied.
    ///
    /// # Errors
    /// No machine matches and is available, or the host ends.
    pub async fn acquire(&self, query: &MachineQuery, lock: TaskLock) -> Result<UnsavedLock, Refused> {
        let (machine, new) = self.allocate(|fleet| fleet.acquire(query, &lock)).await?;
        Ok(UnsavedLock { machine, lock, new, state: Arc::clone(&self.state) })
    }

    /// Reserves the machine for a task. Waits while a reload is applied.
    ///
    /// # Errors
    /// The machine is not available to the task, or the host ends.
    pub async fn reserve(&self, machine: Arc<Machine>, task_id: &str) -> Result<UnsavedReservation, Refused> {
        let new = self.allocate(|fleet| fleet.reserve(&machine, task_id)).await?;
        Ok(UnsavedReservation { machine, new, state: Arc::clone(&self.state) })
    }

    /// Releases the machine's lock; with a `task_id`, only that task's.
    ///
    /// # Errors
    /// The machine is not locked, or another task has it.
    pub fn unlock(&self, machine: Arc<Machine>, task_id: Option<&str>) -> Result<UnsavedChange, NotHeld> {
        machine.unlock(task_id)?;
        Ok(self.unsaved(machine))
    }

    /// Cancels the machine's reservation.
    ///
    /// # Errors
    /// The machine is not reserved.
    pub fn unreserve(&self, machine: Arc<Machine>) -> Result<UnsavedChange, NotHeld> {
        machine.unreserve()?;
        Ok(self.unsaved(machine))
    }

    /// Writes the state file again if the last write failed.
    pub async fn flush_pending(&self) {
        self.state.flush_pending().await;
    }

    /// Takes and releases each lock that a request needs. A host with a deadlock does not return.
    pub fn pass_all_locks(&self) {
        self.fleet.pass_allocation_lock();
        self.state.pass_locks();
        self.queues.pass_locks();
        for machine in self.fleet.roster().machines() {
            // Takes the lock of its status.
            machine.status();
            machine.info();
        }
    }

    fn unsaved(&self, machine: Arc<Machine>) -> UnsavedChange {
        UnsavedChange { machine, state: Arc::clone(&self.state) }
    }

    /// Allocates a machine, unless the host ends. A reload keeps the guard while it is applied, so nothing may
    /// be awaited while this holds it.
    async fn allocate<T>(
        &self,
        allocate: impl FnOnce(&Fleet) -> Result<T, AcquireError>,
    ) -> Result<T, Refused> {
        let _guard = self.reloader.allocation_guard().await;
        match self.queues.closing() {
            Some(closing) => Err(closing.into()),
            None => Ok(allocate(&self.fleet)?),
        }
    }
}
