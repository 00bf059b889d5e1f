//! Intercepts `exit()` in plugins, so that the host shuts down cleanly.
//!
//! A library, or a thread that it started, may call the C function `exit()`. The process would end with the
//! exit code 0, and its machines would run on without a host. So the host registers an `atexit` handler. The
//! handler blocks the calling thread and wakes the guard thread, which logs the caller.
//!
//! A host that serves then shuts down as on SIGTERM: it stops the machines, removes the socket and shuts down
//! the plugins. Every other command ends at once.
//!
//! ```text
//! plugin: exit(0) ─▶ handler: blocks the calling thread
//!                        └─▶ guard: logs the caller ─▶ serving? ─▶ shutdown requested ─▶ … ─▶ end(1)
//!                                                          └─▶ no ─────────────────────────▶ end(2)
//! ```
//!
//! The host itself never calls `exit()` and never returns from `main`: [`end`] is its only way out. [`end`]
//! also skips the handlers of libraries. A handler could clear away data that a thread of the library uses,
//! or wait for a lock that such a thread holds.
//!
//! `_exit()`, `abort()` and signals cannot be intercepted: they end the process at once. The next start of
//! the host adopts its runs.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::thread::{Pid, gettid};
use tokio::sync::watch;

/// The exit code of the process. [`end`] has to read it, and the exit code of `std` cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitCode(u8);

impl ExitCode {
    /// The exit code 0.
    pub const SUCCESS: ExitCode = ExitCode(0);
}

impl From<u8> for ExitCode {
    fn from(code: u8) -> Self {
        ExitCode(code)
    }
}

/// Ends the process without running any exit handler.
pub fn end(code: ExitCode) -> ! {
    // The reader may have closed the pipe; then the output is not needed.
    let _ = std::io::stdout().flush();
    // SAFETY: `_exit` takes a number and does not return.
    unsafe { libc::_exit(code.0.into()) }
}

/// The running calls into plugins, by thread.
static CALLS: Mutex<Option<HashMap<Pid, String>>> = Mutex::new(None);

/// The call or thread that called `exit()`, once one did.
static EXIT_CALLER: Mutex<Option<String>> = Mutex::new(None);
static EXIT_CALLED: Condvar = Condvar::new();

/// True once a plugin has called `exit()`.
static EXIT_REQUESTED: LazyLock<watch::Sender<bool>> = LazyLock::new(|| watch::Sender::new(false));

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call into a plugin by this thread. It ends when this value is dropped.
pub struct Call(Pid);

impl Call {
    /// Records that this thread calls into a plugin. `what` names the plugin and its method.
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

/// Installs the handler and starts the guard thread.
pub fn start_guard() {
    install_atexit_handler();
    let waiting = || {
        let caller = EXIT_CALLED.wait_while(lock(&EXIT_CALLER), |caller| caller.is_none());
        let caller = caller.unwrap_or_else(PoisonError::into_inner).clone();
        // Logging may panic if standard error is closed. The shutdown must go on all the same.
        let _ = std::panic::catch_unwind(|| {
            tracing::error!(by = caller, "a plugin called exit(), which ends the host");
        });
        EXIT_REQUESTED.send_replace(true);
        if EXIT_REQUESTED.receiver_count() == 0 {
            end(ExitCode(2));
        }
    };
    if let Err(error) = thread::Builder::new().name("exit-guard".to_owned()).spawn(waiting) {
        tracing::warn!(%error, "cannot watch for plugins that call exit()");
    }
}

/// Registers the host's handler again, so that it runs before the handlers that libraries have registered
/// until now.
pub fn install_atexit_handler() {
    // SAFETY: `on_exit` is a function of this program, which exists for as long as the process.
    if unsafe { libc::atexit(on_exit) } != 0 {
        tracing::warn!("a plugin that calls exit() will end the host at once: out of memory");
    }
}

/// Subscribes to the request to shut down. The value is true once a plugin has called `exit()`.
pub fn exit_requested() -> watch::Receiver<bool> {
    EXIT_REQUESTED.subscribe()
}

/// Blocks the thread that called `exit()`. Its thread-locals are destroyed, so it may neither log nor panic.
extern "C" fn on_exit() {
    // If another thread calls `exit()` meanwhile, it has to run this handler too.
    // SAFETY: as in `install_atexit_handler`.
    unsafe { libc::atexit(on_exit) };
    let at = lock(&CALLS).as_ref().and_then(|calls| calls.get(&gettid()).cloned());
    let name = || fs::read_to_string("/proc/thread-self/comm").unwrap_or_default();
    lock(&EXIT_CALLER)
        .get_or_insert_with(|| at.unwrap_or_else(|| format!("its thread '{}'", name().trim_end())));
    EXIT_CALLED.notify_all();
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}
