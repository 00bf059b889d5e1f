//! The record of a run, by which the next host adopts it.
//!
//! The name of the file is the progress of the run. A change is one rename, so that it costs a restore nothing.
//!
//! ```text
//! begin ─▶ MACHINE.starting ─┬─ loaded, to wait ─▶ MACHINE.standby ─┬─ resumed ─▶ MACHINE.run ─▶ removed with the run
//!                            └───────────────────────────────────────┘
//! ```
//!
//! A host that dies in between leaves the earlier name. The next host ends a run in preparation, and a start
//! that was under way.

use std::fs;
use std::path::{Path, PathBuf};

use machinery::Result;
use machinery_backend::files;
use machinery_backend::process::ProcessIdentity;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::version::Version;

/// The format of the file. A host does not adopt a run of another format.
const FORMAT: u32 = 1;

/// The facts about a run that the next host needs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    format: u32,
    pub process: ProcessIdentity,
    /// The version of QEMU, which may be replaced while the run lasts.
    pub version: Version,
    pub overlays: Vec<PathBuf>,
    /// The files that QEMU writes, the overlays among them.
    pub writes: Vec<PathBuf>,
    /// The sockets that are removed with the run.
    pub sockets: Vec<PathBuf>,
    /// The interface of an isolated run on the host.
    #[serde(default)]
    pub interface: Option<String>,
    /// The origin of a standby; null of every other run.
    pub standby: Value,
}

/// The progress of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    Starting,
    Standby,
    Running,
}

impl Progress {
    const ALL: [Progress; 3] = [Progress::Running, Progress::Standby, Progress::Starting];

    /// Returns the end of the file's name.
    fn suffix(self) -> &'static str {
        match self {
            Progress::Starting => "starting",
            Progress::Standby => "standby",
            Progress::Running => "run",
        }
    }
}

/// The place of a machine's record.
#[derive(Debug, Clone)]
pub struct RecordFile {
    folder: PathBuf,
    machine: String,
}

impl RecordFile {
    /// Returns the place of the machine's record in that folder.
    pub fn of(machine: &str, folder: &Path) -> RecordFile {
        RecordFile { folder: folder.to_owned(), machine: machine.to_owned() }
    }

    /// Returns the places of all records in that folder, also of machines that are not configured any more.
    pub fn all(folder: &Path) -> Vec<RecordFile> {
        let machines = |progress: Progress| files::stems(folder, &format!(".{}", progress.suffix()));
        let machines = Progress::ALL.into_iter().flat_map(machines);
        machines.map(|machine| RecordFile::of(&machine, folder)).collect()
    }

    /// Returns the name of the machine.
    pub fn machine(&self) -> &str {
        &self.machine
    }

    /// Records a run that begins.
    pub fn begin(&self, record: &Record) {
        self.written(files::replace_json(&self.path(Progress::Starting), record));
    }

    /// Records that the run is a standby.
    pub fn set_standby(&self, standby: Value) {
        let Some(record) = read(&self.path(Progress::Starting)) else { return };
        let record = Record { standby, ..record };
        self.written(files::replace_json(&self.path(Progress::Starting), &record));
        self.rename(Progress::Starting, Progress::Standby);
    }

    /// Records that the guest runs.
    pub fn set_running(&self) {
        let renamed = [Progress::Standby, Progress::Starting]
            .into_iter()
            .any(|before| self.rename(before, Progress::Running));
        if !renamed && !self.is_of_run() {
            let machine = &self.machine;
            tracing::warn!(machine, "the run would end with this host: its record cannot be renamed");
        }
    }

    /// Returns the record that there is, and how far its run was.
    pub fn read(&self) -> Option<(Progress, Record)> {
        Progress::ALL.into_iter().find_map(|progress| Some((progress, read(&self.path(progress))?)))
    }

    /// Reports whether there is a record of a resumed run, also one that this host cannot read.
    pub fn is_of_run(&self) -> bool {
        self.path(Progress::Running).exists()
    }

    /// Removes the record: the run has ended.
    pub fn remove(&self) {
        for progress in Progress::ALL {
            if let Err(error) = files::remove(&self.path(progress)) {
                tracing::warn!(machine = self.machine, %error, "the record of a run remains");
            }
        }
    }

    fn path(&self, progress: Progress) -> PathBuf {
        self.folder.join(format!("{}.{}", self.machine, progress.suffix()))
    }

    fn rename(&self, from: Progress, to: Progress) -> bool {
        fs::rename(self.path(from), self.path(to)).is_ok()
    }

    fn written(&self, written: Result<()>) {
        if let Err(error) = written {
            let machine = &self.machine;
            tracing::warn!(machine, %error, "the run would end with this host: its record cannot be written");
        }
    }
}

impl Record {
    /// Returns the record of a run that begins.
    pub fn new(
        process: ProcessIdentity,
        version: Version,
        overlays: Vec<PathBuf>,
        writes: Vec<PathBuf>,
        sockets: Vec<PathBuf>,
    ) -> Record {
        let (interface, standby) = (None, Value::Null);
        Record { format: FORMAT, process, version, overlays, writes, sockets, interface, standby }
    }

    /// Adds the interface of an isolated run.
    pub fn with_interface(self, interface: Option<&str>) -> Record {
        Record { interface: interface.map(str::to_owned), ..self }
    }
}

fn read(path: &Path) -> Option<Record> {
    let text = fs::read_to_string(path).ok()?;
    let record: Record = serde_json::from_str(&text)
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "a record cannot be read"))
        .ok()?;
    (record.format == FORMAT).then_some(record)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::getpid;

    /// Records the beginning of a run of this process.
    fn begun(machine: &str, folder: &Path) -> RecordFile {
        let file = RecordFile::of(machine, folder);
        let overlays = vec![folder.join("overlay")];
        let process = ProcessIdentity::of(getpid()).unwrap();
        file.begin(&Record::new(process, Version::new(7, 2, 0), overlays, Vec::new(), Vec::new()));
        file
    }

    fn progress(file: &RecordFile) -> Option<Progress> {
        file.read().map(|(progress, _)| progress)
    }

    #[test]
    fn record_has_the_progress_of_its_run_until_the_run_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let file = begun("m", folder.path());
        assert_eq!((progress(&file), file.is_of_run()), (Some(Progress::Starting), false));
        file.set_standby(Value::from("origin"));
        let (progress_now, record) = file.read().unwrap();
        assert_eq!((progress_now, file.is_of_run()), (Progress::Standby, false));
        assert_eq!(record.standby, Value::from("origin"));
        assert_eq!(record.overlays, [folder.path().join("overlay")]);
        file.set_running();
        assert_eq!((progress(&file), file.is_of_run()), (Some(Progress::Running), true));
        file.remove();
        assert_eq!((progress(&file), file.is_of_run()), (None, false));
        assert!(folder.path().read_dir().unwrap().next().is_none());
    }

    #[test]
    fn record_of_a_start_becomes_one_of_a_run_without_a_standby() {
        let folder = tempfile::tempdir().unwrap();
        let file = begun("m", folder.path());
        file.set_running();
        let (progress, record) = file.read().unwrap();
        assert_eq!((progress, record.standby), (Progress::Running, Value::Null));
    }

    #[test]
    fn records_are_listed_with_their_machines_at_each_progress() {
        let folder = tempfile::tempdir().unwrap();
        begun("a", folder.path());
        begun("b.c", folder.path()).set_standby(Value::Null);
        begun("d", folder.path()).set_running();
        fs::write(folder.path().join("other.json"), "").unwrap();
        let all = RecordFile::all(folder.path());
        let mut machines: Vec<_> = all.iter().map(RecordFile::machine).collect();
        machines.sort_unstable();
        assert_eq!(machines, ["a", "b.c", "d"]);
    }

    #[test]
    fn record_is_ignored_but_known_when_its_format_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let file = begun("m", folder.path());
        let (_, record) = file.read().unwrap();
        file.begin(&Record { format: FORMAT + 1, ..record });
        file.set_running();
        assert!(file.read().is_none() && file.is_of_run());
    }

    #[test]
    fn later_host_reads_the_names_of_records_that_this_one_writes() {
        let suffixes = Progress::ALL.map(Progress::suffix);
        assert_eq!(suffixes, ["run", "standby", "starting"], "an upgrade adopts by these names");
    }
}
