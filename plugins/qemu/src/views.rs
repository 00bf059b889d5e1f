//! Looking at a running machine: its memory, its screen.
//!
//! Both are written beside their target and moved there when they are whole, so a failure leaves
//! nothing half-done.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use machinery::{Deadline, DumpFormat, Error, Host, Result};
use qapi::qmp;
use serde_json::Value;
use tempfile::NamedTempFile;

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
    let file = unfinished(path)?;
    // By descriptor: QEMU writes into our file, so owner and mode are the caller's.
    let name = run.qmp().pass(file.as_fd(), true, deadline)?;
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
    finish(file, path)
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
    let file = unfinished(path)?;
    // QEMU wants to open for writing only what was opened so.
    let for_qemu = OpenOptions::new().write(true).open(file.path());
    let for_qemu = for_qemu.map_err(|error| Error::io("write to", path, &error))?;
    run.qmp().with_path(for_qemu.as_fd(), deadline, |filename| {
        let format = png.then_some(qmp::ImageFormat::png);
        run.execute(&qmp::screendump { filename, format, device: None, head: None }, deadline)
    })?;
    if !png {
        ppm_to_png(file.path())?;
    }
    finish(file, path)
}

/// A file beside its target, under a name nobody can foresee, for its owner alone. It is removed
/// unless it is moved to its target.
fn unfinished(target: &Path) -> Result<NamedTempFile> {
    let failed = |error| Error::io("write to", target, &error);
    let folder = target.parent().ok_or_else(|| failed(io::ErrorKind::IsADirectory.into()))?;
    match std::fs::symlink_metadata(target) {
        Ok(there) if !there.is_file() => Err(Error::environment(format!(
            "cannot write to {}: something is there that is no file",
            target.display()
        ))
        .advice("Name a file, or a path where nothing is")),
        _ => tempfile::Builder::new().prefix(".unfinished-").tempfile_in(folder).map_err(failed),
    }
}

fn finish(file: NamedTempFile, target: &Path) -> Result<()> {
    file.persist(target).map(drop).map_err(|error| Error::io("write to", target, &error.error))
}

/// For a QEMU that writes PPM only: turns the file into PNG, in place.
fn ppm_to_png(path: &Path) -> Result<()> {
    let mut ppm = Vec::new();
    let failed = |error| Error::io("convert the screenshot", path, &error);
    File::open(path).and_then(|mut file| file.read_to_end(&mut ppm)).map_err(failed)?;
    let wrong = || Error::failed("QEMU's screenshot is not a PPM image");
    let (width, height, pixels) = read_ppm(&ppm).ok_or_else(wrong)?;
    let file = BufWriter::new(File::create(path).map_err(failed)?);
    let mut encoder = png::Encoder::new(file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let written =
        encoder.write_header().and_then(|mut png| png.write_image_data(pixels).and_then(|()| png.finish()));
    written.map_err(|error| Error::failed(format!("cannot write {}: {error}", path.display())))
}

/// Width, height and pixels of what QEMU writes: `P6`, no comments, 255 levels.
fn read_ppm(ppm: &[u8]) -> Option<(u32, u32, &[u8])> {
    let mut rest = ppm.strip_prefix(b"P6")?;
    let mut number = || {
        rest = rest.trim_ascii_start();
        let length = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (digits, after) = rest.split_at(length);
        rest = after;
        std::str::from_utf8(digits).ok()?.parse::<u32>().ok()
    };
    let (width, height, levels) = (number()?, number()?, number()?);
    let pixels = rest.get(1..)?;
    let length = usize::try_from(width).ok()?.checked_mul(height.try_into().ok()?)?.checked_mul(3)?;
    (levels == 255 && pixels.len() == length).then_some((width, height, pixels))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ppm_becomes_a_png() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"P6\n2 1\n255\n\x01\x02\x03\x0a\x0b\x0c").unwrap();
        ppm_to_png(file.path()).unwrap();
        let decoder = png::Decoder::new(std::io::BufReader::new(File::open(file.path()).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; 6];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!(pixels, [1, 2, 3, 10, 11, 12]);
    }

    #[test]
    fn half_an_image_is_none() {
        for bytes in
            [&b""[..], b"P6", b"P6\n2 1\n255\n\x01", b"P5\n1 1\n255\nx", b"P6\n99999999 99999999\n255\n"]
        {
            assert!(read_ppm(bytes).is_none(), "{bytes:?}");
        }
    }

    #[test]
    fn what_is_not_finished_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("shot.png");
        drop(unfinished(&target).unwrap());
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
        finish(unfinished(&target).unwrap(), &target).unwrap();
        assert!(target.is_file());
        // What is no file is not replaced by one.
        let text = unfinished(folder.path()).unwrap_err().to_string();
        assert!(text.contains("no file"), "{text}");
        assert!(unfinished(Path::new("/none/x")).unwrap_err().to_string().contains("/none/x"));
    }
}
