//! Inspects a running machine: memory dump and screenshot.
//!
//! QEMU writes into an open file of the plugin, so owner and mode are the host's. The file appears under its
//! name only when it is complete.

use std::fs::{self, OpenOptions};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use machinery::{Deadline, DumpFormat, Error, Result};
use machinery_backend::{Output, ppm_to_png};
use qapi::qmp;
use serde_json::Value;

use crate::qmp::Event;
use crate::run::Run;

/// The interval at which the progress of a dump is queried. The end of a dump is an event.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// Writes the guest's memory to `path`.
///
/// # Errors
/// This QEMU does not offer the format, the file cannot be written, or the dump fails.
pub fn dump_memory(run: &Run, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
    let format = supported_format(run, format, deadline)?;
    let status = run.execute(&qmp::query_status {}, deadline)?;
    let output = Output::at(path)?;
    // QEMU gets the file as a descriptor.
    let name = run.qmp().pass(output.file().as_fd(), true, deadline)?;
    let events = run.qmp().listen();
    let dump = qmp::dump_guest_memory {
        paging: false,
        protocol: format!("fd:{name}"),
        detach: Some(true),
        format: Some(format),
        begin: None,
        length: None,
    };
    run.execute(&dump, deadline)?;
    let mut dumping = Dumping { is_resumed: status["running"] != true, ended: None };
    let outcome = loop {
        match events.recv_timeout(PROGRESS_INTERVAL.min(deadline.remaining())) {
            Ok(event) => dumping.on_event(&event),
            Err(RecvTimeoutError::Timeout) => {
                deadline.check("QEMU to dump the memory")?;
                let status = run.execute(&qmp::query_dump {}, deadline)?;
                run.host().progress(run.machine(), fraction(&status));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::failed("QEMU ended during the memory dump"));
            }
        }
        if dumping.is_resumed
            && let Some(outcome) = dumping.ended.take()
        {
            break outcome;
        }
    };
    outcome.map_err(|why| {
        let failed = Error::failed(format!("QEMU cannot dump the memory to {}: {why}", path.display()));
        if why.contains("No space left") {
            failed.advice("Free some space on that file system")
        } else {
            failed
        }
    })?;
    run.host().progress(run.machine(), 1.0);
    output.finish()
}

/// The progress of a dump, by QEMU's events. QEMU pauses the guest meanwhile, and resumes it before or after
/// the event that the dump has finished.
struct Dumping {
    /// True if the guest runs again, or did not run before.
    is_resumed: bool,
    ended: Option<Result<(), String>>,
}

impl Dumping {
    fn on_event(&mut self, event: &Event) {
        match event.name.as_str() {
            "RESUME" => self.is_resumed = true,
            "STOP" => self.is_resumed = false,
            "DUMP_COMPLETED" => {
                let error = event.data["error"].as_str();
                self.ended = Some(error.map_or(Ok(()), |why| Err(why.to_owned())));
            }
            _ => {}
        }
    }
}

/// Returns QEMU's name of the format, if this QEMU can write it for this guest.
fn supported_format(run: &Run, format: DumpFormat, deadline: Deadline) -> Result<qmp::DumpGuestMemoryFormat> {
    let known = run.execute(&qmp::query_dump_guest_memory_capability {}, deadline)?;
    let names: Vec<&str> =
        known["formats"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if !names.contains(&format.as_str()) {
        return Err(Error::unsupported(&format!("the memory dump format '{}'", format.as_str()))
            .advice(format!("This QEMU offers {} for this guest", names.join(", "))));
    }
    Ok(match format {
        DumpFormat::Elf => qmp::DumpGuestMemoryFormat::elf,
        DumpFormat::KdumpZlib => qmp::DumpGuestMemoryFormat::kdump_zlib,
        DumpFormat::WinDmp => qmp::DumpGuestMemoryFormat::win_dmp,
    })
}

fn fraction(status: &Value) -> f64 {
    match (status["completed"].as_f64(), status["total"].as_f64()) {
        (Some(completed), Some(total)) if total > 0.0 => completed / total,
        _ => 0.0,
    }
}

/// Writes the guest's screen to `path`, as PNG.
///
/// # Errors
/// The machine has no screen, or the file cannot be written.
pub fn screenshot(run: &Run, path: &Path, deadline: Deadline) -> Result<()> {
    let png = run.version().screenshots_as_png();
    let output = Output::at(path)?;
    // QEMU opens the file for writing only, so the descriptor has to be open in the same mode.
    let for_qemu = OpenOptions::new().write(true).open(output.path());
    let for_qemu = for_qemu.map_err(|error| Error::io("write to", path, &error))?;
    run.qmp().with_path(for_qemu.as_fd(), deadline, |filename| {
        let format = png.then_some(qmp::ImageFormat::png);
        run.execute(&qmp::screendump { filename, format, device: None, head: None }, deadline)
    })?;
    if !png {
        convert_to_png(&output)?;
    }
    output.finish()
}

/// Converts the file from PPM to PNG, in place, for a QEMU that writes only PPM.
fn convert_to_png(output: &Output) -> Result<()> {
    let failed = |error| Error::io("convert the screenshot for", output.target(), &error);
    let ppm = fs::read(output.path()).map_err(failed)?;
    ppm_to_png(&ppm, fs::File::create(output.path()).map_err(failed)?)
}
