//! The reconnect thread: it opens the event connection again when it is lost.
//!
//! The thread sleeps while the connection is open. When it is lost, the thread tries to connect, with growing
//! pauses, because no event announces a new libvirtd.
//!
//! Each attempt to connect has a thread of its own, and a libvirtd or an ssh that hangs never ends that
//! thread. So the next attempt waits for the end of the one before. A local attempt ends with its libvirtd.
//! An attempt over a network may wait for a computer that was switched off meanwhile, so a few further
//! attempts are made later.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use machinery::{Deadline, Result};

use super::event_connection::{ConnectionState, EventConnection};
use super::pool;
use crate::call;
use crate::dsn::is_local;

/// The time to wait for an attempt to connect over a network before a second one is started.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(300);
/// The maximum number of attempts to connect over a network that are under way.
const MAX_REMOTE_ATTEMPTS: usize = 3;
/// A libvirtd that has just started opens its sockets before it has reconnected to the running domains, and
/// no event reports the end of that. A domain that is stopped meanwhile can stay locked, seen with libvirt
/// 11.3. So a new libvirtd gets this pause first.
const SETTLE_PAUSE: Duration = Duration::from_millis(500);
/// The first pause between two attempts. It doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// Starts the reconnect thread. The receiver is disconnected when the thread has ended.
///
/// # Errors
/// The system cannot start another thread.
pub fn start(connection: &Arc<EventConnection>) -> Result<Receiver<()>> {
    let connection = Arc::clone(connection);
    let (ends, thread_ends) = channel();
    let run = move || {
        reconnect_loop(&connection);
        drop(ends);
    };
    call::spawn("libvirt-reconnect", run)?;
    Ok(thread_ends)
}

/// Runs until the connection is closed for good.
fn reconnect_loop(connection: &Arc<EventConnection>) {
    loop {
        let mut state = connection.wait_until_not_open();
        let ConnectionState::Lost(why) = &state.connection else { return };
        let why = format!("the connection to libvirt at {} is lost: {why}", connection.dsn);
        let (dead, listener) = (state.dead.take(), state.listener.clone());
        // Not under the lock: dropping the connection calls libvirt.
        drop(state);
        drop(dead);
        tracing::warn!(dsn = connection.dsn, why, "libvirt is away");
        if let Some(listener) = &listener {
            listener.on_connection_lost(&connection.dsn, &why);
        }
        if !reconnect(connection) {
            return;
        }
        tracing::info!(dsn = connection.dsn, "libvirt is back");
        let connect = match &connection.lock().connection {
            ConnectionState::Open(monitored) => monitored.connect().clone(),
            _ => continue,
        };
        if let Some(listener) = &listener {
            listener.on_reconnected(&connection.dsn, &connect);
        }
    }
}

/// Tries until the connection is open; returns `false` if it was closed for good meanwhile.
fn reconnect(connection: &Arc<EventConnection>) -> bool {
    let mut pause = FIRST_PAUSE;
    loop {
        attempt(connection, ATTEMPT_TIMEOUT);
        if connection.is_open() {
            return true;
        }
        if connection.is_closed_within(pause) {
            return false;
        }
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// Starts an attempt to connect, unless enough are under way. Waits at most `limit` until an attempt has
/// ended.
pub fn attempt(connection: &Arc<EventConnection>, limit: Duration) {
    let ended = {
        let mut state = connection.lock();
        let max = if is_local(&connection.dsn) { 1 } else { MAX_REMOTE_ATTEMPTS };
        let ended = state.ended_attempts;
        if state.attempts < max {
            state.attempts += 1;
            drop(state);
            start_attempt(connection);
        }
        ended
    };
    drop(connection.wait_while(Deadline::after(limit), |state| {
        state.ended_attempts == ended && matches!(state.connection, ConnectionState::Lost(_))
    }));
}

fn start_attempt(connection: &Arc<EventConnection>) {
    let attempt = Attempt(Arc::clone(connection));
    let connect = move || {
        if let Err(error) = connect_when_ready(&attempt.0) {
            tracing::debug!(%error, "libvirt is still away");
        }
    };
    if let Err(error) = call::spawn("libvirt-connect", connect) {
        tracing::debug!(%error, "cannot start an attempt to connect to libvirt");
    }
}

/// Connects to libvirtd once it answers, after a pause in which it settles.
fn connect_when_ready(connection: &Arc<EventConnection>) -> Result<()> {
    connection.pool.clear();
    drop(pool::open(&connection.dsn).map_err(|failed| failed.error)?);
    if connection.is_closed_within(SETTLE_PAUSE) || connection.is_open() {
        return Ok(());
    }
    connection.connect()
}

/// An attempt to connect that is under way until this value is dropped.
struct Attempt(Arc<EventConnection>);

impl Drop for Attempt {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.attempts -= 1;
        state.ended_attempts += 1;
        drop(state);
        self.0.notify();
    }
}
