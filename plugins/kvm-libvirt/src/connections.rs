//! The connections to all libvirts of the configuration: one [`Connection`] for each dsn.
//!
//! They have nothing in common but libvirt's event loop, in which nothing waits. A libvirtd that hangs or is away
//! therefore delays no machine of another one.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use machinery::{Deadline, Error, Result};
use machinery_backend::sync::lock;

use crate::call;
use crate::connection::{Connection, Listener};

/// The connections, by their dsn.
#[derive(Default)]
pub struct Connections {
    by_dsn: Mutex<BTreeMap<String, Arc<Connection>>>,
    listener: OnceLock<Arc<dyn Listener>>,
}

impl Connections {
    /// Returns the connection of that dsn. A new one is not open yet.
    pub fn of(&self, dsn: &str) -> Arc<Connection> {
        let mut connections = lock(&self.by_dsn);
        Arc::clone(connections.entry(dsn.to_owned()).or_insert_with(|| Connection::new(dsn)))
    }

    /// Returns all connections.
    pub fn all(&self) -> Vec<Arc<Connection>> {
        lock(&self.by_dsn).values().cloned().collect()
    }

    /// Opens the connections of these dsns. If some libvirts cannot be reached, only logs that: their machines work once
    /// they are there.
    ///
    /// # Errors
    /// No libvirt can be reached. The error contains all failures.
    pub fn open(&self, dsns: &[&str], deadline: Deadline) -> Result<()> {
        let connections: Vec<_> = dsns.iter().map(|dsn| self.of(dsn)).collect();
        let opened = for_each(&connections, |connection| connection.open(deadline));
        let failures: Vec<Error> = opened.into_iter().filter_map(Result::err).collect();
        if failures.len() < connections.len() {
            failures
                .iter()
                .for_each(|error| tracing::warn!(%error, "the machines of one libvirt are out of order"));
            return Ok(());
        }
        Error::all(failures).map_or(Ok(()), Err)
    }

    /// Subscribes `listener` to the events of all libvirts, and keeps all connections open.
    ///
    /// # Errors
    /// The system cannot start another thread.
    pub fn listen(&self, listener: Arc<dyn Listener>) -> Result<()> {
        let listener = self.listener.get_or_init(|| listener);
        self.all().iter().try_for_each(|connection| connection.listen(Arc::clone(listener)))
    }

    /// Opens a connection that a new machine needs, unless it is kept open already.
    ///
    /// # Errors
    /// libvirt cannot be reached.
    pub fn add(&self, connection: &Connection, deadline: Deadline) -> Result<()> {
        let Some(listener) = self.listener.get().filter(|_| !connection.is_listened_to()) else {
            return Ok(());
        };
        connection.open(deadline)?;
        connection.listen(Arc::clone(listener))
    }

    /// Closes the connections that are not used any more, without waiting for their libvirts.
    pub fn close_unused(&self, is_used: impl Fn(&Connection) -> bool, deadline: Deadline) {
        let mut connections = lock(&self.by_dsn);
        let unused = connections.extract_if(.., |_, connection| !is_used(connection));
        for connection in unused.map(|(_, connection)| connection) {
            let dsn = connection.dsn().to_owned();
            if let Err(error) = call::spawn("libvirt-close", move || connection.close(deadline)) {
                tracing::warn!(dsn, %error, "an unused connection to libvirt remains");
            }
        }
    }

    /// Closes all connections for good.
    pub fn close(&self, deadline: Deadline) {
        let connections: Vec<_> = std::mem::take(&mut *lock(&self.by_dsn)).into_values().collect();
        for_each(&connections, |connection| connection.close(deadline));
    }
}

/// Calls `act` for each of these, all at the same time.
pub fn for_each<C: Sync, T: Send>(each: &[C], act: impl Fn(&C) -> T + Sync) -> Vec<T> {
    let act = &act;
    thread::scope(|scope| {
        let started: Vec<_> = each.iter().map(|one| scope.spawn(move || act(one))).collect();
        started.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}
