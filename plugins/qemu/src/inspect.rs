//! Inspects a running machine: memory dump and screenshot.
//!
//! QEMU writes a dump into a pipe and a screenshot into a file in memory, and the plugin copies them into the file. So QEMU
//! never has the file, and cannot change it later or fill the disk. The file appears under its name only when it is
//! complete.

use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use machinery::{Deadline, DumpFormat, Error, ErrorKind, Result};
use machinery_backend::{Intake, MemoryFile, Output, ppm_to_png};
use qapi::qmp;
use serde_json::Value;

use crate::qmp::Event;
use crate::run::Run;

/// The interval at which the progress of a dump is queried. The end of a dump is an event.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// The size of a screenshot as QEMU writes it, in bytes, at most.
const MAX_PICTURE: u64 = 64 << 20;
/// The time that QEMU has to close the pipe of a dump that has failed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Writes the guest's memory to `path`, as far as it has at most `limit` bytes.
///
/// # Errors
/// This QEMU does not offer the format, the file cannot be written, or the dump fails or is too large.
pub fn dump_memory(run: &Run, path: &Path, format: DumpFormat, limit: u64, deadline: Deadline) -> Result<()> {
    let format = supported_format(run, format, deadline)?;
    let status = run.execute(&qmp::query_status {}, deadline)?;
    let output = Output::at(path)?;
    let (intake, for_qemu) = Intake::new()?;
    let name = run.qmp().pass(for_qemu.as_fd(), true, deadline)?;
    drop(for_qemu);
    let file = output.file().try_clone().map_err(|error| Error::io("write to", path, &error))?;
    let copying = intake.copy_to(file, limit)?;
    let events = run.qmp().listen();
    let dump = qmp::dump_guest_memory {
        paging: false,
        protocol: format!("fd:{name}"),
        detach: Some(true),
        format: Some(format),
        begin: None,
        length: None,
    };
    if let Err(error) = run.execute(&dump, deadline) {
        // A QEMU that has taken the pipe has no pipe of that name any more.
        let _ = run.execute(&qmp::closefd { fdname: name }, deadline);
        return Err(error);
    }
    let dumping = Dumping { is_resumed: status["running"] != true, ended: None };
    let failure = wait_for_end(run, &events, dumping, deadline)?;
    let copied = match &failure {
        None => copying.finish("QEMU", deadline),
        Some(_) => copying.finish("QEMU", deadline.within(CLOSE_TIMEOUT)),
    };
    match (copied, failure) {
        (Ok(_), None) => {
            run.host().progress(run.machine(), 1.0);
            output.finish()
        }
        // A copy that fails closes the pipe, so that QEMU fails, too.
        (Err(error), None) => Err(error),
        (Err(error), Some(_)) if error.kind() != ErrorKind::Timeout => Err(not_dumped(path, error.reason())),
        (_, Some(why)) => Err(not_dumped(path, &why)),
    }
}

fn not_dumped(path: &Path, why: &str) -> Error {
    let failed = Error::failed(format!("QEMU cannot dump the memory to {}: {why}", path.display()));
    if why.contains("No space left") { failed.advice("Free some space on that file system") } else { failed }
}

/// Waits until QEMU has ended the dump and resumed the guest. Returns QEMU's reason if the dump has failed.
fn wait_for_end(
    run: &Run,
    events: &Receiver<Event>,
    mut dumping: Dumping,
    deadline: Deadline,
) -> Result<Option<String>> {
    loop {
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
            return Ok(outcome.err());
        }
    }
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
    let memory = MemoryFile::new()?;
    // QEMU opens the file for writing only, so the descriptor has to be open in the same mode.
    let for_qemu = memory.for_writing()?;
    let taken = run.qmp().with_path(for_qemu.as_fd(), deadline, |filename| {
        let format = png.then_some(qmp::ImageFormat::png);
        run.execute(&qmp::screendump { filename, format, device: None, head: None }, deadline)
    });
    let picture = memory.take(MAX_PICTURE);
    taken?;
    let (picture, mut file) = (picture?, output.file());
    if png {
        file.write_all(&picture).map_err(|error| Error::io("write the screenshot to", path, &error))?;
    } else {
        ppm_to_png(&picture, file)?;
    }
    output.finish()
}
