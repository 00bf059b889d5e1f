//! Limits on connections, and on the memory that the requests and replies of clients hold.
//!
//! A request takes a share of its connection's budget when it is read, and returns the share when its reply is
//! written. A connection whose budget is used up is not read from until its client reads. All connections of one user
//! together have a budget, too: when that is exceeded, the connection that holds most is closed. So a flood costs its
//! user's budget and its own connection, and nobody else waits for it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::UnixStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit};

/// The number of connections that one process may have.
const MAX_PER_PROCESS: usize = 512;
/// The number of connections that the processes of one user may have.
const MAX_PER_USER: usize = 1024;
/// The number of connections that all processes together may have.
const MAX_CONNECTIONS: usize = 2048;
/// The memory that the requests and replies of one connection may hold, in bytes.
const MAX_CONNECTION_BYTES: usize = 8 << 20;
/// The memory that the requests and replies of one user's connections may hold, in bytes.
const MAX_USER_BYTES: usize = 64 << 20;

/// The part of the user's budget that one share counts as, in bytes, at most. The longest list alone does not exceed the
/// budget.
const MAX_SHARE: usize = MAX_USER_BYTES / 2;
/// The number of long lines of one user that are read at the same time.
const MAX_LONG_LINES: usize = 16;

/// Counts connections by the process and the user at their other end.
#[derive(Default)]
pub struct ConnectionCounter {
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    by_process: HashMap<i32, usize>,
    by_user: HashMap<u32, Arc<UserBudget>>,
    /// The number of the next connection.
    next: u64,
}

impl ConnectionCounter {
    /// Returns a permit for a connection, unless there are too many.
    pub fn permit(self: &Arc<Self>, stream: &UnixStream) -> Option<ConnectionPermit> {
        let peer = stream.peer_cred().ok();
        let process = peer.and_then(|peer| peer.pid()).unwrap_or(0);
        let user = peer.map_or(u32::MAX, |peer| peer.uid());
        let mut counts = self.lock();
        let of_process = counts.by_process.get(&process).copied().unwrap_or_default();
        if counts.by_process.values().sum::<usize>() >= MAX_CONNECTIONS || of_process >= MAX_PER_PROCESS {
            return None;
        }
        let budget = Arc::clone(counts.by_user.entry(user).or_default());
        let number = counts.next;
        let closed = budget.open(number)?;
        counts.next += 1;
        *counts.by_process.entry(process).or_default() += 1;
        Some(ConnectionPermit { counter: Arc::clone(self), process, user, number, budget, closed })
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The permit for one connection; returned when it is dropped.
pub struct ConnectionPermit {
    counter: Arc<ConnectionCounter>,
    process: i32,
    user: u32,
    number: u64,
    budget: Arc<UserBudget>,
    closed: Arc<Notify>,
}

impl ConnectionPermit {
    /// Returns the budget of the connection.
    pub fn budget(&self) -> ClientBudget {
        ClientBudget { user: Arc::clone(&self.budget), number: self.number, ..ClientBudget::default() }
    }

    /// Waits until the connection is to be closed, because it holds most of a budget that is exceeded.
    pub async fn closed(&self) {
        self.closed.notified().await;
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut counts = self.counter.lock();
        if let Some(count) = counts.by_process.get_mut(&self.process) {
            *count -= 1;
            if *count == 0 {
                counts.by_process.remove(&self.process);
            }
        }
        if self.budget.close(self.number) {
            counts.by_user.remove(&self.user);
        }
    }
}

/// The memory that all connections of one user hold.
struct UserBudget {
    connections: Mutex<HashMap<u64, Usage>>,
    /// One permit for each long line that may be read at the same time.
    long_lines: Semaphore,
}

impl Default for UserBudget {
    fn default() -> Self {
        UserBudget { connections: Mutex::default(), long_lines: Semaphore::new(MAX_LONG_LINES) }
    }
}

/// The memory that one connection holds.
#[derive(Default)]
struct Usage {
    bytes: usize,
    closed: Arc<Notify>,
}

impl UserBudget {
    /// Adds a connection, unless there are too many; returns what wakes it when it is to be closed.
    fn open(&self, number: u64) -> Option<Arc<Notify>> {
        let mut connections = self.lock();
        if connections.len() >= MAX_PER_USER {
            return None;
        }
        Some(Arc::clone(&connections.entry(number).or_default().closed))
    }

    /// Removes a connection; reports whether the user has none any more.
    fn close(&self, number: u64) -> bool {
        let mut connections = self.lock();
        connections.remove(&number);
        connections.is_empty()
    }

    fn add(&self, number: u64, bytes: usize) {
        let mut connections = self.lock();
        // A connection that was closed meanwhile does not count any more.
        connections.entry(number).and_modify(|usage| usage.bytes += bytes);
        if connections.values().map(|usage| usage.bytes).sum::<usize>() > MAX_USER_BYTES
            && let Some(largest) = connections.values().max_by_key(|usage| usage.bytes)
        {
            largest.closed.notify_one();
        }
    }

    fn subtract(&self, number: u64, bytes: usize) {
        self.lock().entry(number).and_modify(|usage| usage.bytes = usage.bytes.saturating_sub(bytes));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Usage>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The memory that the requests and replies of one connection may hold.
#[derive(Clone)]
pub struct ClientBudget {
    own: Arc<Semaphore>,
    user: Arc<UserBudget>,
    number: u64,
}

impl Default for ClientBudget {
    fn default() -> Self {
        let own = Arc::new(Semaphore::new(MAX_CONNECTION_BYTES));
        ClientBudget { own, user: Arc::default(), number: 0 }
    }
}

/// A share of a budget. Dropping it returns the memory.
pub struct MemoryShare {
    user: Arc<UserBudget>,
    number: u64,
    bytes: usize,
    /// None only while the connection is closed.
    _own: Option<OwnedSemaphorePermit>,
}

impl ClientBudget {
    /// Waits for a share of that many bytes. A larger share than half of the budget counts as half of it.
    pub async fn share(&self, bytes: usize) -> MemoryShare {
        let bytes = bytes.min(MAX_CONNECTION_BYTES / 2);
        self.share_as(bytes, bytes).await
    }

    /// Waits for a share of a reply that is long and takes time to make, and has about that many bytes. It takes a
    /// quarter of the connection's budget, so that a client which does not read has few of them made.
    pub async fn large_share(&self, bytes: usize) -> MemoryShare {
        self.share_as(MAX_CONNECTION_BYTES / 4, bytes).await
    }

    /// Waits for a share that takes `own` of the connection's budget, and `bytes` of the user's.
    async fn share_as(&self, own: usize, bytes: usize) -> MemoryShare {
        let (count, bytes) = (u32::try_from(own).unwrap_or(u32::MAX), bytes.min(MAX_SHARE));
        let own = Arc::clone(&self.own).acquire_many_owned(count).await.ok();
        self.user.add(self.number, bytes);
        MemoryShare { user: Arc::clone(&self.user), number: self.number, bytes, _own: own }
    }

    /// Waits for the permit to read a long line. Other long lines of the user wait meanwhile, and short ones do not.
    pub async fn long_line(&self) -> Option<SemaphorePermit<'_>> {
        self.user.long_lines.acquire().await.ok()
    }

    /// Returns the number of long lines that may be read now.
    #[cfg(test)]
    pub fn free_long_lines(&self) -> usize {
        self.user.long_lines.available_permits()
    }
}

impl MemoryShare {
    /// Counts the share as that many bytes of the user's budget: a reply may be longer or shorter than expected. Nobody
    /// waits for that, but the budget may be exceeded by it.
    pub fn resize(&mut self, bytes: usize) {
        let bytes = bytes.min(MAX_SHARE);
        self.user.subtract(self.number, self.bytes);
        self.user.add(self.number, bytes);
        self.bytes = bytes;
    }
}

impl Drop for MemoryShare {
    fn drop(&mut self) {
        self.user.subtract(self.number, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn permit(counter: &Arc<ConnectionCounter>) -> Option<(ConnectionPermit, UnixStream)> {
        let (own, other) = UnixStream::pair().unwrap();
        counter.permit(&own).map(|permit| (permit, other))
    }

    #[tokio::test]
    async fn connections_of_a_process_are_limited_and_returned() {
        let counter = Arc::new(ConnectionCounter::default());
        let mut permits: Vec<_> = (0..MAX_PER_PROCESS).map(|_| permit(&counter).unwrap()).collect();
        assert!(permit(&counter).is_none());
        permits.pop();
        permits.push(permit(&counter).unwrap());
        drop(permits);
        let counts = counter.lock();
        assert!(counts.by_process.is_empty() && counts.by_user.is_empty());
    }

    #[tokio::test]
    async fn largest_connection_of_a_user_is_closed_when_the_budget_is_exceeded() {
        let counter = Arc::new(ConnectionCounter::default());
        let permits: Vec<_> = (0..20).map(|_| permit(&counter).unwrap()).collect();
        let mut shares = Vec::new();
        // The first connection holds most.
        for (number, (permit, _)) in permits.iter().enumerate().take(19) {
            let budget = permit.budget();
            shares.push(budget.share(3 << 20).await);
            if number == 0 {
                shares.push(budget.share(4 << 20).await);
            }
        }
        assert!(tokio::time::timeout(Duration::from_millis(1), permits[0].0.closed()).await.is_err());
        let (small, _) = &permits[19];
        let small_budget = small.budget();
        for _ in 0..2 {
            shares.push(small_budget.share(2 << 20).await);
        }
        permits[0].0.closed().await;
        assert!(tokio::time::timeout(Duration::from_millis(1), small.closed()).await.is_err());
        drop(shares);
        assert!(
            counter.lock().by_user.values().all(|user| user.lock().values().all(|usage| usage.bytes == 0))
        );
    }

    #[tokio::test]
    async fn connection_waits_when_its_budget_is_used_up() {
        let counter = Arc::new(ConnectionCounter::default());
        let (permit, _other) = permit(&counter).unwrap();
        let budget = permit.budget();
        let shares = [budget.share(usize::MAX).await, budget.share(usize::MAX).await];
        assert!(tokio::time::timeout(Duration::from_millis(1), budget.share(1)).await.is_err());
        drop(shares);
        budget.share(1).await;
    }

    #[tokio::test]
    async fn share_of_a_user_is_the_real_size_once_it_is_known() {
        let counter = Arc::new(ConnectionCounter::default());
        let (permit, _other) = permit(&counter).unwrap();
        let used = || permit.budget.lock().values().map(|usage| usage.bytes).sum::<usize>();
        let budget = permit.budget();
        let mut shares = Vec::new();
        for _ in 0..4 {
            shares.push(budget.large_share(1 << 30).await);
        }
        assert!(tokio::time::timeout(Duration::from_millis(1), budget.large_share(1)).await.is_err());
        assert_eq!(used(), 4 * MAX_SHARE);
        shares[0].resize(5 << 20);
        shares[1].resize(1 << 10);
        shares[2].resize(1 << 30);
        assert_eq!(used(), (5 << 20) + (1 << 10) + 2 * MAX_SHARE);
        drop(shares);
        assert_eq!(used(), 0);
    }
}
