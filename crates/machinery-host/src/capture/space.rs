//! The free space of the file systems that captures are written to.
//!
//! A capture grows as long as its guest sends, up to its limit. It ends earlier when the file system has less than half of
//! the free-space reserve: the machineries have ended runs before that, and it did not help. Then the largest capture
//! ends, and another one for each further sixteenth of the reserve that is used up.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use machinery::{Error, FreeSpaceReserve, format_bytes};
use rustix::fs::fstatvfs;
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval};

/// The pause between two looks at the size of a capture.
const INTERVAL: Duration = Duration::from_millis(250);
/// The part of the reserve that has to be used up before another capture is ended.
const STEP: u64 = 16;
/// The default limit of a capture, in bytes.
pub const DEFAULT_LIMIT: u64 = 1 << 30;

/// The captures under way.
#[derive(Debug, Default)]
pub struct Captures(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    files: Vec<Arc<File>>,
    /// The free space below which the next capture is ended, for each file system, in bytes.
    levels: HashMap<u64, u64>,
}

/// A capture under way, until it is dropped.
pub struct Watched {
    captures: Arc<Captures>,
    file: Arc<File>,
    /// The name of the file, for messages.
    name: PathBuf,
    reserve: FreeSpaceReserve,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.captures.lock().files.retain(|file| !Arc::ptr_eq(file, &self.file));
    }
}

impl Captures {
    /// Adds a capture into that open file, whose name is for messages.
    pub fn add(self: &Arc<Self>, file: File, name: &Path, reserve: FreeSpaceReserve) -> Watched {
        let file = Arc::new(file);
        self.lock().files.push(Arc::clone(&file));
        Watched { captures: Arc::clone(self), file, name: name.to_owned(), reserve }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched {
    /// Waits until the capture has to end; returns the reason.
    pub async fn exceeded(self) -> Error {
        let watched = Arc::new(self);
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let looking = Arc::clone(&watched);
            // A file system may take its time to answer.
            if let Ok(Some(why)) = spawn_blocking(move || looking.look()).await {
                return why;
            }
        }
    }

    /// Returns the reason to end the capture, if there is one.
    fn look(&self) -> Option<Error> {
        let (meta, name) = (self.file.metadata().ok()?, self.name.display());
        let system = fstatvfs(&*self.file).ok()?;
        let bytes = |blocks: u64| blocks.saturating_mul(system.f_frsize);
        let (free, reserve) = (bytes(system.f_bavail), self.reserve.on(bytes(system.f_blocks)));
        self.is_next(meta.dev(), free, reserve).then(|| {
            let (free, least) = (format_bytes(free), format_bytes(reserve / 2));
            let shortage = format!("only {free} are free on its file system, less than {least}");
            Error::environment(format!("{name} has no later packets: {shortage}"))
                .advice("Free some space there, or lower free_space_reserve in machinery-host.yaml")
        })
    }

    /// Reports whether this capture has to end, because there is that much free space.
    fn is_next(&self, device: u64, free: u64, reserve: u64) -> bool {
        let mut state = self.captures.lock();
        if free >= reserve / 2 {
            state.levels.remove(&device);
            return false;
        }
        let level = state.levels.get(&device).copied().unwrap_or(u64::MAX);
        let is_largest = state.largest_on(device).is_some_and(|file| Arc::ptr_eq(file, &self.file));
        if free < level && is_largest {
            state.levels.insert(device, free.saturating_sub(reserve / STEP));
            return true;
        }
        false
    }
}

impl State {
    fn largest_on(&self, device: u64) -> Option<&Arc<File>> {
        let size = |file: &&Arc<File>| {
            let meta = file.metadata().ok().filter(|meta| meta.dev() == device);
            meta.map(|meta| meta.len())
        };
        self.files.iter().filter(|file| size(file).is_some()).max_by_key(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(captures: &Arc<Captures>, bytes: usize, reserve: &str) -> Watched {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &vec![1; bytes]).unwrap();
        let reserve = serde_json::from_value(serde_json::json!(reserve)).unwrap();
        captures.add(file, Path::new("/d/dump.pcap"), reserve)
    }

    #[test]
    fn largest_capture_alone_has_to_end_when_the_space_is_short_and_shrinks_no_more() {
        let captures = Arc::new(Captures::default());
        let small = watched(&captures, 10, "1000000 TiB");
        let large = watched(&captures, 1000, "1000000 TiB");
        assert!(small.look().is_none());
        let why = large.look().unwrap().to_string();
        assert!(why.contains("are free on its file system, less than 500000 TiB"), "{why}");
        drop(large);
        assert!(small.look().is_none());
    }
}
