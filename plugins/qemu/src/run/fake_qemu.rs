//! A run for unit tests, whose QEMU is a process that only waits, and a thread that answers on the monitor.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use machinery::{Deadline, Host, HostServices, LogLevel, LogRecord, RestoreReadiness, State};
use machinery_backend::Overlays;
use machinery_backend::process::Process;
use machinery_backend::sync::lock;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::record::{Progress, Record, RecordFile};
use super::{Parts, Run};
use crate::console::kind_of;
use crate::version::Version;

/// The maximum time for anything that a test waits for.
const SOON: Duration = Duration::from_secs(30);

/// A run that an earlier host has begun, and its QEMU. The run ends with this value.
pub struct FakeQemu {
    pub run: Arc<Run>,
    pub folder: TempDir,
    monitor: UnixStream,
    states: Receiver<State>,
}

pub fn soon() -> Deadline {
    Deadline::after(SOON)
}

impl FakeQemu {
    /// Begins a run of the machine `m`.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("1000");
        let process = Process::start(command, "m", kind_of).unwrap();
        let record = RecordFile::of("m", folder.path());
        let version = Version::new(7, 2, 0);
        let (overlays, writes, sockets) = (Vec::new(), Vec::new(), Vec::new());
        record.begin(&Record::new(process.identity().unwrap(), version, overlays, writes, sockets));
        let parts = Parts {
            machine: "m".to_owned(),
            version,
            overlays: Overlays::adopt(&[]),
            writes: Vec::new(),
            sockets: Vec::new(),
            cgroup: None,
            tpm: None,
            cell: super::MachineCell::default(),
            record,
        };
        let (stream, monitor) = UnixStream::pair().unwrap();
        let answering = monitor.try_clone().unwrap();
        std::thread::spawn(move || answer(&answering, "paused", || ()));
        let (sender, states) = channel();
        let host = Host::new(Arc::new(StatesOnly(Mutex::new(sender))));
        let run = Run::adopt(process, stream, parts, &host).unwrap();
        FakeQemu { run, folder, monitor, states }
    }

    /// Sends an event, and returns once the run has handled it.
    pub fn send(&self, event: &str) {
        let events = self.run.qmp().listen();
        send(&self.monitor, &json!({"event": event, "data": {}}));
        events.recv_timeout(SOON).unwrap();
    }

    /// Returns the progress in the run's record.
    pub fn progress(&self) -> Option<Progress> {
        RecordFile::of("m", self.folder.path()).read().map(|(progress, _)| progress)
    }

    /// Waits for the next state that the run reports to the host.
    pub fn reported(&self) -> State {
        self.states.recv_timeout(SOON).unwrap()
    }

    /// Reports whether the run has reported no further state.
    pub fn reports_nothing(&self) -> bool {
        self.states.try_recv().is_err()
    }

    /// Closes the monitor, as a QEMU that is about to end.
    pub fn close_monitor(&self) {
        let _ = self.monitor.shutdown(std::net::Shutdown::Both);
    }

    /// Kills QEMU, and waits for the end of the run.
    pub fn end(&self) {
        self.run.kill();
        self.close_monitor();
        assert!(self.run.wait_end(SOON).is_some());
    }
}

impl Drop for FakeQemu {
    fn drop(&mut self) {
        self.run.kill();
        self.close_monitor();
    }
}

/// Plays QEMU's monitor: has the guest run when it is resumed, reports that status of it, and calls `quit` when QEMU is
/// to end.
pub fn answer(monitor: &UnixStream, status: &str, quit: impl Fn()) {
    for line in BufReader::new(monitor).lines().map_while(Result::ok) {
        let command: Value = serde_json::from_str(&line).unwrap();
        send(monitor, &json!({"return": {"status": status}, "id": command["id"]}));
        match command["execute"].as_str() {
            Some("cont") => send(monitor, &json!({"event": "RESUME", "data": {}})),
            Some("quit") => return quit(),
            _ => {}
        }
    }
}

fn send(mut monitor: &UnixStream, message: &Value) {
    // The run may have ended.
    let _ = monitor.write_all(format!("{message}\n").as_bytes());
}

/// A host that records states.
struct StatesOnly(Mutex<Sender<State>>);

impl HostServices for StatesOnly {
    fn state_changed(&self, _: &str, state: State, _: &str) {
        // The test may have ended.
        let _ = lock(&self.0).send(state);
    }

    fn max_level(&self) -> LogLevel {
        LogLevel::Error
    }

    fn log(&self, _: LogRecord) {}
    fn progress(&self, _: &str, _: f64) {}
    fn step(&self, _: &str, _: &str, _: Duration) {}
    fn ready(&self, _: &str, _: &RestoreReadiness) {}
    fn preparation_invalidated(&self, _: &str, _: &str) {}
}
