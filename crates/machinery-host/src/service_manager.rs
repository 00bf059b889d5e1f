//! Notifications to the service manager, which has started the host. Source: sd_notify(3).
//!
//! ```text
//! loading: EXTEND_TIMEOUT_USEC, WATCHDOG=1, again and again ─▶ READY=1 ─▶ serving: WATCHDOG=1 ─┬─▶ STOPPING=1
//!    ▲                                                                                         │
//!    └─────────────────────────── the program is executed again ◀─ RELOADING=1 ◀───────────────┘
//! ```
//!
//! A host that loads has no runtime that could prove that it answers. Each step of loading has a limit of its own, so the
//! reports end after the sum of these limits. The timer of the watchdog goes on while the host executes its program again.
//!
//! Without a service manager, nothing is sent.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use machinery::{Error, Result};
use sd_notify::NotifyState;

/// The time that one report asks for. Source: `TimeoutStartSec` in systemd.service(5) is 90 seconds by default.
const EXTENSION: Duration = Duration::from_secs(60);
/// The maximum time between two reports while the host loads.
const LOADING_INTERVAL: Duration = Duration::from_secs(10);

/// The time that a service manager has to take a message. Its queue may be full, and nobody may read it any more.
const SEND_TIMEOUT: Duration = Duration::from_secs(2);

/// Sends these states as one message.
fn send(states: &[NotifyState<'_>]) {
    let Some(path) = env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else { return };
    let message: String = states.iter().map(|state| format!("{state}\n")).collect();
    if let Err(error) = send_to(path.as_bytes(), message.as_bytes()) {
        tracing::warn!(%error, "cannot notify systemd");
    }
}

fn send_to(path: &[u8], message: &[u8]) -> io::Result<()> {
    let address = match path.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(SEND_TIMEOUT))?;
    socket.send_to_addr(message, &address).map(drop)
}

/// Reports that the host serves, or serves again, and ends the reports that it loads.
pub fn report_ready(loading: Loading) {
    send(&[NotifyState::Ready]);
    drop(loading);
}

/// Reports that the host ends.
pub fn report_stopping() {
    send(&[NotifyState::Stopping]);
}

/// Reports that the host answers.
pub fn report_alive() {
    send(&[NotifyState::Watchdog]);
}

/// Reports that the host executes its program again, which reports that it is ready.
pub fn report_replacement() {
    match NotifyState::monotonic_usec_now() {
        // systemd expects the time since version 253.
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "cannot read the clock for systemd"),
    }
}

/// Returns the interval of the watchdog, if the service manager has one for this process.
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

/// Reports that the host loads, until it is dropped.
pub struct Loading(Arc<Done>);

#[derive(Default)]
struct Done {
    done: Mutex<bool>,
    changed: Condvar,
}

impl Loading {
    /// Starts the reports, which end after `limit` at the latest.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn begin(limit: Duration) -> Result<Loading> {
        let done = Arc::<Done>::default();
        let (shared, watchdog) = (Arc::clone(&done), watchdog_interval());
        thread::Builder::new()
            .name("loading".to_owned())
            .spawn(move || shared.report(limit, watchdog))
            .map_err(|error| Error::environment(format!("cannot start the host's threads: {error}")))?;
        Ok(Loading(done))
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        *self.0.done.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.changed.notify_all();
    }
}

impl Done {
    fn report(&self, limit: Duration, watchdog: Option<Duration>) {
        let interval = watchdog.map_or(LOADING_INTERVAL, |watchdog| LOADING_INTERVAL.min(watchdog / 2));
        let until = Instant::now() + limit;
        let mut done = false;
        while !done && Instant::now() < until {
            let extension = u32::try_from(EXTENSION.as_micros()).unwrap_or(u32::MAX);
            // Without the lock, because the message may have to wait.
            send(&[NotifyState::ExtendTimeoutUsec(extension)]);
            if watchdog.is_some() {
                report_alive();
            }
            let lock = self.done.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self.changed.wait_timeout_while(lock, interval, |done| !*done);
            done = *waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if !done {
            tracing::error!(limit = ?limit, "the host still loads: systemd gets no more reports");
        }
    }
}
