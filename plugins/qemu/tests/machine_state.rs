//! The state of one machine decides which actions it and others can do meanwhile, with real QEMUs and the micro guest.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use machinery::host::{Instance, Plugin};
use machinery::{Deadline, ErrorKind, HostServices, LogLevel, LogRecord, RestoreReadiness, State};
use machinery_testkit::artifacts;
use machinery_testkit::guest::Guest;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Signal, kill_process};

const SOON: Duration = Duration::from_secs(60);

fn soon() -> Deadline {
    Deadline::after(SOON)
}

/// A host that forwards the events of lost preparations.
struct Losses(Mutex<Sender<String>>);

impl HostServices for Losses {
    fn preparation_invalidated(&self, machine: &str, _: &str) {
        // The receiver is dropped at the end of a test.
        let _ = self.0.lock().unwrap().send(machine.to_owned());
    }
    fn max_level(&self) -> LogLevel {
        LogLevel::Error
    }
    fn log(&self, _: LogRecord) {}
    fn ready(&self, _: &str, _: &RestoreReadiness) {}
    fn step(&self, _: &str, _: &str, _: Duration) {}
    fn progress(&self, _: &str, _: f64) {}
    fn state_changed(&self, _: &str, _: State, _: &str) {}
}

/// Loads the machinery; returns it with the names of the machines that lose their preparation.
fn load(lab: &Lab) -> (Instance, Receiver<String>) {
    let (sender, losses) = channel();
    let plugin = Plugin::open(&artifacts::plugin("qemu").unwrap()).unwrap();
    let host = Arc::new(Losses(Mutex::new(sender)));
    (plugin.load(&lab.cwd().setup("qemu").unwrap(), host).unwrap(), losses)
}

#[test]
fn memory_of_a_standby_is_free_for_another_when_it_dies() {
    let lab = Lab::new(&["one", "two"].map(|name| (name, Guest::Micro, SnapshotFormat::Lz4))).unwrap();
    // A standby with a template is expected to need this much.
    lab.ahead("instant: auto, standby: on, standby_memory_limit: 64 MiB").unwrap();
    let (qemu, losses) = load(&lab);
    for name in ["one", "two"] {
        qemu.prepare(name, soon()).unwrap();
    }
    assert!(lab.qemu_of("two").is_err(), "the limit allows two standbys");
    kill_process(lab.qemu_of("one").unwrap(), Signal::KILL).unwrap();
    assert_eq!(losses.recv_timeout(SOON).unwrap(), "one");
    qemu.prepare("two", soon()).unwrap();
    lab.qemu_of("two").unwrap();
    qemu.shutdown(soon()).unwrap();
    lab.assert_clean();
}

#[test]
fn stop_is_refused_while_the_machine_starts() {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    let fifo = lab.cwd().root().join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
    // It waits for the test twice: to open the pipe, and to close it.
    lab.fake_qemu("7.2.0", &format!("exec cat {}", fifo.display())).unwrap();
    let (qemu, _) = load(&lab);
    thread::scope(|scope| {
        let start = scope.spawn(|| qemu.restore_start("m", soon()));
        let waiting = std::fs::File::options().write(true).open(&fifo).unwrap();
        assert_eq!(qemu.state("m", soon()).unwrap(), State::Starting);
        for refused in [qemu.stop("m", soon()), qemu.acpi_stop("m", soon())] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::UnexpectedState);
        }
        drop(waiting);
        assert!(start.join().unwrap().is_err());
    });
    assert_eq!(qemu.stop("m", soon()).unwrap_err().kind(), ErrorKind::StateReached);
    qemu.shutdown(soon()).unwrap();
    lab.assert_clean();
}
