//! A pretended hypervisor: the one file to throw away.
//!
//! It stands where libvirt, a command line or a socket of the real one will be, and behaves like it:
//! whatever is asked of it takes effect some time later, and it says by an event when it has.
//!
//! ```text
//!   launch ─▶ Loading ─▶ Running ─▶ Off: unplugged, by its power button, or by itself
//! ```
//!
//! A guest's memory is one number. It counts while the guest runs, so everybody can see from where a
//! run has begun.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use machinery::Deadline;

/// How long it takes to load a guest.
const LOADING: Duration = Duration::from_millis(60);
/// The number grows once in so long.
const TICK: Duration = Duration::from_millis(10);

/// What a guest is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Loading,
    Running,
    Off,
}

/// One guest: what a process is for QEMU, and a domain for libvirt.
pub struct Guest {
    /// The number in its memory when it begins to run.
    memory: u32,
    now: Mutex<Now>,
    changed: Condvar,
}

struct Now {
    status: Status,
    running_since: Option<Instant>,
}

impl Guest {
    /// Launches a guest with that memory, and returns before it is loaded. When it ends, whoever has
    /// ended it, `ended` is called. One that is given a life to live ends by itself after it.
    pub fn launch(
        memory: u32,
        life: Option<Duration>,
        ended: impl FnOnce(&Arc<Guest>) + Send + 'static,
    ) -> io::Result<Arc<Guest>> {
        let now = Mutex::new(Now { status: Status::Loading, running_since: None });
        let guest = Arc::new(Guest { memory, now, changed: Condvar::new() });
        let itself = Arc::clone(&guest);
        thread::Builder::new().name("guest".to_owned()).spawn(move || {
            itself.live(life);
            ended(&itself);
        })?;
        Ok(guest)
    }

    pub fn status(&self) -> Status {
        self.lock().status
    }

    /// Waits until the guest is in that status, or is off, and tells in which one it is by the
    /// deadline.
    pub fn wait_for(&self, wanted: Status, deadline: Deadline) -> Status {
        self.wait_while(deadline.remaining(), |status| status != wanted && status != Status::Off)
    }

    /// Pulls the plug.
    pub fn unplug(&self) {
        for status in [Status::Loading, Status::Running] {
            self.change(status, Status::Off);
        }
    }

    /// Presses the power button, which a running guest obeys.
    pub fn press_power_button(&self) {
        self.change(Status::Running, Status::Off);
    }

    /// Writes all of the memory.
    pub fn dump(&self, mut to: impl Write) -> io::Result<()> {
        writeln!(to, "{}", self.number())
    }

    /// What is on the screen, as PPM: a grey that comes from the number.
    pub fn screen(&self) -> Vec<u8> {
        let [grey, ..] = self.number().to_le_bytes();
        [b"P6\n16 16\n255\n".as_slice(), &[grey; 16 * 16 * 3]].concat()
    }

    fn number(&self) -> u32 {
        let ran = self.lock().running_since.map(|since| since.elapsed()).unwrap_or_default();
        let ticks = u32::try_from(ran.as_millis() / TICK.as_millis()).unwrap_or(u32::MAX);
        self.memory.saturating_add(ticks)
    }

    /// What goes on in the guest's own process.
    fn live(&self, life: Option<Duration>) {
        self.wait_while(LOADING, |status| status == Status::Loading);
        self.change(Status::Loading, Status::Running);
        self.wait_while(life.unwrap_or(Duration::MAX), |status| status == Status::Running);
        self.change(Status::Running, Status::Off);
    }

    fn change(&self, from: Status, to: Status) {
        let mut now = self.lock();
        if now.status == from {
            now.status = to;
            now.running_since = (to == Status::Running).then(Instant::now);
            self.changed.notify_all();
        }
    }

    fn wait_while(&self, limit: Duration, goes_on: impl Fn(Status) -> bool) -> Status {
        let waited = self.changed.wait_timeout_while(self.lock(), limit, |now| goes_on(now.status));
        let (now, _) = waited.unwrap_or_else(PoisonError::into_inner);
        now.status
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
