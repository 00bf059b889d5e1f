//! Connections for calls to libvirt. Each connection carries one call at a time.
//!
//! A call takes an idle connection, or opens one. A call that succeeds returns its connection to the pool.
//! Idle connections belong to one number of the event connection: those of an older number are dropped.

use std::sync::{Mutex, MutexGuard};

use machinery::{Error, Result};
use machinery_backend::sync::lock;
use virt::connect::Connect;

use crate::dsn::is_local;
use crate::errors::{connection_error, is_connection_error, is_gone};

/// The seconds between two keepalive requests, and the number of requests that may stay unanswered.
const KEEPALIVE: (i32, u32) = if cfg!(test) { (1, 1) } else { (5, 4) };
/// The maximum number of idle connections that are kept for the next calls.
const MAX_IDLE: usize = 8;

/// Connections for calls.
pub struct Pool {
    dsn: String,
    idle: Mutex<Idle>,
}

#[derive(Default)]
struct Idle {
    /// The number of the event connection that was open when these connections were.
    number: u64,
    connections: Vec<Connect>,
}

/// The reason why a connection could not be opened.
pub struct OpenFailure {
    pub error: Error,
    /// True if libvirtd has ended.
    pub is_gone: bool,
}

impl Pool {
    pub fn new(dsn: &str) -> Self {
        Pool { dsn: dsn.to_owned(), idle: Mutex::default() }
    }

    /// Returns an idle connection, or else a new one. The call hangs if libvirtd does.
    pub fn connection(&self, number: u64) -> Result<Connect, OpenFailure> {
        while let Some(connect) = self.take(number) {
            if connect.is_alive().unwrap_or(true) {
                return Ok(connect);
            }
        }
        open(&self.dsn)
    }

    fn take(&self, number: u64) -> Option<Connect> {
        let mut idle = self.lock();
        if idle.number == number { idle.connections.pop() } else { None }
    }

    /// Keeps a connection for the next call. Call this only after a call that succeeded: after an error,
    /// requests may still be under way on the connection.
    pub fn give_back(&self, number: u64, connect: Connect) {
        let mut idle = self.lock();
        let outdated = if idle.number < number {
            std::mem::replace(&mut *idle, Idle { number, connections: Vec::new() }).connections
        } else {
            Vec::new()
        };
        if idle.number == number && idle.connections.len() < MAX_IDLE {
            idle.connections.push(connect);
        }
        drop(idle);
        drop(outdated);
    }

    /// Closes the idle connections.
    pub fn clear(&self) {
        let idle = std::mem::take(&mut self.lock().connections);
        drop(idle);
    }

    fn lock(&self) -> MutexGuard<'_, Idle> {
        lock(&self.idle)
    }
}

/// Opens a connection. Over a network a single attempt can fail: an SSH server refuses some of many
/// simultaneous sessions. Such a failure says nothing about the connections that are open.
pub fn open(dsn: &str) -> Result<Connect, OpenFailure> {
    let connect = Connect::open(Some(dsn)).map_err(|error| OpenFailure {
        is_gone: is_local(dsn) && is_gone(&error),
        error: connection_error(dsn, &error),
    })?;
    if let Err(error) = connect.set_keep_alive(KEEPALIVE.0, KEEPALIVE.1) {
        // Drivers inside this process have no daemon to check.
        tracing::debug!(%error, "no keepalive");
    }
    Ok(connect)
}

/// Reports whether libvirtd answers on the connection. The call hangs if libvirtd does.
pub fn answers(connect: &Connect) -> bool {
    connect.lib_version().map_or_else(|error| !is_connection_error(&error), |_| true)
}
