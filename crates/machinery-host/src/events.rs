//! What subscribers hear. Sending never waits: a subscriber that does not keep up loses events and
//! is told how many.

use machinery::{RestoreReadiness, State};
use serde::Serialize;
use tokio::sync::broadcast;

use crate::reload::Taken;

/// How many events a subscriber can be behind.
const KEPT: usize = 4096;

/// Something that happened, mostly to a machine.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Its state changed.
    State {
        /// Which machine.
        machine: String,
        /// What it is now.
        state: State,
        /// Why, if it happened by itself.
        #[serde(skip_serializing_if = "String::is_empty")]
        reason: String,
    },
    /// How far a long action is.
    Progress {
        /// On which machine.
        machine: String,
        /// 0.0 to 1.0
        fraction: f64,
    },
    /// It was taken out of the pool.
    Disabled {
        /// Which machine.
        machine: String,
        /// Why.
        reason: String,
    },
    /// It was put back.
    Enabled {
        /// Which machine.
        machine: String,
    },
    /// A task has it now.
    Locked {
        /// Which machine.
        machine: String,
        /// Which task.
        task_id: String,
    },
    /// No task has it any more.
    Unlocked {
        /// Which machine.
        machine: String,
    },
    /// It is kept for a task.
    Reserved {
        /// Which machine.
        machine: String,
        /// Which task.
        task_id: String,
    },
    /// It is kept for nobody any more.
    Unreserved {
        /// Which machine.
        machine: String,
    },
    /// How its next restore will go has changed.
    Ready {
        /// Which machine.
        machine: String,
        /// How.
        #[serde(flatten)]
        ready: RestoreReadiness,
    },
    /// The configuration was reloaded.
    Reloaded(Taken),
    /// Its traffic is not captured, or not to the end.
    CaptureFailed {
        /// Which machine.
        machine: String,
        /// Why.
        reason: String,
    },
}

/// Where events are sent from.
#[derive(Debug, Clone)]
pub struct Events(broadcast::Sender<Event>);

impl Events {
    /// Tells all subscribers.
    pub fn send(&self, event: Event) {
        // An error only says that nobody listens.
        let _ = self.0.send(event);
    }

    /// Everything that is sent from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.0.subscribe()
    }
}

impl Default for Events {
    fn default() -> Self {
        Events(broadcast::Sender::new(KEPT))
    }
}
