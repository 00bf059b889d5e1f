//! Inspection of a running machine: its memory and its screen.
//!
//! Both are written to an [`Output`], so a failure leaves no partial file. libvirtd passes the file of a dump to QEMU,
//! which may keep it open. So libvirtd gets a named pipe, and the plugin copies from it into the file: QEMU cannot
//! change the file later or fill the disk. The file belongs to the host's user.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use machinery::{Deadline, DumpFormat, Error, ErrorKind, Result};
use machinery_backend::{Intake, Output, is_ppm, ppm_to_png, refuse};
use virt::connect::Connect;
use virt::domain::{Domain, DomainState};
use virt::enumutil::Enum;
use virt::stream::Stream;
use virt_sys as sys;

use crate::connection::Connection;
use crate::domain::running;
use crate::dsn::is_local;
use crate::errors::{explain, is_off, is_unsupported};

/// The interval between two requests for the progress of a dump.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);
/// The additional time for a dump that timed out, so that the machine is free again. libvirt cannot abort a
/// memory-only dump. Source: its src/qemu/qemu_driver.c.
const DUMP_GRACE: Duration = Duration::from_secs(1);
/// The time that libvirtd and QEMU have to close the pipe of a dump that has failed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// The memory that a dump may have beside that of the guest: the headers, the firmware, and the memory of graphics
/// cards.
const DUMP_OVERHEAD: u64 = 256 << 20;
/// The name of the pipe, in the folder of the unfinished file.
const PIPE: &str = "pipe";
/// The maximum size of a screenshot, in bytes.
const MAX_SCREENSHOT: usize = 64 << 20;

const PNG: &[u8] = b"\x89PNG";

/// Writes the guest's memory to `path`, and reports to `progress` meanwhile.
///
/// # Errors
/// The machine is off; libvirt is on another computer, and would write the file there; the dump fails.
pub fn dump_memory(
    connection: &Connection,
    label: &str,
    path: &Path,
    format: DumpFormat,
    progress: &dyn Fn(f64),
    deadline: Deadline,
) -> Result<()> {
    if !is_local(connection.dsn()) {
        let what = format!("dump_memory over {}, which would write to that host's disk", connection.dsn());
        return Err(Error::unsupported(&what));
    }
    let output = Output::at(path)?;
    let limit = max_dump(connection, label, deadline)?;
    let to = output.path().with_file_name(PIPE);
    let file = output.file().try_clone().map_err(|error| Error::io("write to", path, &error))?;
    let copying = Intake::at(&to)?.copy_to(file, limit)?;
    let (label, dumped) = (label.to_owned(), label.to_owned());
    let call = connection
        .long_call(deadline, drop, move |connect| dump(&running(connect, &dumped)?, &to, format))?;
    let mut reached = 0.0;
    let outcome = loop {
        if let Some(outcome) = call.wait(PROGRESS_INTERVAL.min(deadline.remaining())) {
            break outcome;
        }
        if deadline.passed() {
            let _ = call.wait(DUMP_GRACE);
            break Err(deadline.timeout("libvirt to dump the memory"));
        }
        // libvirt reports nothing any more once QEMU has ended the dump.
        reached = f64::max(reached, fraction(connection, &label, deadline));
        progress(reached);
    };
    let patience = if outcome.is_ok() { deadline } else { deadline.within(CLOSE_TIMEOUT) };
    let copied = copying.finish("QEMU", patience);
    let failed = |error: Error| error.detail(&format!("the dump's file is {}", path.display()));
    match (copied, outcome) {
        (Ok(_), Ok(())) => {
            progress(1.0);
            output.finish()
        }
        // A copy that fails closes the pipe, so that QEMU fails, too.
        (Err(error), Err(_)) if error.kind() != ErrorKind::Timeout => Err(failed(error)),
        (Err(error), Ok(())) | (_, Err(error)) => Err(failed(error)),
    }
}

/// Returns the size of a dump of that domain, in bytes, at most, by its definition.
fn max_dump(connection: &Connection, label: &str, deadline: Deadline) -> Result<u64> {
    let label = label.to_owned();
    connection.ask(deadline, "libvirt to report the size of the memory", move |connect| {
        let kib = running(connect, &label)?.max_memory();
        let kib = kib.map_err(|error| explain("report the size of the memory", &error))?;
        Ok(kib.saturating_mul(1024).saturating_add(DUMP_OVERHEAD))
    })
}

fn dump(domain: &Domain, to: &Path, format: DumpFormat) -> Result<()> {
    let dump_format = match format {
        DumpFormat::Elf => sys::VIR_DOMAIN_CORE_DUMP_FORMAT_RAW,
        DumpFormat::KdumpZlib => sys::VIR_DOMAIN_CORE_DUMP_FORMAT_KDUMP_ZLIB,
        DumpFormat::WinDmp => sys::VIR_DOMAIN_CORE_DUMP_FORMAT_WIN_DMP,
    };
    let path = to.to_str().ok_or_else(|| {
        Error::environment(format!("libvirt takes no path that is not UTF-8: {}", to.display()))
    })?;
    domain.core_dump_with_format(path, dump_format, sys::VIR_DUMP_MEMORY_ONLY).map_err(|error| {
        if is_unsupported(&error) {
            let what = format!("the memory dump format '{}' with this libvirt and QEMU", format.as_str());
            return Error::unsupported(&what).detail(error.message());
        }
        explain("dump the memory", &error)
    })
}

/// Returns the progress of the dump from libvirt's job statistics, from 0 to 1.
fn fraction(connection: &Connection, label: &str, deadline: Deadline) -> f64 {
    let label = label.to_owned();
    let asked = connection.ask(deadline, "libvirt to report the progress of the dump", move |connect| {
        let job = running(connect, &label)?.job_info();
        job.map_err(|error| explain("report the progress of the dump", &error))
    });
    let Ok(job) = asked else { return 0.0 };
    let known = [(job.data_processed, job.data_total), (job.mem_processed, job.mem_total)];
    let fraction = known.into_iter().find_map(|pair| match pair {
        (Some(done), Some(total)) if total > 0 => Some(done as f64 / total as f64),
        _ => None,
    });
    fraction.unwrap_or(0.0)
}

/// Writes the guest's screen to `path`, as PNG.
///
/// # Errors
/// The machine is off or has no screen; the file cannot be written.
pub fn screenshot(connection: &Connection, label: &str, path: &Path, deadline: Deadline) -> Result<()> {
    let output = Output::at(path)?;
    let label = label.to_owned();
    let picture =
        connection.ask(deadline, "libvirt to take a screenshot", move |connect| picture(connect, &label))?;
    let mut file = output.file();
    if is_ppm(&picture) {
        ppm_to_png(&picture, file)?;
    } else if picture.starts_with(PNG) {
        file.write_all(&picture).map_err(|error| Error::io("write the screenshot to", path, &error))?;
    } else {
        return Err(Error::failed("libvirt's screenshot is neither a PNG nor a PPM image"));
    }
    output.finish()
}

fn picture(connect: &Connect, label: &str) -> Result<Vec<u8>> {
    let failed = |error| explain("take a screenshot", &error);
    let domain = running(connect, label)?;
    let stream = Stream::new(connect, 0).map_err(failed)?;
    domain.screenshot(&stream, 0, 0).map_err(|error| no_screenshot(&domain, &error))?;
    let mut picture = Vec::new();
    let mut piece = vec![0; 256 << 10];
    loop {
        let length = stream.recv(&mut piece).map_err(failed)?;
        let Some(received) = usize::try_from(length).ok().and_then(|length| piece.get(..length)) else {
            return Err(Error::failed(format!("libvirt's screenshot is incomplete ({length})")));
        };
        if received.is_empty() {
            stream.finish().map_err(failed)?;
            return Ok(picture);
        }
        picture.extend_from_slice(received);
        if picture.len() > MAX_SCREENSHOT {
            return Err(Error::failed("libvirt's screenshot is larger than any screen"));
        }
    }
}

/// Explains a failed screenshot. A guest that is paused is in order, and has a screen again later.
fn no_screenshot(domain: &Domain, error: &virt::error::Error) -> Error {
    let failed = explain("take a screenshot", error);
    match domain.state() {
        Ok((Enum::Known(DomainState::Paused | DomainState::PMSuspended), _)) if is_off(error) => {
            Error::not_now(failed.reason()).advice("Take it when the guest runs again")
        }
        Ok((Enum::Known(DomainState::Shutoff), _)) => refuse::off(),
        _ => failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use machinery::ErrorKind;

    /// libvirt's test driver has a domain in memory, and the errors that other drivers return.
    #[test]
    fn screenshot_is_not_possible_now_when_libvirt_refuses_it_of_a_paused_guest() {
        virt::error::clear_error_callback();
        let connect = Connect::open(Some("test:///default")).unwrap();
        let domain = running(&connect, "test").unwrap();
        let other = connect.lookup_domain_by_name("none").unwrap_err();
        domain.destroy().unwrap();
        let refused = domain.destroy().unwrap_err();
        assert_eq!(no_screenshot(&domain, &refused).kind(), ErrorKind::UnexpectedState);
        domain.create().unwrap();
        assert_eq!(no_screenshot(&domain, &refused).kind(), ErrorKind::Failed);
        domain.suspend().unwrap();
        let error = no_screenshot(&domain, &refused);
        assert_eq!(error.kind(), ErrorKind::NotNow, "{error}");
        assert!(error.to_string().contains(refused.message()), "{error}");
        assert_ne!(no_screenshot(&domain, &other).kind(), ErrorKind::NotNow);
    }
}
