//! The connection that brings the events of all domains of a libvirt, and its state.
//!
//! Each connection has a number. A late report about an old connection therefore never changes the state of
//! a new one.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use machinery::{Deadline, Error, Result};
use machinery_backend::sync;
use virt::connect::Connect;

use super::pool::{self, Pool};
use crate::events::{self, Event, EventHandler, MonitoredConnection};

/// A subscriber to the events of all domains, with the dsn of their libvirt.
pub trait Listener: Send + Sync + 'static {
    /// Handles an event of the domain of that name.
    fn on_event(&self, dsn: &str, label: &str, event: Event);
    /// Handles the loss of the connection. Until it is open again, there are no events.
    fn on_connection_lost(&self, dsn: &str, why: &str);
    /// Handles a connection that is open again.
    fn on_reconnected(&self, dsn: &str, connect: &Connect);
}

/// The connection that brings the events. It is opened again when it is lost.
pub struct EventConnection {
    pub dsn: String,
    pub pool: Arc<Pool>,
    state: Mutex<EventState>,
    changed: Condvar,
}

pub struct EventState {
    pub connection: ConnectionState,
    /// The number of the newest connection.
    pub number: u64,
    pub listener: Option<Arc<dyn Listener>>,
    /// The time of the last loss; none if the connection has never been open.
    pub lost_at: Option<Instant>,
    /// True if the first attempt to open the connection has failed.
    pub was_unreachable: bool,
    /// A lost connection. The reconnect thread drops it: the event thread must not, because libvirt still
    /// uses the connection there.
    pub dead: Option<MonitoredConnection>,
    /// The number of attempts to connect that are under way.
    pub attempts: usize,
    /// The number of attempts that have ended.
    pub ended_attempts: u64,
}

pub enum ConnectionState {
    Open(MonitoredConnection),
    /// Lost, for this reason.
    Lost(String),
    Closed,
}

impl EventConnection {
    pub fn new(dsn: &str) -> Arc<Self> {
        let state = EventState {
            connection: ConnectionState::Lost("it has never been open".to_owned()),
            number: 0,
            listener: None,
            lost_at: None,
            was_unreachable: false,
            dead: None,
            attempts: 0,
            ended_attempts: 0,
        };
        Arc::new(EventConnection {
            dsn: dsn.to_owned(),
            pool: Arc::new(Pool::new(dsn)),
            state: Mutex::new(state),
            changed: Condvar::new(),
        })
    }

    /// Opens the connection.
    ///
    /// # Errors
    /// libvirt cannot be reached; the connection was closed for good.
    pub fn connect(self: &Arc<Self>) -> Result<()> {
        let number = self.lock().number + 1;
        let monitored = self.open_monitored(number)?;
        let connect = monitored.connect().clone();
        let mut state = self.lock();
        if matches!(state.connection, ConnectionState::Closed) {
            drop(state);
            return Err(shut_down());
        }
        state.number = number;
        let before = std::mem::replace(&mut state.connection, ConnectionState::Open(monitored));
        drop(state);
        drop(before);
        self.notify();
        // The handler ignores the end of a connection whose number is not stored yet.
        if !connect.is_alive().unwrap_or(true) {
            self.mark_lost(number, "libvirtd ended at once");
        }
        Ok(())
    }

    fn open_monitored(self: &Arc<Self>, number: u64) -> Result<MonitoredConnection> {
        events::start_loop()?;
        let connect = pool::open(&self.dsn).map_err(|failed| failed.error)?;
        let handler = ConnectionHandler { connection: Arc::downgrade(self), number };
        MonitoredConnection::new(connect, Arc::new(handler))
    }

    /// Records that the connection of that number is lost.
    pub fn mark_lost(&self, number: u64, why: &str) {
        let mut state = self.lock();
        if state.number != number || !matches!(state.connection, ConnectionState::Open(_)) {
            return;
        }
        let open = std::mem::replace(&mut state.connection, ConnectionState::Lost(why.to_owned()));
        state.lost_at = Some(Instant::now());
        if let ConnectionState::Open(monitored) = open {
            state.dead = Some(monitored);
        }
        drop(state);
        self.notify();
    }

    /// Records why the connection could not be opened for the first time.
    pub fn mark_unreachable(&self, why: &str) {
        let mut state = self.lock();
        state.was_unreachable = true;
        if let ConnectionState::Lost(reason) = &mut state.connection {
            why.clone_into(reason);
        }
    }

    pub fn is_open(&self) -> bool {
        matches!(self.lock().connection, ConnectionState::Open(_))
    }

    /// Waits until the connection is closed for good, at most for `limit`; returns whether it is.
    pub fn is_closed_within(&self, limit: Duration) -> bool {
        let is_open = |state: &EventState| !matches!(state.connection, ConnectionState::Closed);
        let state = self.wait_while(Deadline::after(limit), is_open);
        matches!(state.connection, ConnectionState::Closed)
    }

    /// Waits while the condition is true, at most until the deadline.
    pub fn wait_while(
        &self,
        deadline: Deadline,
        condition: impl Fn(&EventState) -> bool,
    ) -> MutexGuard<'_, EventState> {
        sync::wait_while(&self.changed, self.lock(), deadline, |state| condition(state))
    }

    /// Waits until the connection is not open.
    pub fn wait_until_not_open(&self) -> MutexGuard<'_, EventState> {
        let open = |state: &mut EventState| matches!(state.connection, ConnectionState::Open(_));
        self.changed.wait_while(self.lock(), open).unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes all threads that wait for a change of the state.
    pub fn notify(&self) {
        self.changed.notify_all();
    }

    pub fn lock(&self) -> MutexGuard<'_, EventState> {
        sync::lock(&self.state)
    }
}

/// The error of a call after the connection was closed.
pub fn shut_down() -> Error {
    Error::failed("the machinery has been shut down")
}

/// Handles the events of the connection of that number.
struct ConnectionHandler {
    connection: Weak<EventConnection>,
    number: u64,
}

impl EventHandler for ConnectionHandler {
    fn on_event(&self, label: &str, event: Event) {
        let Some(connection) = self.connection.upgrade() else { return };
        let listener = connection.lock().listener.clone();
        if let Some(listener) = listener {
            listener.on_event(&connection.dsn, label, event);
        }
    }

    fn on_close(&self, why: &str) {
        if let Some(connection) = self.connection.upgrade() {
            connection.mark_lost(self.number, why);
        }
    }
}
