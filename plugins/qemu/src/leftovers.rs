//! The leftovers of a host that was killed: a QEMU, its overlays, and the monitor's socket.
//!
//! Every process of a run has the path of the machine's monitor in its environment, and belongs to the machine's own user
//! where the host is root. A CWD has only one host at a time, so such a process is of a run that no host watches any more:
//! it is ended, unless this host [adopts](crate::machine) it. A process that merely uses the same overlay belongs to
//! somebody else: it is reported and not touched.
//!
//! Code inside a QEMU can change its environment, and cannot change its user. The record of the run has the process, too.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use machinery_backend::process::{ProcessIdentity, RunningProcess, leftovers};
use machinery_backend::{RUN_VARIABLE, files, remove_overlays};

/// The marks of a machine's processes, beside their environment.
pub struct Owner {
    /// The machine's own user.
    pub user: Option<u32>,
    /// The process of the last run.
    pub recorded: Option<ProcessIdentity>,
}

impl Owner {
    fn is_user_of(&self, process: &RunningProcess) -> bool {
        self.user.is_some_and(|user| process.user() == Some(user))
    }

    fn has_recorded(&self, process: &RunningProcess) -> bool {
        let is_process =
            |identity: &ProcessIdentity| identity.number() == process.number() && identity.open().is_some();
        self.recorded.as_ref().is_some_and(is_process)
    }
}

/// Ends runs of the machine with that socket or that owner that no host watches, and removes their overlays (the first
/// one is `overlays[0]`) and their socket.
///
/// # Errors
/// Somebody else uses an overlay, a process does not end, or a file cannot be removed.
pub fn clear(
    socket: &Path,
    owner: &Owner,
    overlays: &[PathBuf],
    program: &Path,
    keep_overlays: bool,
) -> Result<()> {
    // The socket outlives the process, so without one there is nothing to end.
    let has_run = socket.exists();
    let has_overlay = overlays.iter().any(|overlay| overlay.symlink_metadata().is_ok());
    // A host looks for leftovers of each of its machines when it starts, and most have none.
    let processes = (has_run || has_overlay || owner.recorded.is_some()).then(leftovers);
    let is_ours = |process: &RunningProcess| {
        owner.has_recorded(process)
            || has_run
                && (process.has_variable(RUN_VARIABLE, socket.as_os_str()) || owner.is_user_of(process))
    };
    for process in processes.into_iter().flatten() {
        if is_ours(&process) {
            tracing::warn!(pid = process.number(), socket = %socket.display(), "ending a QEMU of a host that died");
            process.end()?;
        } else if is_qemu(&process, program)
            && let Some(overlay) = overlays.iter().find(|overlay| process.uses(overlay))
        {
            let reason = format!("process {} uses the overlay {}", process.number(), overlay.display());
            return Err(Error::environment(format!("{reason}, and is not of this CWD")).advice(
                "If another manager has left it, end it; if another CWD has this machine too, give each its own files",
            ));
        }
    }
    files::remove(socket)?;
    match overlays.first() {
        Some(first) if !keep_overlays => remove_overlays(first),
        _ => Ok(()),
    }
}

/// Reports whether the process is a QEMU: the configured one, or one that a wrapper has started.
fn is_qemu(process: &RunningProcess, configured: &Path) -> bool {
    let Some(own) = process.program() else { return false };
    let is_named_so = own.file_name().is_some_and(|name| name.as_bytes().starts_with(b"qemu-system"));
    is_named_so || fs::canonicalize(configured).is_ok_and(|configured| configured == own)
}
