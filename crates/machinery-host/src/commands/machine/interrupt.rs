//! The end of a command by a signal: the process executes this program again, as `machine clear`.
//!
//! So an interrupted command and one that was killed are cleared in the same way, and no thread of the interrupted one
//! makes anything meanwhile.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;

use machinery::{Error, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

/// Has this process clear the unfinished machine, or all, once it gets a signal to end. `globals` are the arguments that
/// select CWD and plugins.
///
/// # Errors
/// The signals cannot be received.
pub fn clear_when_interrupted(name: Option<&str>, globals: Vec<OsString>) -> Result<()> {
    let failed = |error: std::io::Error| Error::environment(format!("cannot receive signals: {error}"));
    let (mut receiver, sender) = UnixStream::pair().map_err(failed)?;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        pipe::register(signal, sender.try_clone().map_err(failed)?).map_err(failed)?;
    }
    let mut clear = Command::new("/proc/self/exe");
    clear.args(globals).args(["machine", "clear", "--interrupted", "--"]).args(name);
    let wait = move || {
        if receiver.read_exact(&mut [0]).is_ok() {
            // Returns only if the program cannot be executed.
            let error = clear.exec();
            tracing::error!(%error, "cannot clear the unfinished machine: run `cuckoo-machinery machine clear`");
            crate::exit::end(1.into());
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(wait).map(drop).map_err(failed)
}
