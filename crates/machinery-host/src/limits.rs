//! The limit of open files: raised for the host, and unchanged for every program that the host starts.

use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit that the host was started with; set once the host has raised its own limit.
static ORIGINAL: OnceLock<Rlimit> = OnceLock::new();

/// Raises the host's limit.
///
/// A machine needs a few descriptors and a client one, so the usual limit of 1024 is soon reached. Each
/// process that is forked from now on gets the original limit, also when a plugin or a library forks it; see
/// [`machinery::command`].
pub fn raise_file_limit() {
    let original = getrlimit(Resource::Nofile);
    if ORIGINAL.set(original).is_err() {
        return;
    }
    // SAFETY: `restore` is a function of this program, which exists for as long as the process. The function
    // runs in a forked child, so it may only do what is async-signal-safe. It reads a value that never
    // changes again, and makes one system call.
    if unsafe { libc::pthread_atfork(None, None, Some(restore)) } != 0 {
        tracing::warn!("the limit of open files stays as it is: out of memory");
        return;
    }
    let raised = Rlimit { current: original.maximum, ..original };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

/// Gives this process, which is about to execute another program, the limit that it was started with.
pub fn restore_file_limit() {
    restore();
}

extern "C" fn restore() {
    if let Some(original) = ORIGINAL.get() {
        // The child is about to execute another program, so it cannot report an error.
        let _ = setrlimit(Resource::Nofile, *original);
    }
}
