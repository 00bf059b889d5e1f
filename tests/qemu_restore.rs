//! Restoring real machines: each run begins exactly where the snapshot was taken, whatever the run
//! before it did, and nothing of a run is left after it.
//!
//! The micro guest counts, so its first count tells where a run began. The Linux guest has an agent,
//! and marks in its RAM and on its disk, to be spoilt by a run and whole again in the next.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::guest::{Guest, MachineFolder, Marks};
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::Pid;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const LINUX: Guest = Guest::Linux { ram_mib: 256, noise_mib: 16 };

/// A machine for each format, named after it.
const FORMATS: [(&str, Guest, SnapshotFormat); 4] = [
    ("plain", Guest::Micro, SnapshotFormat::Plain),
    ("gzip", Guest::Micro, SnapshotFormat::Gzip),
    ("lz4", Guest::Micro, SnapshotFormat::Lz4),
    ("zstd", Guest::Micro, SnapshotFormat::Zstd),
];

fn good() -> Value {
    json!({"success": true})
}

#[track_caller]
fn assert_does(client: &mut Client, action: &str, machine: &str) {
    let begun = Instant::now();
    assert_eq!(client.act(action, machine).unwrap(), good(), "{action} of {machine}");
    println!("{action} of {machine}: {:?}", begun.elapsed());
}

/// The guest's first count in this run; it goes on from there.
fn first_count(machine: &MachineFolder) -> u32 {
    let first = machine.first_count(SOON).unwrap();
    machine.wait_for_count(first + 1, SOON).unwrap();
    first
}

fn exists(process: Pid) -> bool {
    Path::new(&format!("/proc/{}", process.as_raw_nonzero())).exists()
}

#[test]
fn every_format_restores_to_the_same_moment_every_time() {
    let lab = Lab::new(&FORMATS).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for _ in 0..3 {
        for (name, ..) in FORMATS {
            // To the byte what Cuckoo's own client sends and reads.
            let request = format!(r#"{{"action": "restore_start", "machine": "{name}"}}"#);
            client.send_line(request.as_bytes()).unwrap();
            assert_eq!(client.next_line().unwrap(), r#"{"success":true}"#, "{name}");
            assert_eq!(first_count(lab.folder(name)), lab.restored_count().unwrap(), "{name}");
            assert_does(&mut client, "stop", name);
            lab.assert_clean();
        }
    }
    assert_eq!(host.terminate().unwrap().code(), Some(0));
}

#[test]
fn a_start_without_the_snapshot_is_a_cold_boot() {
    let lab = Lab::new(&FORMATS[..1]).unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_does(&mut client, "norestore_start", "plain");
    assert_eq!(first_count(lab.folder("plain")), 1);
    assert_does(&mut client, "stop", "plain");
    assert_does(&mut client, "restore_start", "plain");
    assert_eq!(first_count(lab.folder("plain")), lab.restored_count().unwrap());
    assert_does(&mut client, "stop", "plain");
    lab.assert_clean();
}

#[test]
fn a_stop_is_answered_when_the_process_is_gone() {
    let lab = Lab::new(&FORMATS[2..3]).unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for stop in ["stop", "acpi_stop"] {
        for start in ["restore_start", "norestore_start"] {
            assert_does(&mut client, start, "lz4");
            // A guest that has not come to its first count has no power button yet.
            first_count(lab.folder("lz4"));
            let qemu = lab.qemu_of("lz4").unwrap();
            assert!(exists(qemu));
            assert_does(&mut client, stop, "lz4");
            assert!(!exists(qemu), "{stop} after {start}");
            lab.assert_clean();
        }
    }
    assert_eq!(client.act("stop", "lz4").unwrap(), good(), "it is off already");
}

#[test]
fn what_a_run_writes_is_gone_in_the_next_one() {
    let lab = Lab::new(&[("linux", LINUX, SnapshotFormat::Zstd)]).unwrap();
    let machine = lab.folder("linux");
    let disk = fs::read(&machine.disk).unwrap();
    let marks = |ram: &str, disk: &str| Marks { ram: ram.to_owned(), disk: disk.to_owned() };
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for stop in ["stop", "acpi_stop"] {
        assert_does(&mut client, "restore_start", "linux");
        let (status, body) = machine.get("/", SOON).unwrap();
        assert_eq!(status, 200, "{body}");
        assert_eq!(machine.marks(SOON).unwrap(), marks("snapshot", "snapshot"));
        assert_eq!(machine.mark("spoilt1", "spoilt2", SOON).unwrap(), marks("spoilt1", "spoilt2"));
        assert_does(&mut client, stop, "linux");
        lab.assert_clean();
    }
    assert_does(&mut client, "restore_start", "linux");
    assert_eq!(machine.marks(SOON).unwrap(), marks("snapshot", "snapshot"));
    assert_does(&mut client, "stop", "linux");
    assert!(fs::read(&machine.disk).unwrap() == disk, "the machine's own disk was written to");
}

#[test]
fn a_cwd_may_be_longer_than_a_socket_address() {
    let deep = PathBuf::from("a-rather-long-name-of-a-folder".repeat(3)).join("and another one".repeat(4));
    let lab = Lab::below(&deep, &FORMATS).unwrap();
    assert!(lab.cwd().root().as_os_str().len() > 108);
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for (name, ..) in FORMATS {
        assert_does(&mut client, "restore_start", name);
        assert_eq!(first_count(lab.folder(name)), lab.restored_count().unwrap());
    }
    assert_does(&mut client, "stop", "plain");
    assert_eq!(host.terminate().unwrap().code(), Some(0));
    lab.assert_clean();
}

#[test]
fn a_disk_that_is_kept_is_there_until_the_next_start() {
    let lab = Lab::new(&FORMATS[..1]).unwrap();
    lab.host_yaml("", ", keep_disposable_disks: true").unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let disk = lab.disposable("plain");
    assert_does(&mut client, "restore_start", "plain");
    assert_does(&mut client, "stop", "plain");
    let whole = fs::read(&disk).unwrap();
    assert!(whole.starts_with(b"QFI\xfb"));
    // A disk that is used once more would not even open.
    fs::write(&disk, "what an earlier run left").unwrap();
    assert_does(&mut client, "restore_start", "plain");
    assert_eq!(first_count(lab.folder("plain")), lab.restored_count().unwrap());
    assert!(fs::read(&disk).unwrap().starts_with(b"QFI\xfb"));
    assert_eq!(host.terminate().unwrap().code(), Some(0));
    assert!(disk.exists(), "the operator keeps them");
    fs::remove_file(disk).unwrap();
    lab.assert_clean();
}
