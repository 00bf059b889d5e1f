//! Loads the memory that the paused guest continues from, and saves the guest's devices.
//!
//! | memory | how QEMU gets it |
//! | --- | --- |
//! | a plain snapshot | by its path, or by descriptor where QEMU cannot take the path |
//! | a compressed snapshot | from a pipe that this plugin decompresses into |
//! | a template | its RAM is mapped at the start of QEMU; only the devices are loaded |
//!
//! All of them are incoming migrations, whose end is an event.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use machinery::{Deadline, Error, ErrorKind, Result};
use machinery_backend::process::End;
use qapi::qmp::{self, MigrationCapability};

use crate::progress;
use crate::qmp::{Event, wait, wait_with_progress};
use crate::refusal::{self, Refusal};
use crate::run::{EXIT_GRACE, Run};
use crate::snapshot::{self, Feeder, Format, Snapshot};

/// The memory that is loaded before the guest runs.
pub enum Load {
    /// Nothing: a cold boot.
    Nothing,
    Snapshot(Snapshot),
    /// The state of the devices; the RAM is mapped already.
    Devices(Devices),
}

/// The state of a machine's devices. The file is open and read from its beginning.
pub struct Devices {
    pub path: PathBuf,
    pub file: File,
}

impl Run {
    /// Loads the memory that the guest continues from; the guest stays paused. This is the first step after
    /// [`Run::begin`].
    ///
    /// # Errors
    /// QEMU refuses it, or takes too long. The run still exists then.
    pub fn load(&self, load: Load, deadline: Deadline) -> Result<()> {
        self.negotiate(deadline)?;
        // A QEMU that answers has already reported all problems of its devices.
        self.process().begin_step();
        match load {
            Load::Nothing => Ok(()),
            Load::Snapshot(snapshot) => self.load_snapshot(snapshot, deadline),
            Load::Devices(devices) => self.load_devices(devices, deadline),
        }
    }

    /// Loads a template's devices. The commands go out together, and only the end is waited for.
    fn load_devices(&self, devices: Devices, deadline: Deadline) -> Result<()> {
        let events = self.qmp().listen();
        let capabilities = capabilities(&[MigrationCapability::events, MigrationCapability::x_ignore_shared]);
        let batch = self.qmp().batch().with(&capabilities)?;
        let batch = match self.version().reads_snapshot_files() {
            true => batch.with(&file_set())?.with(&incoming(FILE_SET_URI.to_owned()))?,
            false => {
                let name = qmp::getfd { fdname: "devices".to_owned() };
                batch.with(&name)?.with(&incoming("fd:devices".to_owned()))?
            }
        };
        batch.run(Some(devices.file.as_fd()), deadline)?;
        wait(&events, deadline, "the template to be loaded", migration_end)?.map_err(|why| {
            Error::failed(format!("the template's {} cannot be loaded: {why}", devices.path.display()))
        })
    }

    /// Writes the paused guest's state without its RAM to the new file `path`.
    ///
    /// # Errors
    /// QEMU cannot, or takes too long.
    pub fn save_devices(&self, path: &Path, deadline: Deadline) -> Result<()> {
        // QEMU takes a file only in the mode in which it would open it: for writing alone.
        let file = File::options().write(true).create_new(true).open(path);
        let file = file.map_err(|error| Error::io("make", path, &error))?;
        self.process().begin_step();
        self.execute(&capabilities(&[MigrationCapability::x_ignore_shared]), deadline)?;
        let events = self.qmp().listen();
        let uri = self.pass_file(file.into(), deadline)?;
        self.execute(&qmp::migrate { uri: Some(uri), channels: None, detach: None, resume: None }, deadline)?;
        wait(&events, deadline, "the devices to be saved", migration_end)?
            .map_err(|why| Error::failed(format!("the devices cannot be saved to {}: {why}", path.display())))
    }

    fn load_snapshot(&self, snapshot: Snapshot, deadline: Deadline) -> Result<()> {
        self.execute(&capabilities(&[MigrationCapability::events]), deadline)?;
        let events = self.qmp().listen();
        let (path, format) = (snapshot.path().to_owned(), snapshot.format());
        let plain = format == Format::Plain;
        let (uri, feeder) = if !plain {
            let (pipe, feeder) = snapshot.decompress()?;
            (self.pass(pipe.into(), deadline)?, Some(feeder))
        } else {
            (self.pass_file(snapshot.into_file(), deadline)?, None)
        };
        self.execute(&incoming(uri), deadline)?;
        let reader = if plain { self.process().pid() } else { std::process::id() };
        let report = || self.host().progress(self.machine(), progress::of(reader, &path));
        let loaded =
            wait_with_progress(&events, deadline, "the snapshot to be loaded", report, migration_end)
                .and_then(|outcome| outcome.map_err(Error::failed));
        match loaded {
            Ok(()) => feeder.map_or(Ok(()), |feeder| feeder.finish(true)),
            Err(error) => Err(self.explain_failed_load(error, feeder, &path, format)),
        }
    }

    /// Distinguishes the causes of a failed load: a file that cannot be read to its end, a QEMU that is too
    /// slow or was killed, and a QEMU that refuses the content.
    fn explain_failed_load(
        &self,
        error: Error,
        feeder: Option<Feeder>,
        path: &Path,
        format: Format,
    ) -> Error {
        let too_slow = error.kind() == ErrorKind::Timeout;
        let end = if too_slow { None } else { self.wait_end(EXIT_GRACE) };
        if end.is_none() {
            self.end_soon();
        }
        let read = feeder.map_or_else(|| snapshot::is_whole(path), |feeder| feeder.finish(false));
        if too_slow || end.as_ref().is_some_and(End::by_signal) {
            return error;
        }
        match (read, refusal::refused(path, format, end.as_ref().map_or("", End::output))) {
            (_, Refusal::Known(refused)) => refused,
            (Err(unreadable), _) => unreadable,
            (Ok(()), Refusal::EndsEarly) => snapshot::broken(path, format, "it ends early"),
            (Ok(()), Refusal::Unknown(refused)) => refused,
        }
    }

    /// Passes a plain file to QEMU, and returns its URI.
    fn pass_file(&self, file: OwnedFd, deadline: Deadline) -> Result<String> {
        if !self.version().reads_snapshot_files() {
            return self.pass(file, deadline);
        }
        self.qmp().batch().with(&file_set())?.run(Some(file.as_fd()), deadline)?;
        Ok(FILE_SET_URI.to_owned())
    }

    fn pass(&self, file: OwnedFd, deadline: Deadline) -> Result<String> {
        let name = self.qmp().pass(file.as_fd(), self.version().incoming_by_name(), deadline)?;
        Ok(format!("fd:{name}"))
    }
}

/// The number of the set of descriptors that has the file of a migration, and the URI by which QEMU opens it. A QEMU in
/// its jail can open no file by its path. Source: `qemu_open_internal` in QEMU's util/osdep.c.
const FILE_SET: i64 = 1000;
const FILE_SET_URI: &str = "file:/dev/fdset/1000";

fn file_set() -> qmp::add_fd {
    qmp::add_fd { fdset_id: Some(FILE_SET), opaque: None }
}

pub fn capabilities(on: &[MigrationCapability]) -> qmp::migrate_set_capabilities {
    let status = |capability: &MigrationCapability| qmp::MigrationCapabilityStatus {
        capability: *capability,
        state: true,
    };
    qmp::migrate_set_capabilities { capabilities: on.iter().map(status).collect() }
}

fn incoming(uri: String) -> qmp::migrate_incoming {
    qmp::migrate_incoming { uri: Some(uri), channels: None, exit_on_error: None }
}

/// Returns the outcome of a migration, if the event is its end: success, or the reason of the failure.
pub fn migration_end(event: &Event) -> Option<Result<(), String>> {
    if event.name != "MIGRATION" {
        return None;
    }
    match event.data["status"].as_str()? {
        "completed" => Some(Ok(())),
        status @ ("failed" | "cancelled") => {
            Some(Err(format!("QEMU reports that the migration has {status}")))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn migration_ends_when_it_is_completed_or_failed() {
        let end = |status: &str| {
            migration_end(&Event { name: "MIGRATION".into(), data: json!({"status": status}) })
        };
        assert_eq!(end("completed"), Some(Ok(())));
        assert!(end("failed").unwrap().is_err());
        assert_eq!(end("active"), None);
        assert_eq!(end("from-the-future"), None);
    }
}
