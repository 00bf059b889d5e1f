//! The host's own limit of open files, `OOMScoreAdjust=` and priority. The programs that it starts have none of them.

use std::ffi::CStr;
use std::fs;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::write;
use rustix::process::{Resource, Rlimit, getpriority_process, getrlimit, setpriority_process, setrlimit};

/// The limit that the host was started with; set once the host has raised its own limit.
static ORIGINAL: OnceLock<Rlimit> = OnceLock::new();

/// Set if the host has an adjustment of its own.
static ADJUSTED: OnceLock<()> = OnceLock::new();

/// The adjustment of the kernel's choice when memory runs out. Source: proc(5).
const OOM_SCORE_ADJ: &CStr = c"/proc/self/oom_score_adj";

/// The nice value of the host's threads, unless somebody has chosen one. Guests use all processors that they get, and a
/// host that waits for its turn behind a hundred of them restores nothing meanwhile. Source: sched(7).
const NICE: i32 = -10;

/// Set if the host's nice value is below zero.
static PREFERRED: OnceLock<()> = OnceLock::new();

/// Raises the host's limit of open files and its priority.
///
/// A machine needs a few descriptors and a client one, so the usual limit of 1024 is soon reached. Each
/// process that is forked from now on gets the original values, also when a plugin or a library forks it; see
/// [`machinery::command`].
pub fn raise() {
    let original = getrlimit(Resource::Nofile);
    if ORIGINAL.set(original).is_err() {
        return;
    }
    let adjustment = fs::read_to_string(OOM_SCORE_ADJ.to_string_lossy().as_ref());
    if adjustment.is_ok_and(|adjustment| adjustment.trim() != "0") {
        let _ = ADJUSTED.set(());
    }
    raise_priority();
    // SAFETY: `restore_all` is a function of this program, which exists for as long as the process. The function
    // runs in a forked child, so it may only do what is async-signal-safe. It reads values that never
    // change again, and makes system calls.
    if unsafe { libc::pthread_atfork(None, None, Some(restore_all)) } != 0 {
        tracing::warn!("the limit of open files stays as it is: out of memory");
        return;
    }
    let raised = Rlimit { current: original.maximum, ..original };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// Prefers the threads that this one starts from now on, where the host may do that.
fn raise_priority() {
    if getpriority_process(None).is_ok_and(|nice| nice == 0) {
        // Without the right to do it, the host is like its guests.
        let _ = setpriority_process(None, NICE);
    }
    if getpriority_process(None).is_ok_and(|nice| nice < 0) {
        let _ = PREFERRED.set(());
    }
}

/// Gives this process, which is about to execute another program, the limit that it was started with.
pub fn restore_file_limit() {
    restore();
}

extern "C" fn restore_all() {
    restore();
    if PREFERRED.get().is_some() {
        let _ = setpriority_process(None, 0);
    }
    if ADJUSTED.get().is_some()
        && let Ok(file) = open(OOM_SCORE_ADJ, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
    {
        // A guest has no part in the host's. Where the kernel refuses, it keeps it.
        let _ = write(&file, b"0");
    }
}

fn restore() {
    if let Some(original) = ORIGINAL.get() {
        // The child is about to execute another program, so it cannot report an error.
        let _ = setrlimit(Resource::Nofile, *original);
    }
}
