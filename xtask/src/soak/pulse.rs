//! The pulse of a guest: the longest time between two counts, while its host is away.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use machinery_testkit::guest::GuestProbe;

/// The pause between two looks. A guest counts 18 times in a second.
const INTERVAL: Duration = Duration::from_millis(20);

/// Counts of a guest that are being watched.
#[derive(Debug)]
pub struct Pulse {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Duration>>,
}

impl Pulse {
    /// Begins to watch a guest that counts.
    pub fn watch(probe: &GuestProbe) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let (probe, over) = (probe.clone(), Arc::clone(&is_over));
        let thread = thread::spawn(move || {
            let (mut last, mut since, mut longest) =
                (probe.last_count().ok(), Instant::now(), Duration::ZERO);
            while !over.load(Ordering::SeqCst) {
                thread::sleep(INTERVAL);
                let count = probe.last_count().ok();
                longest = longest.max(since.elapsed());
                if count != last {
                    (last, since) = (count, Instant::now());
                }
            }
            longest
        });
        Pulse { is_over, thread: Some(thread) }
    }

    /// Returns the longest time between two counts.
    pub fn longest(mut self) -> Duration {
        self.is_over.store(true, Ordering::SeqCst);
        let joined = self.thread.take().map(JoinHandle::join);
        // The thread does not panic.
        joined.and_then(thread::Result::ok).unwrap_or_default()
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
    }
}
