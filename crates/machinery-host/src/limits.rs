//! The limit of open files: high for the host, and the original one for every program that it starts.

use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit that the host was started with, once it has raised its own.
static ORIGINAL: OnceLock<Rlimit> = OnceLock::new();

/// Raises the host's limit: a machine takes a few descriptors, a client one, and the usual limit of 1024 is soon
/// used up. Each process that is forked from now on, also by a plugin or a library of one, gets the original
/// limit; see [`machinery::command`].
pub fn raise_file_limit() {
    let original = getrlimit(Resource::Nofile);
    if ORIGINAL.set(original).is_err() {
        return;
    }
    // SAFETY: `restore` is a function of this program, which is there for as long as the process is. It runs in
    // a forked child, so it only does what is async-signal-safe: it reads a value that is set for good, and makes
    // one system call.
    if unsafe { libc::pthread_atfork(None, None, Some(restore)) } != 0 {
        tracing::warn!("the limit of open files stays as it is: out of memory");
        return;
    }
    let raised = Rlimit { current: original.maximum, ..original };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "the limit of open files stays as it is");
    }
}

extern "C" fn restore() {
    if let Some(original) = ORIGINAL.get() {
        // There is nobody to tell in a child that becomes another program.
        let _ = setrlimit(Resource::Nofile, *original);
    }
}
