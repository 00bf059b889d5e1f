//! The screens of all machines. A machine is asked once a second at most, and once for all pages that wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, sleep};

use crate::actions::message::NoScreen;
use crate::fleet::Machine;
use crate::manager::Manager;

/// The time between two questions to one machine.
const INTERVAL: Duration = Duration::from_secs(1);
/// The same after a failure: a machine that cannot show its screen is left alone.
const FAILURE_INTERVAL: Duration = Duration::from_secs(10);

/// A screen as a PNG image.
#[derive(Debug, Clone)]
pub struct Picture {
    /// The identity of the content.
    pub etag: String,
    /// The content.
    pub png: Bytes,
}

type Taken = Result<Picture, NoScreen>;

/// The screens of all machines, each for a moment.
#[derive(Default)]
pub struct Screens(Mutex<HashMap<String, Arc<Slot>>>);

/// The place of one screen. Its lock is held while the machine is asked, so all pages wait for the same picture.
#[derive(Default)]
struct Slot(AsyncMutex<Option<(Instant, Taken)>>);

impl Screens {
    /// Returns the machine's screen.
    ///
    /// # Errors
    /// There is none now.
    pub async fn of(&self, machine: &Machine, manager: &Manager) -> Taken {
        let slot = {
            let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(slots.entry(machine.name().to_owned()).or_default())
        };
        let mut latest = slot.0.lock().await;
        if let Some((asked, taken)) = &*latest
            && asked.elapsed() < interval_after(taken)
        {
            return taken.clone();
        }
        let asked = Instant::now();
        let taken = manager.screen(machine).await.map(|png| Picture {
            etag: format!("\"{}\"", hex(&Sha256::digest(&png)[..16])),
            png: png.into(),
        });
        *latest = Some((asked, taken.clone()));
        drop(latest);
        if taken.is_ok() {
            tokio::spawn(forget(slot, asked));
        }
        taken
    }
}

/// Returns the time for which an answer holds.
fn interval_after(taken: &Taken) -> Duration {
    match taken {
        Ok(_) => INTERVAL,
        Err(NoScreen::Failed(_)) => FAILURE_INTERVAL,
        // The machine was not asked.
        Err(_) => Duration::ZERO,
    }
}

/// Forgets the picture when it is old, so that the screens of machines that nobody looks at take no memory.
async fn forget(slot: Arc<Slot>, asked: Instant) {
    sleep(2 * INTERVAL).await;
    let mut latest = slot.0.lock().await;
    if latest.as_ref().is_some_and(|(of, _)| *of == asked) {
        *latest = None;
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
