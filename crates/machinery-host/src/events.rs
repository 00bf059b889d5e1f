//! Events, and their subscribers. Sending never blocks: a subscriber that is too slow loses events and
//! receives their number.

use machinery::{RestoreReadiness, State};
use serde::Serialize;
use tokio::sync::broadcast;

/// The number of events that a subscriber may lag behind.
const MAX_LAG: usize = 4096;

/// The result of a reload.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct ReloadSummary {
    /// The machines that were added.
    pub added: Vec<String>,
    /// The machines whose new configuration is applied.
    pub changed: Vec<String>,
    /// The machines that were removed.
    pub removed: Vec<String>,
    /// The machines that were in use: their change is applied when they are free.
    pub deferred: Vec<String>,
    /// The keys of the host's own configuration whose new values apply to later actions.
    pub settings: Vec<String>,
    /// The changes that need a restart of the host.
    pub restart_required: Vec<String>,
}

/// An event, mostly of a machine.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The state has changed.
    State {
        /// The machine.
        machine: String,
        /// The new state.
        state: State,
        /// The reason, if the host has not ordered the change.
        #[serde(skip_serializing_if = "String::is_empty")]
        reason: String,
    },
    /// The progress of a long action.
    Progress {
        /// The machine.
        machine: String,
        /// 0.0 to 1.0
        fraction: f64,
    },
    /// The machine has left the pool.
    Disabled {
        /// The machine.
        machine: String,
        /// The reason.
        reason: String,
    },
    /// The machine is back in the pool.
    Enabled {
        /// The machine.
        machine: String,
    },
    /// A failure has put the machine into quarantine, or a try to heal it has failed.
    Quarantined {
        /// The machine.
        machine: String,
        /// The reason.
        reason: String,
        /// The number of failed tries.
        tries: u32,
        /// The seconds until the next try.
        next_try_in: u64,
    },
    /// A try has worked, and the machine has left its quarantine.
    Healed {
        /// The machine.
        machine: String,
        /// The number of tries, with the one that has worked.
        tries: u32,
        /// The seconds since the failure.
        seconds: u64,
    },
    /// A task has locked the machine.
    Locked {
        /// The machine.
        machine: String,
        /// The task.
        task_id: String,
        /// The user of the client.
        uid: Option<u32>,
    },
    /// The lock has been released.
    Unlocked {
        /// The machine.
        machine: String,
    },
    /// The machine is reserved for a task.
    Reserved {
        /// The machine.
        machine: String,
        /// The task.
        task_id: String,
    },
    /// The reservation has been cancelled.
    Unreserved {
        /// The machine.
        machine: String,
    },
    /// The readiness for the next restore has changed.
    Ready {
        /// The machine.
        machine: String,
        /// The readiness.
        #[serde(flatten)]
        ready: RestoreReadiness,
    },
    /// The configuration was reloaded.
    Reloaded(ReloadSummary),
    /// The run of a task is lost or incomplete.
    RunError {
        /// The machine.
        machine: String,
        /// The task.
        task_id: String,
        /// The reason.
        reason: String,
        /// True if the run is lost. Otherwise it is incomplete.
        lost: bool,
    },
    /// The traffic is not captured, or only in part.
    CaptureFailed {
        /// The machine.
        machine: String,
        /// The reason.
        reason: String,
    },
}

/// The sender of events.
#[derive(Debug, Clone)]
pub struct Events(broadcast::Sender<Event>);

impl Events {
    /// Sends an event to all subscribers.
    pub fn send(&self, event: Event) {
        // An error only means that there is no subscriber.
        let _ = self.0.send(event);
    }

    /// Subscribes to all later events.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.0.subscribe()
    }
}

impl Default for Events {
    fn default() -> Self {
        Events(broadcast::Sender::new(MAX_LAG))
    }
}
