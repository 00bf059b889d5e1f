//! Restores of real domains, from snapshots of every kind. Each run begins at the snapshot, without the changes of
//! the run before.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::guest::{Guest, Marks};
use machinery_testkit::lab::{KvmLab, Lab};
use machinery_testkit::libvirt::SNAPSHOT;
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const LINUX: Guest = Guest::Linux { ram_mib: 256, noise_mib: 16 };
const MICRO: (&str, Guest) = ("m", Guest::Micro);

fn good() -> Value {
    json!({"success": true})
}

#[track_caller]
fn assert_does(client: &mut Client, action: &str, machine: &str) {
    let begun = Instant::now();
    assert_eq!(client.act(action, machine).unwrap(), good(), "{action} of {machine}");
    println!("{action} of {machine}: {:?}", begun.elapsed());
}

/// Expects that the action fails, with all of these words in the reason, and leaves no leftovers.
#[track_caller]
fn assert_refused(lab: &KvmLab, client: &mut Client, action: &str, words: &[&str]) {
    let answer = client.act(action, "m").unwrap();
    assert_eq!(answer["success"], false, "{answer}");
    let reason = answer["reason"].as_str().unwrap();
    println!("{reason}");
    for word in words.iter().chain(&["machine 'm' failed: "]) {
        assert!(reason.contains(word), "{word:?} is not in {reason:?}");
    }
    lab.assert_clean();
}

/// Takes a snapshot of the machine in that state.
fn take_snapshot(lab: &KvmLab, name: &str, state: &str) {
    let (libvirtd, machine) = (lab.libvirtd(), lab.machine("m"));
    let label = machine.label.as_str();
    if state != "shutoff" {
        libvirtd.virsh(&["snapshot-revert", label, SNAPSHOT]).unwrap();
        machine.wait_for_count(lab.restored_count().unwrap() + 20, SOON).unwrap();
    }
    if state == "paused" {
        libvirtd.virsh(&["suspend", label]).unwrap();
    }
    libvirtd.virsh(&["snapshot-create-as", label, name]).unwrap();
    if state != "shutoff" {
        libvirtd.virsh(&["destroy", label]).unwrap();
    }
}

#[test]
fn snapshot_is_restored_when_it_was_taken_of_a_running_paused_or_shut_off_domain() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    for state in ["running", "paused", "shutoff"] {
        take_snapshot(&lab, state, state);
    }
    let restored = lab.restored_count().unwrap();
    for snapshot in ["running", "paused", "shutoff", SNAPSHOT] {
        let yaml = lab.cwd().yaml("kvm").unwrap();
        lab.change_yaml("    ip:", &format!("    snapshot: {snapshot}\n    ip:")).unwrap();
        let mut host = lab.host().unwrap();
        let mut client = host.client().unwrap();
        let mut firsts = Vec::new();
        for _ in 0..2 {
            assert_does(&mut client, "restore_start", "m");
            firsts.push(lab.machine("m").first_count(SOON).unwrap());
            lab.machine("m").wait_for_next_count(SOON).unwrap();
            assert_does(&mut client, "stop", "m");
            lab.assert_clean();
        }
        println!("{snapshot}: {firsts:?}");
        assert_eq!(firsts[0], firsts[1], "{snapshot}");
        match snapshot {
            // A boot: this snapshot has no memory.
            "shutoff" => assert_eq!(firsts[0], 1),
            "clean" => assert_eq!(firsts[0], restored),
            _ => assert!(firsts[0] > restored + 19, "{snapshot}: {firsts:?}"),
        }
        assert_eq!(client.machine("m").unwrap()["snapshot"], snapshot);
        assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
        lab.cwd().write_yaml("kvm", &yaml).unwrap();
    }
}

#[test]
fn restore_uses_the_current_snapshot_when_none_is_named_and_lists_them_when_it_is_missing() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    lab.cwd().host_yaml("machineries: {kvm: {standby: off}}\n").unwrap();
    take_snapshot(&lab, "later", "running");
    let yaml = lab.cwd().yaml("kvm").unwrap();
    lab.change_yaml("    ip:", "    snapshot: none-of-that-name\n    ip:").unwrap();
    {
        let host = lab.host().unwrap();
        let mut client = host.client().unwrap();
        let words = ["no snapshot 'none-of-that-name'", "clean, later", "Correct the machine's snapshot"];
        assert_refused(&lab, &mut client, "restore_start", &words);
        assert_refused(&lab, &mut client, "norestore_start", &words);
    }
    lab.cwd().write_yaml("kvm", &yaml).unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_does(&mut client, "restore_start", "m");
    assert!(lab.machine("m").first_count(SOON).unwrap() > lab.restored_count().unwrap() + 19);
    assert_does(&mut client, "stop", "m");
    for snapshot in ["later", SNAPSHOT] {
        lab.libvirtd().virsh(&["snapshot-delete", "lab-m", snapshot]).unwrap();
    }
    assert_refused(
        &lab,
        &mut client,
        "restore_start",
        &["no current snapshot", "none at all", "snapshot-create-as"],
    );
    // A cold start needs no snapshot.
    assert_does(&mut client, "norestore_start", "m");
    assert_eq!(lab.machine("m").first_count(SOON).unwrap(), 1);
    assert_does(&mut client, "stop", "m");
    lab.assert_clean();
}

/// libvirt reverts to external snapshots from 9.9 on. With an older one, the error has advice.
#[test]
fn external_snapshot_is_restored_or_refused_with_advice_when_libvirt_is_too_old() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    let (libvirtd, machine) = (lab.libvirtd(), lab.machine("m"));
    let dir = machine.disk.parent().unwrap();
    // libvirt takes no external snapshot of a disk that has internal ones.
    libvirtd.virsh(&["snapshot-revert", &machine.label, SNAPSHOT]).unwrap();
    libvirtd.virsh(&["snapshot-delete", &machine.label, SNAPSHOT]).unwrap();
    machine.wait_for_count(lab.restored_count().unwrap() + 5, SOON).unwrap();
    let memory = format!("file={},snapshot=external", dir.join("memory.save").display());
    let disk = format!("hda,snapshot=external,file={}", dir.join("overlay.qcow2").display());
    libvirtd
        .virsh(&["snapshot-create-as", &machine.label, "outside", "--memspec", &memory, "--diskspec", &disk])
        .unwrap();
    libvirtd.virsh(&["destroy", &machine.label]).unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let checked = lab.run(&["-v", "check"]).unwrap();
    println!("{}{}", checked.stdout, checked.stderr);
    if !reverts_to_external(&lab) {
        let words = ["external snapshot", "9.9", "Upgrade libvirt"];
        assert_refused(&lab, &mut client, "restore_start", &words);
        assert_eq!(checked.code, Some(2));
        assert!(checked.stdout.contains("cannot revert to those"), "{}", checked.stdout);
        return;
    }
    assert_eq!(checked.code, Some(0));
    let mut counts = Vec::new();
    let mut files = Vec::new();
    for _ in 0..3 {
        assert_does(&mut client, "restore_start", "m");
        counts.push(machine.first_count(SOON).unwrap());
        machine.wait_for_next_count(SOON).unwrap();
        assert_does(&mut client, "stop", "m");
        lab.assert_clean();
        files.push(fs::read_dir(dir).unwrap().count());
    }
    println!("{counts:?}, files: {files:?}");
    assert!(counts.iter().all(|count| *count == counts[0]), "{counts:?}");
    assert_eq!(files[1], files[2], "each run leaves a file");
}

fn reverts_to_external(lab: &KvmLab) -> bool {
    let version = lab.libvirtd().virsh(&["version", "--daemon"]).unwrap();
    let daemon = version.lines().find_map(|line| line.strip_prefix("Running against daemon: ")).unwrap();
    let mut numbers = daemon.trim().split('.').map(|number| number.parse::<u32>().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap()) >= (9, 9)
}

#[test]
fn changes_of_a_run_are_discarded_by_the_next_restore() {
    let lab = KvmLab::new(&[("linux", LINUX)]).unwrap();
    let machine = lab.machine("linux");
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
}

/// Returns whether the disk has the changes that the test writes.
fn is_changed(lab: &KvmLab) -> bool {
    let output = qemu_io(lab, "read -P 0x5a 64k 512");
    assert!(output.contains("read 512/512"), "{output}");
    !output.contains("Pattern verification failed")
}

fn qemu_io(lab: &KvmLab, command: &str) -> String {
    let mut io = Command::new("qemu-io");
    let ran = io.args(["-f", "qcow2", "-c", command]).arg(&lab.machine("m").disk).output().unwrap();
    String::from_utf8_lossy(&ran.stdout).into_owned()
}

/// A cold start boots from the snapshot's disk, without the changes of an earlier run.
#[test]
fn cold_start_has_the_disk_of_the_snapshot() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    lab.cwd().host_yaml("machineries: {kvm: {standby: off}}\n").unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_does(&mut client, "restore_start", "m");
    assert_does(&mut client, "stop", "m");
    // A write as of that run.
    qemu_io(&lab, "write -P 0x5a 64k 512");
    assert!(is_changed(&lab));
    assert_does(&mut client, "norestore_start", "m");
    assert_eq!(lab.machine("m").first_count(SOON).unwrap(), 1);
    assert_does(&mut client, "stop", "m");
    assert!(!is_changed(&lab), "the cold start had the changes of the run before");
    lab.assert_clean();
}

#[test]
fn host_serves_both_machineries() {
    let qemus = Lab::new(&[("q", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    let lab = KvmLab::new(&[MICRO]).unwrap();
    lab.cwd().list_machineries(&["qemu", "kvm"]).unwrap();
    lab.cwd().write_yaml("qemu", &qemus.yaml().unwrap()).unwrap();
    let checked = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(checked.code, Some(0), "{}{}", checked.stdout, checked.stderr);
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for _ in 0..2 {
        client.send(&json!({"action": "restore_start", "machine": "q"})).unwrap();
        assert_does(&mut client, "restore_start", "m");
        assert_eq!(client.next_message().unwrap(), good());
        assert_eq!(lab.machine("m").first_count(SOON).unwrap(), lab.restored_count().unwrap());
        assert_eq!(qemus.folder("q").first_count(SOON).unwrap(), qemus.restored_count().unwrap());
        for (machine, machinery) in [("q", "qemu"), ("m", "kvm")] {
            let listed = client.machine(machine).unwrap();
            assert_eq!((&listed["machinery_name"], &listed["state"]), (&json!(machinery), &json!("running")));
            assert_does(&mut client, "stop", machine);
        }
    }
    // The end of the host stops both.
    assert_does(&mut client, "restore_start", "m");
    assert_does(&mut client, "restore_start", "q");
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
    lab.assert_clean();
    qemus.assert_clean();
}
