//! Looking at a running machine: its memory, its screen.
//!
//! Both are [`Output`]s: a failure leaves nothing half-done.

use std::fs::{self, OpenOptions};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use machinery::{Deadline, DumpFormat, Error, Host, Result};
use machinery_views::{Output, ppm_to_png};
use qapi::qmp;
use serde_json::Value;

use crate::qmp::Event;
use crate::run::Run;

/// How often the progress of a dump is asked for; its end is an event.
const PROGRESS: Duration = Duration::from_millis(250);

/// Writes the guest's memory to `path`.
///
/// # Errors
/// The format is not offered by this QEMU, the file cannot be written, the dump fails.
pub fn dump_memory(
    run: &Run,
    machine: &str,
    path: &Path,
    format: DumpFormat,
    host: &Host,
    deadline: Deadline,
) -> Result<()> {
    let qemus = offered(run, format, deadline)?;
    let status = run.execute(&qmp::query_status {}, deadline)?;
    let output = Output::at(path)?;
    // By descriptor: QEMU writes into our file, so owner and mode are the caller's.
    let name = run.qmp().pass(output.file().as_fd(), true, deadline)?;
    let events = run.qmp().listen();
    let dump = qmp::dump_guest_memory {
        paging: false,
        protocol: format!("fd:{name}"),
        detach: Some(true),
        format: Some(qemus),
        begin: None,
        length: None,
    };
    run.execute(&dump, deadline)?;
    let mut dumping = Dumping { goes_on: status["running"] != true, ended: None };
    let outcome = loop {
        match events.recv_timeout(PROGRESS.min(deadline.remaining())) {
            Ok(event) => dumping.heard(&event),
            Err(RecvTimeoutError::Timeout) => {
                deadline.check("QEMU to dump the memory")?;
                let status = run.execute(&qmp::query_dump {}, deadline)?;
                host.progress(machine, fraction(&status));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::failed("QEMU ended during the memory dump"));
            }
        }
        if dumping.goes_on
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
    host.progress(machine, 1.0);
    output.finish()
}

/// What QEMU has told of a dump. The guest is held meanwhile, and goes on before or after QEMU says
/// that it has finished.
struct Dumping {
    goes_on: bool,
    ended: Option<Result<(), String>>,
}

impl Dumping {
    fn heard(&mut self, event: &Event) {
        match event.name.as_str() {
            "RESUME" => self.goes_on = true,
            "STOP" => self.goes_on = false,
            "DUMP_COMPLETED" => {
                let error = event.data["error"].as_str();
                self.ended = Some(error.map_or(Ok(()), |why| Err(why.to_owned())));
            }
            _ => {}
        }
    }
}

/// The format by QEMU's name, if this QEMU can write it for this guest.
fn offered(run: &Run, format: DumpFormat, deadline: Deadline) -> Result<qmp::DumpGuestMemoryFormat> {
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

/// Writes what the guest's screen shows to `path`, as PNG.
///
/// # Errors
/// The machine has no screen, the file cannot be written.
pub fn screenshot(run: &Run, path: &Path, deadline: Deadline) -> Result<()> {
    let png = run.version().screenshots_as_png();
    let output = Output::at(path)?;
    // QEMU wants to open for writing only what was opened so.
    let for_qemu = OpenOptions::new().write(true).open(output.path());
    let for_qemu = for_qemu.map_err(|error| Error::io("write to", path, &error))?;
    run.qmp().with_path(for_qemu.as_fd(), deadline, |filename| {
        let format = png.then_some(qmp::ImageFormat::png);
        run.execute(&qmp::screendump { filename, format, device: None, head: None }, deadline)
    })?;
    if !png {
        as_png(&output)?;
    }
    output.finish()
}

/// For a QEMU that writes PPM only: turns the file into PNG, in place.
fn as_png(output: &Output) -> Result<()> {
    let failed = |error| Error::io("convert the screenshot for", output.target(), &error);
    let ppm = fs::read(output.path()).map_err(failed)?;
    ppm_to_png(&ppm, fs::File::create(output.path()).map_err(failed)?)
}
