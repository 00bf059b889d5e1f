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
//! One connection serves all machines with its events and with what is soon answered. What takes long, a
//! start or a dump, has a connection of its own for as long as it takes: libvirtd stops to listen to one
//! that has five requests under way (`max_client_requests` in its libvirtd.conf), to keepalive too.
//!
//! The keeper, a thread, sleeps until the connection is lost; then it tries to open it anew, in growing
//! steps, for nothing tells when libvirtd is back. Who wants something of libvirt meanwhile waits for the
//! keeper, so that a restart of libvirtd, which takes a second, costs no analysis.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use machinery::{Deadline, Error, Result};
use virt::connect::Connect;

use crate::call::{self, Call};
use crate::errors::{is_lost_link, not_connected};
use crate::events::{self, Ears, Event, Watched};

/// Seconds between two questions whether libvirtd is alive, and how many may go unanswered.
const KEEPALIVE: (i32, u32) = (5, 4);
/// How long an action waits for a libvirtd that is gone.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long the keeper waits for a libvirtd that takes its connection and says nothing.
const OPENING: Duration = Duration::from_secs(5);
/// A libvirtd that has just started takes over the domains that run, after its sockets are there, and
/// nothing tells when it is done. A domain that is stopped in the middle of that can stay locked, as
/// was seen with libvirt 11.3. So a new libvirtd is given this time first.
const SETTLING: Duration = Duration::from_millis(500);
/// The pauses between two tries to connect grow from this …
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// … to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Who is told what happens.
pub trait Listener: Send + Sync + 'static {
    /// Something happened to the domain of that name.
    fn happened(&self, label: &str, event: Event);
    /// The connection is lost; what happens from now on is not heard.
    fn lost(&self, why: &str);
    /// It is there again.
    fn back(&self, connect: &Connect);
}

/// The connection of one dsn.
pub struct Link {
    dsn: String,
    now: Mutex<Now>,
    changed: Condvar,
    /// Ends when the keeper does.
    keeper: Mutex<Option<Receiver<()>>>,
}

struct Now {
    connection: Connection,
    /// Numbers the connections, so that the end of an old one is not taken for that of a new one.
    number: u64,
    listener: Option<Arc<dyn Listener>>,
    /// Let go by the keeper: not in the event thread, where libvirt is about to use it.
    dead: Option<Watched>,
}

enum Connection {
    Open(Watched),
    Lost(String),
    Closed,
}

impl Link {
    /// Connects for the first time.
    ///
    /// # Errors
    /// It cannot be reached, or may not.
    pub fn open(dsn: &str, deadline: Deadline) -> Result<Arc<Link>> {
        let now = Now {
            connection: Connection::Lost("it was never there".to_owned()),
            number: 0,
            listener: None,
            dead: None,
        };
        let link = Arc::new(Link {
            dsn: dsn.to_owned(),
            now: Mutex::new(now),
            changed: Condvar::new(),
            keeper: Mutex::new(None),
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
        let keep = move || {
            link.keep();
            drop(ends);
        };
        let keeper = thread::Builder::new().name("libvirt-keeper".to_owned()).spawn(keep);
        keeper.map_err(|error| Error::environment(format!("cannot start a thread for libvirt: {error}")))?;
        *self.keeper.lock().unwrap_or_else(PoisonError::into_inner) = Some(keeper_ends);
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
            let (connect, number) = self.numbered_connection(deadline)?;
            let asked = call::within(deadline, waiting_for, move || {
                if is_there(&connect) { work(&connect).map(Ok) } else { Ok(Err(work)) }
            })?;
            match asked {
                Ok(told) => return Ok(told),
                Err(unasked) => work = unasked,
            }
            self.lost(number, "libvirtd has ended");
        }
    }

    /// The connection, waited for if it is lost just now.
    ///
    /// # Errors
    /// It does not come back in time.
    pub fn connection(&self, deadline: Deadline) -> Result<Connect> {
        self.numbered_connection(deadline).map(|(connect, _)| connect)
    }

    fn numbered_connection(&self, deadline: Deadline) -> Result<(Connect, u64)> {
        deadline.check("the connection to libvirt")?;
        let patience = deadline.within(PATIENCE).remaining();
        let lost = |now: &mut Now| matches!(now.connection, Connection::Lost(_));
        let waited = self.changed.wait_timeout_while(self.lock(), patience, lost);
        let (now, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &now.connection {
            Connection::Open(watched) => Ok((watched.connect().clone(), now.number)),
            Connection::Closed => Err(shut_down()),
            Connection::Lost(_) if deadline.passed() => Err(deadline.timeout("the connection to libvirt")),
            Connection::Lost(why) => {
                let reason = format!(
                    "the connection to libvirt at {} is lost and does not come back: {why}",
                    self.dsn
                );
                Err(Error::environment(reason)
                    .advice("Start libvirtd (systemctl start libvirtd), then start the machine anew"))
            }
        }
    }

    /// Closes it for good. Once the keeper has ended nobody is told anything any more; a libvirtd that
    /// hangs may hold it up, and is not waited for beyond the deadline.
    pub fn close(&self, deadline: Deadline) {
        let closed = std::mem::replace(&mut self.lock().connection, Connection::Closed);
        self.changed.notify_all();
        let keeper = self.keeper.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ended = keeper.is_none_or(|ends| {
            ends.recv_timeout(deadline.remaining()) == Err(RecvTimeoutError::Disconnected)
        });
        let (dead, listener) = {
            let mut now = self.lock();
            (now.dead.take(), now.listener.take())
        };
        let letting_go = Call::start(move || {
            drop((closed, dead, listener));
            Ok(())
        });
        let gone = letting_go.is_ok_and(|call| call.wait(deadline.remaining()).is_some());
        if !ended || !gone {
            tracing::warn!(dsn = self.dsn, "libvirt does not let go of the connection in time");
        }
    }

    /// Starts something that takes long, on a connection of its own.
    ///
    /// # Errors
    /// There is no connection to libvirt. That there is none for this call is the call's own error.
    pub fn long_call<T: Send + 'static>(
        &self,
        deadline: Deadline,
        work: impl FnOnce(&Connect) -> Result<T> + Send + 'static,
    ) -> Result<Call<T>> {
        self.connection(deadline)?;
        let dsn = self.dsn.clone();
        Call::start(move || work(&open(&dsn)?))
    }

    /// Starts something that is soon answered, on the connection of all, which is given with its
    /// [`number`](Link::number). What becomes of it matters also when it comes late, so it is the caller's.
    ///
    /// # Errors
    /// There is no connection to libvirt.
    pub fn short_call<T: Send + 'static>(
        &self,
        deadline: Deadline,
        work: impl FnOnce(&Connect, u64) -> Result<T> + Send + 'static,
    ) -> Result<Call<T>> {
        let (connect, number) = self.numbered_connection(deadline)?;
        Call::start(move || work(&connect, number))
    }

    /// Whether libvirtd is away just now, be that noticed yet or not; who wants something has to wait then.
    pub fn is_away(&self) -> bool {
        let connect = match &self.lock().connection {
            Connection::Open(watched) => watched.connect().clone(),
            Connection::Lost(_) => return true,
            Connection::Closed => return false,
        };
        let there =
            call::within(Deadline::after(OPENING), "libvirt to answer", move || Ok(is_there(&connect)));
        !there.unwrap_or(false)
    }

    /// The number of the connection that tells what happens. While it stays the same, everything was heard.
    pub fn number(&self) -> u64 {
        self.lock().number
    }

    /// Opens the connection.
    fn connect(self: &Arc<Self>) -> Result<()> {
        let number = self.lock().number + 1;
        let watched = self.open_watched(number)?;
        let connect = watched.connect().clone();
        let mut now = self.lock();
        if matches!(now.connection, Connection::Closed) {
            drop(now);
            return Err(shut_down());
        }
        now.number = number;
        let before = std::mem::replace(&mut now.connection, Connection::Open(watched));
        drop(now);
        drop(before);
        self.changed.notify_all();
        // One that ended before it was known here was not noticed by its number.
        if !connect.is_alive().unwrap_or(true) {
            self.lost(number, "libvirtd ended at once");
        }
        Ok(())
    }

    fn open_watched(self: &Arc<Self>, number: u64) -> Result<Watched> {
        events::start_loop()?;
        Watched::new(open(&self.dsn)?, Arc::new(Ear { link: Arc::downgrade(self), number }))
    }

    /// The keeper's work.
    fn keep(self: Arc<Self>) {
        loop {
            let open = |now: &mut Now| matches!(now.connection, Connection::Open(_));
            let mut now = self.changed.wait_while(self.lock(), open).unwrap_or_else(PoisonError::into_inner);
            let Connection::Lost(why) = &now.connection else { return };
            let why = format!("the connection to libvirt at {} is lost: {why}", self.dsn);
            let (dead, listener) = (now.dead.take(), now.listener.clone());
            // Not under the lock: letting go of it calls libvirt.
            drop(now);
            drop(dead);
            tracing::warn!(dsn = self.dsn, why, "libvirt is away");
            if let Some(listener) = &listener {
                listener.lost(&why);
            }
            if !self.reopen() {
                return;
            }
            tracing::info!(dsn = self.dsn, "libvirt is back");
            let back = self.connection(Deadline::after(FIRST_PAUSE));
            if let (Ok(connect), Some(listener)) = (back, &listener) {
                listener.back(&connect);
            }
        }
    }

    /// Tries until it is open; `false` if it was closed meanwhile.
    fn reopen(self: &Arc<Self>) -> bool {
        let mut pause = FIRST_PAUSE;
        loop {
            if self.answers() {
                if self.closed_within(SETTLING) {
                    return false;
                }
                let link = Arc::clone(self);
                match call::within(Deadline::after(OPENING), "a connection", move || link.connect()) {
                    Ok(()) => return true,
                    Err(error) => tracing::debug!(%error, "libvirt is gone again"),
                }
            }
            if self.closed_within(pause) {
                return false;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn answers(&self) -> bool {
        let dsn = self.dsn.clone();
        let tried = call::within(Deadline::after(OPENING), "a connection", move || open(&dsn).map(drop));
        if let Err(error) = &tried {
            tracing::debug!(%error, "libvirt is still away");
        }
        tried.is_ok()
    }

    /// Waits, unless it is closed for good before that.
    fn closed_within(&self, time: Duration) -> bool {
        let still = |now: &mut Now| !matches!(now.connection, Connection::Closed);
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
        if let Connection::Open(watched) = open {
            now.dead = Some(watched);
        }
        drop(now);
        self.changed.notify_all();
    }

    /// Each statement that holds the lock leaves it whole, so poison means nothing.
    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether somebody is at the other end; a hung libvirtd lets this hang.
fn is_there(connect: &Connect) -> bool {
    connect.lib_version().map_or_else(|error| !is_lost_link(&error), |_| true)
}

fn open(dsn: &str) -> Result<Connect> {
    let connect = Connect::open(Some(dsn)).map_err(|error| not_connected(dsn, &error))?;
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
struct Ear {
    link: Weak<Link>,
    number: u64,
}

impl Ears for Ear {
    fn happened(&self, label: &str, event: Event) {
        let Some(link) = self.link.upgrade() else { return };
        let listener = link.lock().listener.clone();
        if let Some(listener) = listener {
            listener.happened(label, event);
        }
    }

    fn closed(&self, why: &str) {
        if let Some(link) = self.link.upgrade() {
            link.lost(self.number, why);
        }
    }
}
