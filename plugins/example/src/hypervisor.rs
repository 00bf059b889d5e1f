//! A simulated hypervisor: replace this file.
//!
//! A real plugin calls libvirt, a command line or a socket here. The simulation behaves like them: each request takes
//! effect some time later, and an event confirms it.
//!
//! ```text
//!   launch ─▶ Loading ─▶ Running ─▶ Off: killed, by its power button, or by itself
//! ```
//!
//! A guest's memory is one number. It grows while the guest runs, so the number shows where the run began.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use machinery::Deadline;
use machinery_backend::sync::{lock, wait_while};

/// The time to load a guest.
const LOAD_TIME: Duration = Duration::from_millis(60);
/// The interval at which the number grows.
const TICK: Duration = Duration::from_millis(10);
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// The width and the height of the screen, in pixels.
pub const SCREEN: u32 = 16;

/// The status of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Loading,
    Running,
    Off,
}

/// One guest: a process in QEMU, a domain in libvirt.
pub struct Guest {
    /// The number in its memory at the start of the run.
    memory: u32,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    status: Status,
    running_since: Option<Instant>,
}

impl Guest {
    /// Launches a guest with that memory, and returns before it is loaded. The guest powers itself off after
    /// `poweroff_after`. `on_end` is called when the guest has ended for any reason.
    pub fn launch(
        memory: u32,
        poweroff_after: Option<Duration>,
        on_end: impl FnOnce(&Arc<Guest>) + Send + 'static,
    ) -> io::Result<Arc<Guest>> {
        let state = Mutex::new(State { status: Status::Loading, running_since: None });
        let guest = Arc::new(Guest { memory, state, changed: Condvar::new() });
        let this = Arc::clone(&guest);
        thread::Builder::new().name("guest".to_owned()).spawn(move || {
            this.run(poweroff_after);
            on_end(&this);
        })?;
        Ok(guest)
    }

    pub fn status(&self) -> Status {
        lock(&self.state).status
    }

    /// Waits until the guest has that status or is off, or until the deadline; returns its status.
    pub fn wait_for(&self, wanted: Status, deadline: Deadline) -> Status {
        self.wait_while(deadline, |status| status != wanted && status != Status::Off)
    }

    /// Ends the guest at once.
    pub fn kill(&self) {
        for status in [Status::Loading, Status::Running] {
            self.change(status, Status::Off);
        }
    }

    /// Presses the power button. A running guest powers itself off.
    pub fn press_power_button(&self) {
        self.change(Status::Running, Status::Off);
    }

    /// Returns the memory.
    pub fn memory(&self) -> [u8; 4] {
        self.number().to_le_bytes()
    }

    /// Returns the pixels of the screen: a grey that depends on the number.
    pub fn screen(&self) -> Vec<u8> {
        let [grey, ..] = self.memory();
        vec![grey; (SCREEN * SCREEN * 3) as usize]
    }

    fn number(&self) -> u32 {
        let elapsed = lock(&self.state).running_since.map(|since| since.elapsed()).unwrap_or_default();
        let ticks = u32::try_from(elapsed.as_millis() / TICK.as_millis()).unwrap_or(u32::MAX);
        self.memory.saturating_add(ticks)
    }

    /// Runs the guest in its own thread.
    fn run(&self, poweroff_after: Option<Duration>) {
        self.wait_while(Deadline::after(LOAD_TIME), |status| status == Status::Loading);
        self.change(Status::Loading, Status::Running);
        let end = Deadline::after(poweroff_after.unwrap_or(FOREVER));
        self.wait_while(end, |status| status == Status::Running);
        self.change(Status::Running, Status::Off);
    }

    fn change(&self, from: Status, to: Status) {
        let mut state = lock(&self.state);
        if state.status == from {
            state.status = to;
            state.running_since = (to == Status::Running).then(Instant::now);
            self.changed.notify_all();
        }
    }

    fn wait_while(&self, deadline: Deadline, condition: impl Fn(Status) -> bool) -> Status {
        wait_while(&self.changed, lock(&self.state), deadline, |state| condition(state.status)).status
    }
}
