//! The connection to libvirt, which outlives libvirtd.
//!
//! ```text
//!            libvirtd ends, keepalive fails
//!      open ────────────────────────────────▶ lost
//!       ▲  │                                   │ the listener is told
//!       │  └── close ──▶ closed ◀── close ─────┤
//!       └──────── opened anew, the listener looks how things stand
//! ```
//!
//! One connection brings the events of all machines. Calls use other connections, from a [`Pool`], each for
//! one call at a time. There are two reasons. libvirtd stops reading from a connection with five requests
//! under way (`max_client_requests` in its libvirtd.conf), including keepalive. Also, libvirt's client fails
//! if two calls wait on one connection that keepalive finds dead. The second call then waits for ever, the
//! end of the connection is not reported, and the client crashes when libvirtd goes on; seen with libvirt
//! 9.0.
//!
//! The keeper, a thread, sleeps until the connection is lost; then it tries to open it anew, in growing
//! steps, for nothing tells when libvirtd is back. Who wants something of libvirt meanwhile waits for the
//! keeper, so that a restart of libvirtd, which takes a second, costs no analysis.
//!
//! Each attempt to connect has a thread of its own, and a libvirtd or an ssh that hangs never ends it. So the
//! next attempt waits for the end of the one before. A local attempt ends with its libvirtd. An attempt over
//! a network may wait for a computer that has been switched off meanwhile, so a few further attempts are made
//! later.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use machinery::{Deadline, Error, Result};
use virt::connect::Connect;

use crate::call::{self, Call};
use crate::dsn::is_local;
use crate::errors::{connection_error, is_connection_error, is_gone};
use crate::events::{self, Event, EventHandler, MonitoredConnection};

/// Seconds between two questions whether libvirtd is alive, and how many may go unanswered.
const KEEPALIVE: (i32, u32) = if cfg!(test) { (1, 1) } else { (5, 4) };
/// How long an action waits for a libvirtd that is gone.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// The time that libvirtd has to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The time to wait for an attempt to connect over a network before a second one is started.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(300);
/// The maximum number of idle connections that are kept for the next calls.
const MAX_IDLE: usize = 8;
/// The maximum number of attempts to connect over a network that are under way.
const MAX_REMOTE_ATTEMPTS: usize = 3;
/// A libvirtd that has just started takes over the domains that run, after its sockets are there, and
/// nothing tells when it is done. A domain that is stopped in the middle of that can stay locked, as
/// was seen with libvirt 11.3. So a new libvirtd is given this time first.
const SETTLE_PAUSE: Duration = Duration::from_millis(500);
/// The pauses between two tries to connect grow from this …
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// … to this.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// Who is told what happens.
pub trait Listener: Send + Sync + 'static {
    /// Something happened to the domain of that name.
    fn on_event(&self, label: &str, event: Event);
    /// The connection is lost; what happens from now on is not heard.
    fn on_connection_lost(&self, why: &str);
    /// It is there again.
    fn on_reconnected(&self, connect: &Connect);
}

/// The connection of one dsn.
pub struct Link {
    dsn: String,
    pool: Arc<Pool>,
    now: Mutex<LinkState>,
    changed: Condvar,
    /// Ends when the keeper does.
    reconnect_thread: Mutex<Option<Receiver<()>>>,
}

struct LinkState {
    connection: Connection,
    /// Numbers the connections, so that the end of an old one is not taken for that of a new one.
    number: u64,
    listener: Option<Arc<dyn Listener>>,
    /// Let go by the keeper: not in the event thread, where libvirt is about to use it.
    dead: Option<MonitoredConnection>,
    /// The number of attempts to connect that are under way.
    attempts: usize,
    /// The number of attempts that have ended.
    ended_attempts: u64,
}

enum Connection {
    Open(MonitoredConnection),
    Lost(String),
    Closed,
}

impl Link {
    /// Connects for the first time.
    ///
    /// # Errors
    /// It cannot be reached, or may not.
    pub fn open(dsn: &str, deadline: Deadline) -> Result<Arc<Link>> {
        let now = LinkState {
            connection: Connection::Lost("it was never there".to_owned()),
            number: 0,
            listener: None,
            dead: None,
            attempts: 0,
            ended_attempts: 0,
        };
        let link = Arc::new(Link {
            dsn: dsn.to_owned(),
            pool: Arc::new(Pool::new(dsn)),
            now: Mutex::new(now),
            changed: Condvar::new(),
            reconnect_thread: Mutex::new(None),
        });
        let opening = Arc::clone(&link);
        call::within(deadline, &format!("a connection to libvirt at {dsn}"), move || opening.connect())?;
        Ok(link)
    }

    /// Tells `listener` from now on, and keeps the connection.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn listen(self: &Arc<Self>, listener: Arc<dyn Listener>) -> Result<()> {
        self.lock().listener = Some(listener);
        let link = Arc::clone(self);
        let (ends, keeper_ends) = channel();
        let reconnect_loop = move || {
            link.reconnect_loop();
            drop(ends);
        };
        call::spawn("libvirt-keeper", reconnect_loop)?;
        *self.reconnect_thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(keeper_ends);
        Ok(())
    }

    /// Where it leads.
    pub fn dsn(&self) -> &str {
        &self.dsn
    }

    /// Asks something of libvirt; `waiting_for` says what is waited for. A libvirtd that has just ended,
    /// which the event loop may not have noticed yet, is asked when it is back.
    ///
    /// # Errors
    /// There is no connection; the work's own; the deadline passes.
    pub fn ask<T, W>(&self, deadline: Deadline, waiting_for: &str, mut work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce(&Connect) -> Result<T> + Send + 'static,
    {
        loop {
            let number = self.wait_for_open(deadline)?;
            let pool = Arc::clone(&self.pool);
            let asked = call::within(deadline, waiting_for, move || {
                let connect = match pool.connection(number) {
                    Ok(connect) => connect,
                    Err(error) if error.is_gone => return Ok(Err((work, true))),
                    Err(error) => return Err(error.error),
                };
                if !exists(&connect) {
                    return Ok(Err((work, false)));
                }
                let told = work(&connect)?;
                pool.give_back(number, connect);
                Ok(Ok(told))
            })?;
            match asked {
                Ok(told) => return Ok(told),
                Err((unasked, is_gone)) => {
                    work = unasked;
                    if is_gone {
                        self.lost(number, "libvirtd has ended");
                    }
                }
            }
        }
    }

    /// Returns the number of the connection; waits for the connection if it is lost at present.
    ///
    /// # Errors
    /// The connection does not come back in time.
    fn wait_for_open(&self, deadline: Deadline) -> Result<u64> {
        deadline.check("the connection to libvirt")?;
        let patience = deadline.within(RECONNECT_TIMEOUT).remaining();
        let lost = |now: &mut LinkState| matches!(now.connection, Connection::Lost(_));
        let waited = self.changed.wait_timeout_while(self.lock(), patience, lost);
        let (now, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &now.connection {
            Connection::Open(_) => Ok(now.number),
            Connection::Closed => Err(shut_down()),
            Connection::Lost(_) if deadline.passed() => Err(deadline.timeout("the connection to libvirt")),
            Connection::Lost(why) => {
                let now = if now.attempts > 0 { "does not answer" } else { "does not come back" };
                let reason = format!("the connection to libvirt at {} is lost and {now}: {why}", self.dsn);
                Err(Error::environment(reason).advice(
                    "Start libvirtd (systemctl start libvirtd), or restart it if it hangs. Then start the machine anew",
                ))
            }
        }
    }

    /// Closes it for good. Once the keeper has ended nobody is told anything any more; a libvirtd that
    /// hangs may hold it up, and is not waited for beyond the deadline.
    pub fn close(&self, deadline: Deadline) {
        let closed = std::mem::replace(&mut self.lock().connection, Connection::Closed);
        self.changed.notify_all();
        let reconnect_thread = self.reconnect_thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ended = reconnect_thread.is_none_or(|ends| {
            ends.recv_timeout(deadline.remaining()) == Err(RecvTimeoutError::Disconnected)
        });
        let (dead, listener) = {
            let mut now = self.lock();
            (now.dead.take(), now.listener.take())
        };
        let pool = Arc::clone(&self.pool);
        let letting_go = Call::start(move || {
            drop((closed, dead, listener));
            pool.clear();
            Ok(())
        });
        let gone = letting_go.is_ok_and(|call| call.wait(deadline.remaining()).is_some());
        if !ended || !gone {
            tracing::warn!(dsn = self.dsn, "libvirt does not let go of the connection in time");
        }
    }

    /// Starts a long call; `opened` gets the time that its connection took to open. The caller keeps the
    /// call, because a late result matters too.
    ///
    /// # Errors
    /// The connection for events is lost. A failure to open the call's own connection is the call's error.
    pub fn long_call<T: Send + 'static>(
        &self,
        deadline: Deadline,
        opened: impl FnOnce(Duration) + Send + 'static,
        work: impl FnOnce(&Connect) -> Result<T> + Send + 'static,
    ) -> Result<Call<T>> {
        let number = self.wait_for_open(deadline)?;
        self.start_call(number, opened, work)
    }

    /// Starts a short call. The call gets the [`number`](Link::number) of the connection that brings the
    /// events.
    ///
    /// # Errors
    /// As [`long_call`](Link::long_call).
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
        Call::start(move || {
            let begun = Instant::now();
            let connect = pool.connection(number).map_err(|failed| failed.error)?;
            opened(begun.elapsed());
            let done = work(&connect)?;
            pool.give_back(number, connect);
            Ok(done)
        })
    }

    /// Whether libvirtd is away just now, be that noticed yet or not; who wants something has to wait then.
    pub fn is_away(&self) -> bool {
        let number = {
            let now = self.lock();
            match now.connection {
                Connection::Open(_) => now.number,
                Connection::Lost(_) => return true,
                Connection::Closed => return false,
            }
        };
        let answers = self.start_call(number, drop, |connect| Ok(exists(connect)));
        let answer = answers.map(|call| call.wait(ANSWER_TIMEOUT));
        !matches!(answer, Ok(Some(Ok(true))))
    }

    /// The number of the connection that tells what happens. While it stays the same, everything was heard.
    pub fn number(&self) -> u64 {
        self.lock().number
    }

    /// Opens the connection.
    fn connect(self: &Arc<Self>) -> Result<()> {
        let number = self.lock().number + 1;
        let monitored = self.open_monitored(number)?;
        let connect = monitored.connect().clone();
        let mut now = self.lock();
        if matches!(now.connection, Connection::Closed) {
            drop(now);
            return Err(shut_down());
        }
        now.number = number;
        let before = std::mem::replace(&mut now.connection, Connection::Open(monitored));
        drop(now);
        drop(before);
        self.changed.notify_all();
        // One that ended before it was known here was not noticed by its number.
        if !connect.is_alive().unwrap_or(true) {
            self.lost(number, "libvirtd ended at once");
        }
        Ok(())
    }

    fn open_monitored(self: &Arc<Self>, number: u64) -> Result<MonitoredConnection> {
        events::start_loop()?;
        let connect = open(&self.dsn).map_err(|failed| failed.error)?;
        MonitoredConnection::new(connect, Arc::new(ConnectionHandler { link: Arc::downgrade(self), number }))
    }

    /// The keeper's work.
    fn reconnect_loop(self: Arc<Self>) {
        loop {
            let open = |now: &mut LinkState| matches!(now.connection, Connection::Open(_));
            let mut now = self.changed.wait_while(self.lock(), open).unwrap_or_else(PoisonError::into_inner);
            let Connection::Lost(why) = &now.connection else { return };
            let why = format!("the connection to libvirt at {} is lost: {why}", self.dsn);
            let (dead, listener) = (now.dead.take(), now.listener.clone());
            // Not under the lock: letting go of it calls libvirt.
            drop(now);
            drop(dead);
            tracing::warn!(dsn = self.dsn, why, "libvirt is away");
            if let Some(listener) = &listener {
                listener.on_connection_lost(&why);
            }
            if !self.reopen() {
                return;
            }
            tracing::info!(dsn = self.dsn, "libvirt is back");
            let connect = match &self.lock().connection {
                Connection::Open(monitored) => monitored.connect().clone(),
                _ => continue,
            };
            if let Some(listener) = &listener {
                listener.on_reconnected(&connect);
            }
        }
    }

    /// Tries until it is open; `false` if it was closed meanwhile.
    fn reopen(self: &Arc<Self>) -> bool {
        let mut pause = FIRST_PAUSE;
        loop {
            self.attempt(ATTEMPT_TIMEOUT);
            if matches!(self.lock().connection, Connection::Open(_)) {
                return true;
            }
            if self.closed_within(pause) {
                return false;
            }
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    /// Starts an attempt to connect, unless enough are under way. Waits at most `limit` until an attempt has
    /// ended.
    fn attempt(self: &Arc<Self>, limit: Duration) {
        let ended = {
            let mut now = self.lock();
            let enough = if is_local(&self.dsn) { 1 } else { MAX_REMOTE_ATTEMPTS };
            let ended = now.ended_attempts;
            if now.attempts < enough {
                now.attempts += 1;
                drop(now);
                self.start_attempt();
            }
            ended
        };
        let pending = |now: &mut LinkState| {
            now.ended_attempts == ended && matches!(now.connection, Connection::Lost(_))
        };
        let waited = self.changed.wait_timeout_while(self.lock(), limit, pending);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn start_attempt(self: &Arc<Self>) {
        let attempt = Attempt(Arc::clone(self));
        let connect = move || {
            if let Err(error) = attempt.0.connect_when_ready() {
                tracing::debug!(%error, "libvirt is still away");
            }
        };
        if let Err(error) = call::spawn("libvirt-connect", connect) {
            tracing::debug!(%error, "no try to connect to libvirt");
        }
    }

    /// Connects to libvirtd once it answers, after a pause in which it settles.
    fn connect_when_ready(self: &Arc<Self>) -> Result<()> {
        self.pool.clear();
        drop(open(&self.dsn).map_err(|failed| failed.error)?);
        if self.closed_within(SETTLE_PAUSE) || matches!(self.lock().connection, Connection::Open(_)) {
            return Ok(());
        }
        self.connect()
    }

    /// Waits, unless it is closed for good before that.
    fn closed_within(&self, time: Duration) -> bool {
        let still = |now: &mut LinkState| !matches!(now.connection, Connection::Closed);
        let waited = self.changed.wait_timeout_while(self.lock(), time, still);
        let (now, _) = waited.unwrap_or_else(PoisonError::into_inner);
        matches!(now.connection, Connection::Closed)
    }

    fn lost(&self, number: u64, why: &str) {
        let mut now = self.lock();
        if now.number != number || !matches!(now.connection, Connection::Open(_)) {
            return;
        }
        let open = std::mem::replace(&mut now.connection, Connection::Lost(why.to_owned()));
        if let Connection::Open(monitored) = open {
            now.dead = Some(monitored);
        }
        drop(now);
        self.changed.notify_all();
    }

    /// Each statement that holds the lock leaves it whole, so poison means nothing.
    fn lock(&self) -> MutexGuard<'_, LinkState> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An attempt to connect that is under way until this value is dropped.
struct Attempt(Arc<Link>);

impl Drop for Attempt {
    fn drop(&mut self) {
        let mut now = self.0.lock();
        now.attempts -= 1;
        now.ended_attempts += 1;
        drop(now);
        self.0.changed.notify_all();
    }
}

/// Whether somebody is at the other end; a hung libvirtd lets this hang.
fn exists(connect: &Connect) -> bool {
    connect.lib_version().map_or_else(|error| !is_connection_error(&error), |_| true)
}

/// Connections for calls. Each connection has one call at a time.
struct Pool {
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
struct OpenFailure {
    error: Error,
    /// Whether libvirtd has ended.
    is_gone: bool,
}

impl Pool {
    fn new(dsn: &str) -> Self {
        Pool { dsn: dsn.to_owned(), idle: Mutex::default() }
    }

    /// Returns an idle connection, or else a new one. The call hangs if libvirtd does.
    fn connection(&self, number: u64) -> Result<Connect, OpenFailure> {
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
    fn give_back(&self, number: u64, connect: Connect) {
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

    fn clear(&self) {
        let idle = std::mem::take(&mut self.lock().connections);
        drop(idle);
    }

    /// Each statement that holds the lock leaves the value whole, so poison means nothing.
    fn lock(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Over a network an attempt can fail for itself: an SSH server refuses some of many sessions at once. That says
/// nothing of the connections that are open.
fn open(dsn: &str) -> Result<Connect, OpenFailure> {
    let connect = Connect::open(Some(dsn)).map_err(|error| OpenFailure {
        is_gone: is_local(dsn) && is_gone(&error),
        error: connection_error(dsn, &error),
    })?;
    if let Err(error) = connect.set_keep_alive(KEEPALIVE.0, KEEPALIVE.1) {
        // Drivers inside this process have nobody to ask.
        tracing::debug!(%error, "no keepalive");
    }
    Ok(connect)
}

fn shut_down() -> Error {
    Error::failed("the machinery has been shut down")
}

/// The ears of one connection.
struct ConnectionHandler {
    link: Weak<Link>,
    number: u64,
}

impl EventHandler for ConnectionHandler {
    fn on_event(&self, label: &str, event: Event) {
        let Some(link) = self.link.upgrade() else { return };
        let listener = link.lock().listener.clone();
        if let Some(listener) = listener {
            listener.on_event(label, event);
        }
    }

    fn on_close(&self, why: &str) {
        if let Some(link) = self.link.upgrade() {
            link.lost(self.number, why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::errors::explain;
    use machinery_testkit::libvirt::Libvirtd;
    use rustix::process::Signal;
    use std::fs;

    struct NullListener;

    impl Listener for NullListener {
        fn on_event(&self, _: &str, _: Event) {}
        fn on_connection_lost(&self, _: &str) {}
        fn on_reconnected(&self, _: &Connect) {}
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(60))
    }

    /// Returns the numbers of threads and open files of this process.
    fn held() -> (usize, usize) {
        let count = |folder| fs::read_dir(folder).unwrap().count();
        (count("/proc/self/task"), count("/proc/self/fd"))
    }

    fn version(link: &Link) -> Result<u32> {
        link.ask(soon(), "a version", |connect| {
            connect.lib_version().map_err(|error| explain("answer", &error))
        })
    }

    #[test]
    fn link_holds_no_more_threads_and_files_when_libvirtd_hangs_longer() {
        let folder = tempfile::tempdir().unwrap();
        let libvirtd = Libvirtd::start(folder.path()).unwrap();
        let link = Link::open(&libvirtd.dsn(), soon()).unwrap();
        link.listen(Arc::new(NullListener)).unwrap();
        version(&link).unwrap();
        let (threads, files) = held();
        libvirtd.signal_daemon(Signal::STOP).unwrap();
        // Makes requests without an answer, and calls that cannot connect, until keepalive finds the link
        // dead.
        let at_once = || Deadline::after(Duration::from_millis(1));
        for _ in 0..100 {
            let asked = link.ask(at_once(), "nothing", |connect| Ok(exists(connect)));
            assert!(asked.is_err());
            // The call is abandoned at once.
            let _ = link.long_call(at_once(), |_| (), |_| Ok(()));
        }
        let most = usize::try_from(call::MAX_ABANDONED).unwrap() + 2;
        assert!(held().0 <= threads + most, "{:?} after {threads}", held());
        // Keepalive finds the link and its calls dead.
        while link.lock().attempts == 0 {
            drop(link.changed.wait_timeout(link.lock(), Duration::from_millis(20)).unwrap());
        }
        let hanging = held();
        assert!(hanging.0 <= threads + most && hanging.1 <= files + 4 * most, "{hanging:?}");
        for _ in 0..100 {
            link.attempt(Duration::from_millis(1));
        }
        assert_eq!(link.lock().attempts, 1);
        let later = held();
        assert!(later.0 <= hanging.0 && later.1 <= hanging.1, "{later:?} after {hanging:?}");
        libvirtd.signal_daemon(Signal::CONT).unwrap();
        version(&link).unwrap();
        link.close(soon());
    }
}
