//! The connection to libvirt, which survives a restart of libvirtd.
//!
//! ```text
//!            libvirtd ends, keepalive fails
//!      open ────────────────────────────────▶ lost: the listener is informed
//!       ▲  │                                   │
//!       │  └── close ──▶ closed ◀── close ─────┤
//!       └── reconnected: the listener queries ─┘
//!           the domains' states
//! ```
//!
//! One connection brings the events of all domains ([`event_connection`]). Calls use other connections, from
//! a [`Pool`], each for one call at a time. There are two reasons:
//!
//! - libvirtd stops reading from a connection with five requests under way (`max_client_requests` in its
//!   libvirtd.conf), including keepalive.
//! - libvirt's client fails if two calls wait on one connection that keepalive finds dead. The second call
//!   then waits for ever, and the end of the connection is not reported. The client crashes when libvirtd
//!   goes on. Seen with libvirt 9.0.
//!
//! A call that finds the connection lost waits for the reconnect thread ([`reconnect`]). A restart of
//! libvirtd takes a second, and so fails no analysis.

mod event_connection;
mod pool;
mod reconnect;

pub use event_connection::Listener;

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use machinery::{Deadline, Error, Result};
use machinery_backend::sync::lock;
use virt::connect::Connect;

use crate::call::{Call, Calls};
use event_connection::{ConnectionState, EventConnection, shut_down};
use pool::{Pool, answers};

/// The time since the loss for which actions wait for a libvirtd that is away.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The time that an action waits for a libvirtd that has been away for longer. It may be back, and the next attempt to
/// connect notices that.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);
/// The time that libvirtd has to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// The connections of one dsn.
pub struct Connection {
    events: Arc<EventConnection>,
    pool: Arc<Pool>,
    calls: Calls,
    /// Disconnected when the reconnect thread has ended.
    reconnect_thread: Mutex<Option<Receiver<()>>>,
}

/// The outcome of an attempt to ask libvirt.
enum Asked<T, W> {
    Answered(T),
    /// The connection failed before the work began.
    NotAsked {
        work: W,
        libvirtd_ended: bool,
    },
}

impl Connection {
    /// Makes a connection that is not open yet.
    pub fn new(dsn: &str) -> Arc<Connection> {
        let events = EventConnection::new(dsn);
        let (pool, calls, reconnect_thread) = (Arc::clone(&events.pool), Calls::default(), Mutex::new(None));
        Arc::new(Connection { events, pool, calls, reconnect_thread })
    }

    /// Connects for the first time.
    ///
    /// # Errors
    /// libvirt cannot be reached, or refuses this user.
    pub fn open(&self, deadline: Deadline) -> Result<()> {
        let opening = Arc::clone(&self.events);
        let waiting_for = format!("a connection to libvirt at {}", self.dsn());
        let opened = self.calls.call_with_timeout(deadline, &waiting_for, move || opening.connect());
        opened.inspect_err(|error| self.events.mark_unreachable(error.reason()))
    }

    /// Subscribes `listener` to the events, and keeps the connection open: opens it if it is lost.
    ///
    /// # Errors
    /// The system cannot start another thread.
    pub fn listen(&self, listener: Arc<dyn Listener>) -> Result<()> {
        self.events.lock().listener = Some(listener);
        let thread_ends = reconnect::start(&self.events)?;
        *lock(&self.reconnect_thread) = Some(thread_ends);
        Ok(())
    }

    /// Reports whether there is a listener.
    pub fn is_listened_to(&self) -> bool {
        lock(&self.reconnect_thread).is_some()
    }

    /// Reports whether the connection is open, as far as is known.
    pub fn is_open(&self) -> bool {
        self.events.is_open()
    }

    /// Reports whether libvirt could not be reached when the machinery was loaded.
    pub fn was_unreachable(&self) -> bool {
        self.events.lock().was_unreachable
    }

    /// Returns the calls to this libvirtd.
    pub fn calls(&self) -> &Calls {
        &self.calls
    }

    /// Returns the dsn.
    pub fn dsn(&self) -> &str {
        &self.events.dsn
    }

    /// Asks libvirt; `waiting_for` names the answer in the error of a timeout. If libvirtd has just ended, which
    /// the event loop may not have noticed yet, the call waits for the next libvirtd.
    ///
    /// # Errors
    /// There is no connection; the work fails; the deadline passes.
    pub fn ask<T, W>(&self, deadline: Deadline, waiting_for: &str, mut work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(&Connect) -> Result<T> + Send + 'static,
    {
        loop {
            let number = self.wait_for_open(deadline)?;
            let pool = Arc::clone(&self.pool);
            let asked = self.calls.call_with_timeout(deadline, waiting_for, move || {
                let connect = match pool.connection(number) {
                    Ok(connect) => connect,
                    Err(failure) if failure.is_gone => {
                        return Ok(Asked::NotAsked { work, libvirtd_ended: true });
                    }
                    Err(failure) => return Err(failure.error),
                };
                if !answers(&connect) {
                    return Ok(Asked::NotAsked { work, libvirtd_ended: false });
                }
                let answer = work(&connect)?;
                pool.give_back(number, connect);
                Ok(Asked::Answered(answer))
            })?;
            match asked {
                Asked::Answered(answer) => return Ok(answer),
                Asked::NotAsked { work: unasked, libvirtd_ended } => {
                    work = unasked;
                    if libvirtd_ended {
                        self.events.mark_lost(number, "libvirtd has ended");
                    }
                }
            }
        }
    }

    /// Returns the number of the event connection. Waits for the connection if it is lost at present.
    ///
    /// # Errors
    /// The connection does not come back in time.
    fn wait_for_open(&self, deadline: Deadline) -> Result<u64> {
        deadline.check("the connection to libvirt")?;
        // A libvirt that has never been there may never come.
        let patience = self.events.lock().lost_at.map_or(Duration::ZERO, |lost_at| {
            RECONNECT_TIMEOUT.saturating_sub(lost_at.elapsed()).max(ATTEMPT_TIMEOUT)
        });
        let timeout = deadline.within(patience);
        let is_lost = |connection: &ConnectionState| matches!(connection, ConnectionState::Lost(_));
        let state = self.events.wait_while(timeout, |state| is_lost(&state.connection));
        match &state.connection {
            ConnectionState::Open(_) => Ok(state.number),
            ConnectionState::Closed => Err(shut_down()),
            ConnectionState::Lost(_) if deadline.passed() => {
                Err(deadline.timeout("the connection to libvirt"))
            }
            ConnectionState::Lost(why) => {
                let now = if state.attempts > 0 { "does not answer" } else { "does not come back" };
                let reason = format!("the connection to libvirt at {} is lost and {now}: {why}", self.dsn());
                Err(Error::environment(reason).advice(
                    "Start libvirtd (systemctl start libvirtd), or restart it if it hangs. Then start the machine again",
                ))
            }
        }
    }

    /// Closes the connection for good. Once the reconnect thread has ended, the listener gets no further events. A
    /// libvirtd that hangs may delay that, and is not waited for beyond the deadline.
    pub fn close(&self, deadline: Deadline) {
        let closed = std::mem::replace(&mut self.events.lock().connection, ConnectionState::Closed);
        self.events.notify();
        let thread = lock(&self.reconnect_thread).take();
        let ended = thread.is_none_or(|ends| {
            ends.recv_timeout(deadline.remaining()) == Err(RecvTimeoutError::Disconnected)
        });
        let (dead, listener) = {
            let mut state = self.events.lock();
            (state.dead.take(), state.listener.take())
        };
        let pool = Arc::clone(&self.pool);
        let closing = self.calls.start(move || {
            drop((closed, dead, listener));
            pool.clear();
            Ok(())
        });
        let is_closed = closing.is_ok_and(|call| call.wait(deadline.remaining()).is_some());
        if !ended || !is_closed {
            tracing::warn!(dsn = self.dsn(), "libvirt does not close the connection in time");
        }
    }

    /// Starts a long call; `opened` gets the time that its connection took to open. The caller keeps the
    /// call, because a late result matters too.
    ///
    /// # Errors
    /// The event connection is lost. A failure to open the call's own connection is the call's error.
    pub fn long_call<T: Send + 'static>(
        &self,
        deadline: Deadline,
        opened: impl FnOnce(Duration) + Send + 'static,
        work: impl FnOnce(&Connect) -> Result<T> + Send + 'static,
    ) -> Result<Call<T>> {
        let number = self.wait_for_open(deadline)?;
        self.start_call(number, opened, work)
    }

    /// Starts a short call. The call gets the [`number`](Connection::number) of the event connection.
    ///
    /// # Errors
    /// As [`long_call`](Connection::long_call).
    pub fn short_call<T: Send + 'static>(
        &self,
        deadline: Deadline,
        work: impl FnOnce(&Connect, u64) -> Result<T> + Send + 'static,
    ) -> Result<Call<T>> {
        let number = self.wait_for_open(deadline)?;
        self.start_call(number, drop, move |connect| work(connect, number))
    }

    fn start_call<T: Send + 'static>(
        &self,
        number: u64,
        opened: impl FnOnce(Duration) + Send + 'static,
        work: impl FnOnce(&Connect) -> Result<T> + Send + 'static,
    ) -> Result<Call<T>> {
        let pool = Arc::clone(&self.pool);
        self.calls.start(move || {
            let begun = Instant::now();
            let connect = pool.connection(number).map_err(|failure| failure.error)?;
            opened(begun.elapsed());
            let done = work(&connect)?;
            pool.give_back(number, connect);
            Ok(done)
        })
    }

    /// Reports whether libvirtd is away now, noticed or not. A call would have to wait for it.
    pub fn is_away(&self) -> bool {
        let number = {
            let state = self.events.lock();
            match state.connection {
                ConnectionState::Open(_) => state.number,
                ConnectionState::Lost(_) => return true,
                ConnectionState::Closed => return false,
            }
        };
        let call = self.start_call(number, drop, |connect| Ok(answers(connect)));
        let answer = call.map(|call| call.wait(ANSWER_TIMEOUT));
        !matches!(answer, Ok(Some(Ok(true))))
    }

    /// Returns the number of the event connection. While the number stays the same, no event was missed.
    pub fn number(&self) -> u64 {
        self.events.lock().number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::MAX_ABANDONED;
    use crate::errors::explain;
    use crate::events::Event;
    use machinery_testkit::libvirt::Libvirtd;
    use rustix::process::Signal;
    use std::fs;

    struct NullListener;

    impl Listener for NullListener {
        fn on_event(&self, _: &str, _: &str, _: Event) {}
        fn on_connection_lost(&self, _: &str, _: &str) {}
        fn on_reconnected(&self, _: &str, _: &Connect) {}
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(60))
    }

    /// Returns the numbers of threads and open files of this process.
    fn resources() -> (usize, usize) {
        let count = |folder| fs::read_dir(folder).unwrap().count();
        (count("/proc/self/task"), count("/proc/self/fd"))
    }

    fn version(connection: &Connection) -> Result<u32> {
        connection.ask(soon(), "a version", |connect| {
            connect.lib_version().map_err(|error| explain("answer", &error))
        })
    }

    #[test]
    fn connection_holds_no_more_threads_and_files_when_libvirtd_hangs_longer() {
        let folder = tempfile::tempdir().unwrap();
        let libvirtd = Libvirtd::start(folder.path()).unwrap();
        let connection = Connection::new(&libvirtd.dsn());
        connection.open(soon()).unwrap();
        connection.listen(Arc::new(NullListener)).unwrap();
        version(&connection).unwrap();
        let (threads, files) = resources();
        libvirtd.signal_daemon(Signal::STOP).unwrap();
        // Requests without an answer, and calls that cannot connect, until keepalive finds the connection dead.
        let at_once = || Deadline::after(Duration::from_millis(1));
        for _ in 0..100 {
            let asked = connection.ask(at_once(), "nothing", |connect| Ok(answers(connect)));
            assert!(asked.is_err());
            // The call is abandoned at once.
            let _ = connection.long_call(at_once(), |_| (), |_| Ok(()));
        }
        let most = usize::try_from(MAX_ABANDONED).unwrap() + 2;
        assert!(resources().0 <= threads + most, "{:?} after {threads}", resources());
        // Keepalive finds the connection and its calls dead.
        while connection.events.lock().attempts == 0 {
            let pause = Deadline::after(Duration::from_millis(20));
            drop(connection.events.wait_while(pause, |state| state.attempts == 0));
        }
        for _ in 0..100 {
            reconnect::attempt(&connection.events, Duration::from_millis(1));
        }
        assert_eq!(connection.events.lock().attempts, 1);
        let hanging = resources();
        assert!(hanging.0 <= threads + most && hanging.1 <= files + 4 * most, "{hanging:?}");
        libvirtd.signal_daemon(Signal::CONT).unwrap();
        version(&connection).unwrap();
        connection.close(soon());
    }
}
