//! Saves a running guest: its memory and its devices become a snapshot.
//!
//! ```text
//! pause ─▶ QEMU migrates into a pipe ─▶ thread: counts, and compresses ─▶ file
//! ```
//!
//! QEMU never has the file, as with a [memory dump](crate::inspect). The stream is that of a snapshot which a restore
//! loads, compressed with zstd.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;

use machinery::{Deadline, Error, Result};
use machinery_backend::{Intake, Output};
use qapi::qmp::{self, MigrationCapability};
use serde_json::json;

use crate::qmp::wait_with_progress;
use crate::restore::{capabilities, migration_end};
use crate::run::Run;

/// The level of the compression: the fastest one that still finds the equal pages of a guest.
const LEVEL: i32 = 3;
/// A bandwidth beyond that of any disk, in bytes a second. QEMU's default is for a network.
const BANDWIDTH: u64 = 1 << 40;

/// Pauses the guest and writes its memory and devices to the new file `path`, as far as they have at most `limit` bytes.
/// The guest stays paused.
///
/// # Errors
/// The file cannot be written, or QEMU cannot save the guest. There is no file at `path` then.
pub fn save_memory(run: &Run, path: &Path, limit: u64, deadline: Deadline) -> Result<()> {
    let output = Output::at(path)?;
    let file = output.file().try_clone().map_err(|error| Error::io("write to", path, &error))?;
    let packed = Packed::new(file).map_err(|error| Error::failed(format!("cannot compress: {error}")))?;
    run.execute(&qmp::stop {}, deadline)?;
    run.execute(&capabilities(&[MigrationCapability::events]), deadline)?;
    run.execute(&bandwidth()?, deadline)?;
    let (intake, for_qemu) = Intake::new()?;
    let name = run.qmp().pass(for_qemu.as_fd(), true, deadline)?;
    drop(for_qemu);
    let copying = intake.copy_to(packed, limit)?;
    let events = run.qmp().listen();
    let migrate =
        qmp::migrate { uri: Some(format!("fd:{name}")), channels: None, detach: None, resume: None };
    run.execute(&migrate, deadline)?;
    let report = || run.host().progress(run.machine(), fraction(run, deadline));
    let saved = wait_with_progress(&events, deadline, "the memory to be saved", report, migration_end)?;
    let copied = copying.finish("QEMU", deadline);
    match (copied, saved) {
        (Ok(_), Ok(())) => {
            run.host().progress(run.machine(), 1.0);
            output.file().sync_all().map_err(|error| Error::io("write to", path, &error))?;
            output.finish()
        }
        // A copy that fails closes the pipe, so that QEMU fails, too.
        (Err(error), _) => Err(error.action(format!("saving the memory to {}", path.display()))),
        (Ok(_), Err(why)) => {
            Err(Error::failed(format!("the memory cannot be saved to {}: {why}", path.display())))
        }
    }
}

fn bandwidth() -> Result<qmp::migrate_set_parameters> {
    let parameters = serde_json::from_value(json!({"max-bandwidth": BANDWIDTH}));
    parameters.map_err(|error| Error::failed(format!("cannot set the bandwidth: {error}")))
}

/// Returns the part of the memory that is saved.
fn fraction(run: &Run, deadline: Deadline) -> f64 {
    let Ok(status) = run.execute(&qmp::query_migrate {}, deadline) else { return 0.0 };
    match (status["ram"]["remaining"].as_f64(), status["ram"]["total"].as_f64()) {
        (Some(remaining), Some(total)) if total > 0.0 => 1.0 - remaining / total,
        _ => 0.0,
    }
}

/// A file that is written compressed. A flush ends it.
struct Packed(Option<zstd::Encoder<'static, File>>);

impl Packed {
    fn new(file: File) -> io::Result<Packed> {
        let mut encoder = zstd::Encoder::new(file, LEVEL)?;
        encoder.include_checksum(true)?;
        Ok(Packed(Some(encoder)))
    }
}

impl Write for Packed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.as_mut().map_or(Err(io::ErrorKind::BrokenPipe.into()), |encoder| encoder.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.take().map_or(Ok(()), |encoder| encoder.finish().map(drop))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_file_is_whole_after_its_flush() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let mut packed = Packed::new(File::create_new(&path).unwrap()).unwrap();
        let content: Vec<u8> = (0..1 << 20).map(|index: u32| index.to_le_bytes()[1]).collect();
        packed.write_all(&content).unwrap();
        packed.flush().unwrap();
        assert!(zstd::decode_all(File::open(&path).unwrap()).unwrap() == content);
        assert!(packed.write(b"more").is_err());
    }
}
