//! The changes of all machines, for all pages.
//!
//! ```text
//! idle ─▶ event ─▶ further events, for a moment ─▶ one batch, rendered once for all pages ─▶ idle
//!     └─▶ a reload, or too many events: each page gets a new snapshot
//! ```

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::time::sleep;

use super::view::tile;
use crate::events::Event;
use crate::manager::Manager;
use crate::server::reply;

/// The time from the first event of a batch to the batch.
const BATCH_TIME: Duration = Duration::from_millis(100);
/// The number of batches that a page may lag behind.
const MAX_LAG: usize = 32;
/// The number of events that are kept for each machine.
const MAX_RECENT: usize = 30;

/// The changes, and the latest events of each machine.
pub struct Feed {
    manager: Arc<Manager>,
    batches: broadcast::Sender<Update>,
    recent: Mutex<HashMap<String, VecDeque<Value>>>,
}

/// An update of each page.
#[derive(Debug, Clone)]
pub enum Update {
    /// These changes, as JSON.
    Batch(Arc<str>),
    /// Everything may have changed.
    Snapshot,
}

/// The events of one batch.
#[derive(Default)]
struct Batch {
    machines: BTreeSet<String>,
    events: Vec<Value>,
    is_incomplete: bool,
}

impl Feed {
    /// Returns the feed of that host, which [`follow`](Feed::follow) moves on.
    pub fn new(manager: Arc<Manager>) -> Self {
        Feed { manager, batches: broadcast::Sender::new(MAX_LAG), recent: Mutex::default() }
    }

    /// Subscribes to all later updates.
    pub fn subscribe(&self) -> broadcast::Receiver<Update> {
        self.batches.subscribe()
    }

    /// Follows the events until it is dropped.
    pub async fn follow(&self) {
        let mut events = self.manager.subscribe();
        loop {
            let mut batch = Batch::default();
            match events.recv().await {
                Ok(event) => self.add(&event, &mut batch),
                Err(RecvError::Lagged(_)) => batch.is_incomplete = true,
                Err(RecvError::Closed) => pending().await,
            }
            sleep(BATCH_TIME).await;
            loop {
                match events.try_recv() {
                    Ok(event) => self.add(&event, &mut batch),
                    Err(TryRecvError::Lagged(_)) => batch.is_incomplete = true,
                    Err(TryRecvError::Empty | TryRecvError::Closed) => break,
                }
            }
            self.publish(batch);
        }
    }

    fn add(&self, event: &Event, batch: &mut Batch) {
        let mut value = reply::event(event);
        let Some(machine) = value["machine"].as_str().map(str::to_owned) else {
            // A reload: machines are new, or gone.
            batch.is_incomplete = true;
            let roster = self.manager.roster();
            self.recent().retain(|name, _| roster.machines().iter().any(|machine| machine.name() == name));
            return;
        };
        value["time"] = json!(now());
        // The progress of an action is no news later.
        if !matches!(event, Event::Progress { .. }) {
            let mut recent = self.recent();
            let recent = recent.entry(machine.clone()).or_default();
            if recent.len() == MAX_RECENT {
                recent.pop_front();
            }
            recent.push_back(value.clone());
        }
        batch.machines.insert(machine);
        batch.events.push(value);
    }

    /// Sends the batch to all pages, if there are any.
    fn publish(&self, batch: Batch) {
        if self.batches.receiver_count() == 0 {
            return;
        }
        let update = match batch.is_incomplete {
            true => Update::Snapshot,
            false => {
                let machines = batch.machines.iter().filter_map(|name| self.manager.find(name));
                let machines: Vec<Value> = machines.map(|machine| tile(&machine)).collect();
                let batch = json!({"time": now(), "machines": machines, "events": batch.events});
                Update::Batch(batch.to_string().into())
            }
        };
        // The last page may have left.
        let _ = self.batches.send(update);
    }

    /// Returns all machines, as JSON.
    pub fn snapshot(&self, actions: bool) -> Arc<str> {
        let machines: Vec<Value> =
            self.manager.roster().machines().iter().map(|machine| tile(machine)).collect();
        let version = env!("CARGO_PKG_VERSION");
        json!({"time": now(), "version": version, "actions": actions, "machines": machines})
            .to_string()
            .into()
    }

    /// Returns the latest events of the machine, the oldest first.
    pub fn recent_of(&self, machine: &str) -> Vec<Value> {
        self.recent().get(machine).into_iter().flatten().cloned().collect()
    }

    fn recent(&self) -> MutexGuard<'_, HashMap<String, VecDeque<Value>>> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the time in milliseconds since 1970.
fn now() -> u64 {
    u64::try_from(UNIX_EPOCH.elapsed().unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}
