//! Restores of real machines: each run begins exactly at the snapshot, whatever the previous run did, and nothing
//! of a run is left after it.
//!
//! The micro guest counts, so its first count shows where a run began. The Linux guest has an agent, and marks in
//! its RAM and on its disk, which a run overwrites and the next run has intact.

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

/// One machine for each format, named after the format.
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

/// Returns the guest's first count in this run, and waits for the next one.
fn first_count(machine: &MachineFolder) -> u32 {
    let first = machine.first_count(SOON).unwrap();
    machine.wait_for_count(first + 1, SOON).unwrap();
    first
}

fn exists(process: Pid) -> bool {
    Path::new(&format!("/proc/{}", process.as_raw_nonzero())).exists()
}

#[test]
fn restore_begins_at_the_same_moment_in_each_format() {
    let lab = Lab::new(&FORMATS).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for _ in 0..3 {
        for (name, ..) in FORMATS {
            // The bytes are those that Cuckoo's own client sends and reads.
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
fn norestore_start_is_a_cold_boot() {
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
fn stop_is_answered_when_the_process_has_ended() {
    let lab = Lab::new(&FORMATS[2..3]).unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for stop in ["stop", "acpi_stop"] {
        for start in ["restore_start", "norestore_start"] {
            assert_does(&mut client, start, "lz4");
            // Before its first count, the guest has no power button.
            first_count(lab.folder("lz4"));
            let qemu = lab.qemu_of("lz4").unwrap();
            assert!(exists(qemu));
            assert_does(&mut client, stop, "lz4");
            assert!(!exists(qemu), "{stop} after {start}");
            lab.assert_clean();
        }
    }
    assert_eq!(client.act("stop", "lz4").unwrap(), good(), "the machine is off already");
}

#[test]
fn run_begins_clean_when_the_previous_one_has_written() {
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
fn restore_works_when_the_cwd_is_longer_than_a_socket_address() {
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
fn kept_overlay_exists_until_the_next_start() {
    let lab = Lab::new(&FORMATS[..1]).unwrap();
    lab.host_yaml("", ", keep_disposable_disks: true").unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let disk = lab.disposable("plain");
    assert_does(&mut client, "restore_start", "plain");
    assert_does(&mut client, "stop", "plain");
    let whole = fs::read(&disk).unwrap();
    assert!(whole.starts_with(b"QFI\xfb"));
    // QEMU could not open this file if the overlay were used again.
    fs::write(&disk, "what an earlier run left").unwrap();
    assert_does(&mut client, "restore_start", "plain");
    assert_eq!(first_count(lab.folder("plain")), lab.restored_count().unwrap());
    assert!(fs::read(&disk).unwrap().starts_with(b"QFI\xfb"));
    assert_eq!(host.terminate().unwrap().code(), Some(0));
    assert!(disk.exists(), "the operator keeps them");
    fs::remove_file(disk).unwrap();
    lab.assert_clean();
}
