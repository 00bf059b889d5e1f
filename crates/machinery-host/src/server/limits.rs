//! Limits on connections, per process and in all.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::UnixStream;

/// The number of connections that one process may have.
const MAX_PER_PROCESS: usize = 512;
/// The number of connections that all processes together may have.
const MAX_CONNECTIONS: usize = 2048;

/// Counts connections by the process at their other end.
#[derive(Default)]
pub struct ConnectionCounter {
    by_process: Mutex<HashMap<i32, usize>>,
}

impl ConnectionCounter {
    /// Returns a permit for a connection, unless there are too many.
    pub fn permit(self: &Arc<Self>, stream: &UnixStream) -> Option<ConnectionPermit> {
        let process = stream.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or(0);
        let mut by_process = self.lock();
        if by_process.values().sum::<usize>() >= MAX_CONNECTIONS {
            return None;
        }
        let count = by_process.entry(process).or_default();
        if *count >= MAX_PER_PROCESS {
            return None;
        }
        *count += 1;
        Some(ConnectionPermit { counter: Arc::clone(self), process })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, usize>> {
        self.by_process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The permit for one connection; returned when it is dropped.
pub struct ConnectionPermit {
    counter: Arc<ConnectionCounter>,
    process: i32,
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut by_process = self.counter.lock();
        if let Some(count) = by_process.get_mut(&self.process) {
            *count -= 1;
            if *count == 0 {
                by_process.remove(&self.process);
            }
        }
    }
}
