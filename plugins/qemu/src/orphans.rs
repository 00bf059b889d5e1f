//! Runs of machines that are not configured any more: the machine was removed while no host ran, or before a host was
//! replaced. No machine adopts such a run, so it is ended.

use std::path::Path;
use std::time::Duration;

use machinery::Result;
use machinery_backend::process::Process;
use machinery_backend::{cell, files};

use crate::console::kind_of;
use crate::launch::QEMU;
use crate::run::record::{Record, RecordFile};

/// Ends the runs of machines that are not configured any more, which no machine adopts.
pub fn end_orphans(state: &Path, is_known: impl Fn(&str) -> bool) {
    for file in RecordFile::all(state).into_iter().filter(|file| !is_known(file.machine())) {
        let Some((_, record)) = file.read() else {
            let machine = file.machine();
            tracing::warn!(
                machine,
                "a run of a machine that is not configured may remain: its record cannot be read"
            );
            continue;
        };
        if let Err(error) = end(&file, &record) {
            tracing::warn!(machine = file.machine(), %error, "a run of a machine that is not configured remains");
        }
    }
}

fn end(file: &RecordFile, record: &Record) -> Result<()> {
    if let Some(process) = Process::adopt(&record.process, QEMU, file.machine(), kind_of)? {
        tracing::warn!(
            machine = file.machine(),
            "ending the run of a machine that is not configured any more"
        );
        process.end(Duration::ZERO);
    }
    record.overlays.iter().rev().try_for_each(|overlay| files::remove(overlay))?;
    record.sockets.iter().try_for_each(|socket| files::remove_socket(socket))?;
    record.interface.as_deref().map_or(Ok(()), cell::remove)?;
    file.remove();
    Ok(())
}
