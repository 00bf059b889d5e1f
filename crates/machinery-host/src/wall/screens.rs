//! The screens of all machines. A machine is asked once a second at most, and once for all pages that wait.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, sleep};

use crate::actions::message::{NoScreen, Screen};
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
struct Slot(AsyncMutex<Option<Question>>);

/// The latest question to a machine.
struct Question {
    asked: Instant,
    /// The answer; none when the page has left before it.
    answer: Option<Taken>,
}

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
        slot.answer(manager.screen(machine)).await
    }
}

impl Slot {
    /// Returns the latest answer, or that of `screen` if the latest question is old.
    async fn answer(self: Arc<Self>, screen: impl Future<Output = Screen>) -> Taken {
        let mut latest = self.0.lock().await;
        if let Some(question) = latest.as_ref().filter(|question| question.is_recent()) {
            return question.answer.clone().unwrap_or(Err(NoScreen::Busy));
        }
        let asked = Instant::now();
        *latest = Some(Question { asked, answer: None });
        let answer = screen.await.map(|png| Picture {
            etag: format!("\"{}\"", hex(&Sha256::digest(&png)[..16])),
            png: png.into(),
        });
        *latest = Some(Question { asked, answer: Some(answer.clone()) });
        drop(latest);
        if answer.is_ok() {
            tokio::spawn(forget(self, asked));
        }
        answer
    }
}

impl Question {
    /// Reports whether the machine is not asked again now.
    fn is_recent(&self) -> bool {
        let interval = match &self.answer {
            Some(Ok(_)) | None => INTERVAL,
            Some(Err(NoScreen::Failed(_))) => FAILURE_INTERVAL,
            // The machine was not asked.
            Some(Err(_)) => Duration::ZERO,
        };
        self.asked.elapsed() < interval
    }
}

/// Forgets the picture when it is old, so that the screens of machines that nobody looks at take no memory.
async fn forget(slot: Arc<Slot>, asked: Instant) {
    sleep(2 * INTERVAL).await;
    let mut latest = slot.0.lock().await;
    if latest.as_ref().is_some_and(|question| question.asked == asked) {
        *latest = None;
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use tokio::time::{advance, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn machine_is_asked_once_a_second_also_when_pages_leave_before_the_answer() {
        let slot = Arc::<Slot>::default();
        let leaves = Arc::clone(&slot).answer(pending());
        assert!(timeout(Duration::from_millis(1), leaves).await.is_err());
        // A second question would never be answered.
        assert_eq!(Arc::clone(&slot).answer(pending()).await.unwrap_err(), NoScreen::Busy);
        advance(INTERVAL).await;
        let shown = Arc::clone(&slot).answer(ready(Ok(vec![1]))).await.unwrap();
        assert_eq!(Arc::clone(&slot).answer(pending()).await.unwrap().etag, shown.etag);
        sleep(3 * INTERVAL).await;
        assert!(slot.0.lock().await.is_none(), "nobody looks");
    }
}
