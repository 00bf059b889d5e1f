//! The leftovers of a host that was killed: a QEMU, its overlays, and the monitor's socket.
//!
//! The monitor's socket of the machine, on QEMU's command line, marks a run. A CWD has only one host at a time, so a
//! process with the marker is a run that no host watches any more: it is ended. A process that merely uses the same
//! overlay belongs to somebody else: it is reported and not touched.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use machinery_backend::process::{RunningProcess, leftovers};
use machinery_backend::{files, remove_overlays};

/// Ends runs of the machine with that socket that no host watches, and removes their overlays (the first one is
/// `overlays[0]`) and their socket.
///
/// # Errors
/// Somebody else uses an overlay, a process does not end, or a file cannot be removed.
pub fn clear(socket: &Path, overlays: &[PathBuf], program: &Path, keep_overlays: bool) -> Result<()> {
    for process in leftovers() {
        if process.uses(socket) || process.args().any(|arg| is_named_by_dead_host(socket, arg)) {
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

/// Reports whether the argument names the socket through `/proc` of a host that is dead. A host does so if the path is
/// too long for an address.
fn is_named_by_dead_host(socket: &Path, arg: &[u8]) -> bool {
    let named = std::str::from_utf8(arg).ok();
    let named =
        named.and_then(|arg| arg.strip_prefix("socket,id=cuckoo-monitor,path=/proc/")?.split_once('/'));
    let Some(((host, path), name)) = named.zip(socket.file_name()) else { return false };
    Path::new(path).file_name() == Some(name) && !Path::new("/proc").join(host).exists()
}

/// Reports whether the process is a QEMU: the configured one, or one that a wrapper has started.
fn is_qemu(process: &RunningProcess, configured: &Path) -> bool {
    let Some(own) = process.program() else { return false };
    let is_named_so = own.file_name().is_some_and(|name| name.as_bytes().starts_with(b"qemu-system"));
    is_named_so || fs::canonicalize(configured).is_ok_and(|configured| configured == own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_is_recognized_behind_a_dead_host_when_its_path_is_long() {
        let is_named = |path: &str| {
            let arg = format!("socket,id=cuckoo-monitor,path={path}");
            is_named_by_dead_host(Path::new("/c/sockets/qemu_m.sock"), arg.as_bytes())
        };
        assert!(is_named("/proc/999999999/fd/9/qemu_m.sock"));
        assert!(!is_named("/proc/999999999/fd/9/qemu_n.sock"));
        assert!(!is_named(&format!("/proc/{}/fd/9/qemu_m.sock", std::process::id())));
        assert!(!is_named("/other/sockets/qemu_m.sock"));
    }
}
