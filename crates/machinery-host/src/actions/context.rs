//! The context of all executors: settings, permits, and the record of failures.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use machinery::{Error, ErrorKind, FreeSpaceReserve, Result};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::CLOSING;
use super::metrics::Metrics;
use crate::capture;
use crate::capture::space::Captures;
use crate::client_file::Folders;
use crate::config::{Config, Heal, Timeouts};
use crate::fleet::state_file::StateStore;
use crate::fleet::{Machine, Roster};

/// The number of restores that are prepared at a time, at most: machines that run now come first.
const MAX_PREPARATIONS: usize = 2;

/// The settings, permits and records that all executors share.
pub struct ActionContext {
    settings: RwLock<ActionSettings>,
    /// One permit for each restore that may run. Waiting restores get them in order of arrival.
    restores: Arc<Semaphore>,
    /// The same for preparations, which therefore never delay a restore.
    preparations: Arc<Semaphore>,
    /// The captures under way.
    pub captures: Arc<Captures>,
    /// Counts and durations of actions.
    pub metrics: Arc<Metrics>,
    state: Arc<StateStore>,
    /// The folders that the files of clients may be in.
    pub folders: Folders,
    /// Notified when a machine with a pending change is free.
    pub pending_change: Notify,
}

/// The configuration of all actions.
#[derive(Debug, Clone)]
pub struct ActionSettings {
    /// The timeouts of the actions.
    pub timeouts: Timeouts,
    /// How to capture traffic, if it is to be captured.
    pub capture: Option<capture::Settings>,
    /// The space that stays free. The machineries have it from the same file.
    reserve: FreeSpaceReserve,
    /// The consequence of a failure that may pass by itself.
    pub heal: Heal,
    /// The longest time that a run may last.
    pub max_run: Option<Duration>,
}

impl ActionSettings {
    /// Returns the settings in this configuration.
    pub fn of(config: &Config) -> Self {
        ActionSettings {
            timeouts: config.timeouts,
            capture: config.capture.clone(),
            reserve: config.free_space_reserve,
            heal: config.heal,
            max_run: config.max_run,
        }
    }

    /// Returns the configuration keys whose values differ in `new`.
    fn differing(&self, new: &ActionSettings) -> Vec<String> {
        let (old_capture, new_capture) = (self.capture.as_ref(), new.capture.as_ref());
        let both = old_capture.zip(new_capture);
        let keys = [
            ("timeouts", self.timeouts != new.timeouts),
            ("tcpdump.enabled", old_capture.is_some() != new_capture.is_some()),
            ("tcpdump.path", both.is_some_and(|(old, new)| old.tcpdump != new.tcpdump)),
            ("capture_size_limit", both.is_some_and(|(old, new)| old.limit != new.limit)),
            ("capture_jail", both.is_some_and(|(old, new)| old.jail != new.jail)),
            ("heal", self.heal != new.heal),
            ("max_run", self.max_run != new.max_run),
            (FreeSpaceReserve::KEY, self.reserve != new.reserve),
            ("resultserver", both.is_some_and(|(old, new)| old.result_server != new.result_server)),
        ];
        keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key.to_owned()).collect()
    }
}

impl ActionContext {
    /// Returns a context for a host with this configuration.
    pub fn new(config: &Config, folders: Folders, metrics: Arc<Metrics>, state: Arc<StateStore>) -> Self {
        let permits = config.max_parallel_restores.get().min(Semaphore::MAX_PERMITS);
        ActionContext {
            settings: RwLock::new(ActionSettings::of(config)),
            restores: Arc::new(Semaphore::new(permits)),
            preparations: Arc::new(Semaphore::new(permits.min(MAX_PREPARATIONS))),
            captures: Arc::default(),
            metrics,
            state,
            folders,
            pending_change: Notify::new(),
        }
    }

    /// Applies these settings to all later actions, and to the present runs and quarantines of these machines.
    pub async fn apply(&self, settings: ActionSettings, roster: &Roster) {
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = settings;
        self.disable_quarantined(roster).await;
        // Each worker waits anew, for the present end of its machine's run.
        roster.machines().iter().for_each(|machine| machine.notify_idle_work());
    }

    /// Disables all machines in quarantine if `heal` is off.
    pub async fn disable_quarantined(&self, roster: &Roster) {
        if self.settings().heal == Heal::Auto {
            return;
        }
        let disabled = roster.machines().iter().filter(|machine| machine.disable_quarantined());
        if disabled.count() > 0
            && let Err(error) = self.state.save().await
        {
            tracing::error!(%error, "the disabled machines on disk are old");
        }
    }

    /// Returns the configuration keys whose values differ in `settings`.
    pub fn differing(&self, settings: &ActionSettings) -> Vec<String> {
        self.settings().differing(settings)
    }

    /// Returns a copy of the settings.
    pub fn settings(&self) -> ActionSettings {
        self.settings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the timeouts of the actions.
    pub fn timeouts(&self) -> Timeouts {
        self.settings().timeouts
    }

    /// Waits for a permit to restore a machine.
    ///
    /// # Errors
    /// The host ends.
    pub async fn restore_permit(&self) -> Result<OwnedSemaphorePermit> {
        Arc::clone(&self.restores).acquire_owned().await.map_err(|_| Error::failed(CLOSING))
    }

    /// Waits for a permit to prepare a machine. Returns `None` when the host ends.
    pub async fn prepare_permit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.preparations).acquire_owned().await.ok()
    }

    /// Refuses all permits from now on.
    pub fn close(&self) {
        self.restores.close();
        self.preparations.close();
    }

    /// Takes the machine out of the pool after a failure of this kind, and saves that.
    pub async fn take_out(&self, machine: &Machine, kind: ErrorKind, reason: &str) {
        machine.take_out(kind, reason, self.settings().heal);
        self.save_pool(machine).await;
    }

    /// Saves that the machine has left the pool, or is back in it.
    pub async fn save_pool(&self, machine: &Machine) {
        if let Err(error) = self.state.save().await {
            let machine = machine.name();
            tracing::error!(machine, %error, "the machine's place in the pool is kept only until the host ends");
        }
    }
}
