//! How the process ends: by the host's own word, and not by a plugin's.
//!
//! A library may call `exit()`, the C function, and so may any thread it has started. The process would
//! vanish with the code 0, and its machines would run on with nobody to watch them. So the host has a
//! word to say in `exit()`: a handler, which lets the thread that called it go no further and wakes
//! another that tells the log who it was. A host that serves is then asked to end as by SIGTERM:
//! machines are stopped, the socket is removed, plugins let go. Any other command ends at once.
//!
//! ```text
//! a plugin: exit(0) ─▶ handler: that thread waits for ever
//!                          └─▶ guard: log ─▶ serving? ─▶ asked to end ─▶ … ─▶ end(1)
//!                                                   └─▶ no ─────────────▶ end(2)
//! ```
//!
//! For that the host itself never calls `exit()`, nor returns from `main`: [`end`] is its only way out.
//! It also spares the end all that libraries have registered for it, while a thread of theirs may be in
//! the midst of what they would clear away, or hold a lock that they would wait for.
//!
//! Against `_exit()`, `abort()` and a signal there is no help: they end the process at once. The next
//! start of the host clears away what they have left.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::thread::{Pid, gettid};
use tokio::sync::watch;

/// The exit code of the process. That of `std` cannot be read, and [`end`] has to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitCode(u8);

impl ExitCode {
    /// All is done.
    pub const SUCCESS: ExitCode = ExitCode(0);
}

impl From<u8> for ExitCode {
    fn from(code: u8) -> Self {
        ExitCode(code)
    }
}

/// Ends the process, and nothing else.
pub fn end(code: ExitCode) -> ! {
    // Whoever reads it may be gone, and then it is not missed.
    let _ = std::io::stdout().flush();
    // SAFETY: it takes a number and does not return.
    unsafe { libc::_exit(code.0.into()) }
}

/// What threads are at that are in a plugin, for whom they may call `exit()`.
static CALLS: Mutex<Option<HashMap<Pid, String>>> = Mutex::new(None);

/// Who called `exit()`.
static CALLER: Mutex<Option<String>> = Mutex::new(None);
static CALLED: Condvar = Condvar::new();

/// True once it was called.
static ASKED: LazyLock<watch::Sender<bool>> = LazyLock::new(|| watch::Sender::new(false));

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This thread's call into a plugin, until it is dropped.
pub struct Call(Pid);

impl Call {
    /// This thread is about to call into a plugin; `what` says for what.
    pub fn begin(what: &str) -> Self {
        let thread = gettid();
        lock(&CALLS).get_or_insert_default().insert(thread, what.to_owned());
        Call(thread)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(calls) = &mut *lock(&CALLS) {
            calls.remove(&self.0);
        }
    }
}

/// From now on an `exit()` that is not the host's ends nothing at once.
pub fn guard() {
    go_first();
    let waiting = || {
        let caller = CALLED.wait_while(lock(&CALLER), |caller| caller.is_none());
        let caller = caller.unwrap_or_else(PoisonError::into_inner).clone();
        // There may be nowhere to write it to any more.
        let _ = std::panic::catch_unwind(|| {
            tracing::error!(by = caller, "a plugin called exit(), which ends the host");
        });
        ASKED.send_replace(true);
        if ASKED.receiver_count() == 0 {
            end(ExitCode(2));
        }
    };
    if let Err(error) = thread::Builder::new().name("exit-guard".to_owned()).spawn(waiting) {
        tracing::warn!(%error, "cannot watch for plugins that call exit()");
    }
}

/// Has the host's handler come before those that libraries have registered until now.
pub fn go_first() {
    // SAFETY: `called` is a function of this program, which is there for as long as the process is.
    if unsafe { libc::atexit(called) } != 0 {
        tracing::warn!("a plugin that calls exit() will end the host at once: out of memory");
    }
}

/// Hears when a plugin has called `exit()`; true once one has.
pub fn asked() -> watch::Receiver<bool> {
    ASKED.subscribe()
}

/// Runs on the thread that called `exit()`, whose thread-locals are gone: it can neither log nor panic.
extern "C" fn called() {
    // Another thread that calls it meanwhile must not find that there is nothing left to do first.
    // SAFETY: as in `go_first`.
    unsafe { libc::atexit(called) };
    let at = lock(&CALLS).as_ref().and_then(|calls| calls.get(&gettid()).cloned());
    let name = || fs::read_to_string("/proc/thread-self/comm").unwrap_or_default();
    lock(&CALLER).get_or_insert_with(|| at.unwrap_or_else(|| format!("its thread '{}'", name().trim_end())));
    CALLED.notify_all();
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}
