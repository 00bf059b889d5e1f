//! Save images of real domains. A restore from an image is at the snapshot, with the disk of the snapshot. An image
//! that is outdated or broken is not used.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use machinery_testkit::guest::Guest;
use machinery_testkit::lab::{FileEvent, FileWatch, KvmFixture, KvmLab};
use machinery_testkit::libvirt::SNAPSHOT;
use machinery_testkit::version;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const MICRO: (&str, Guest) = ("m", Guest::Micro);
const LINUX: Guest = Guest::Linux { ram_mib: 256, noise_mib: 64 };
const IMAGES: &str = "machineries: {kvm: {instant: on, standby: off}}\n";

/// Starts a lab with the micro guest, and makes its save image.
fn with_image() -> KvmFixture {
    let mut fixture = KvmFixture::new(&[MICRO], IMAGES);
    prepare_image(&mut fixture);
    fixture
}

/// Prepares the machine, expects that it has an image, and returns its readiness.
fn prepare_image(fixture: &mut KvmFixture) -> Value {
    fixture.act("prepare");
    let readiness = fixture.readiness();
    assert_eq!(readiness["mode"], "instant", "{readiness}; {}", fixture.host.log());
    readiness
}

/// Returns the number of restores from an image, and by a revert.
fn restores(fixture: &KvmFixture) -> (usize, usize) {
    let log = fixture.host.log();
    let with_step = |step: &str| {
        let done = log.lines().filter(|line| line.contains("action=\"restore_start\""));
        done.filter(|line| line.contains(step)).count()
    };
    (with_step("load "), with_step("revert "))
}

/// Runs a command of `qemu-io` on the machine's disk, and returns its output.
fn qemu_io(fixture: &KvmFixture, command: &str) -> String {
    let mut io = Command::new("qemu-io");
    let disk = &fixture.lab.machine("m").disk;
    let ran = io.args(["-f", "qcow2", "-c", command]).arg(disk).output().unwrap();
    String::from_utf8_lossy(&ran.stdout).into_owned()
}

/// Returns the path of the machine's image.
fn image(fixture: &KvmFixture) -> PathBuf {
    let mut found = Vec::new();
    files_below(fixture.lab.cwd().root(), &mut found);
    found.retain(|path| path.ends_with("m.machinery-image"));
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// Returns the names of the overlays beside the machine's disk.
fn overlays(fixture: &KvmFixture) -> Vec<String> {
    let folder = fixture.lab.machine("m").disk.parent().unwrap();
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains("disposable")).collect()
}

/// Returns the name of the overlay of a run.
fn overlay(fixture: &KvmFixture) -> String {
    fixture.lab.machine("m").overlay.file_name().unwrap().to_str().unwrap().to_owned()
}

/// Expects that the run under way writes to the domain's own disk, and that the readiness says so.
#[track_caller]
fn assert_own_disk(fixture: &mut KvmFixture, mode: &str) {
    let ready = fixture.readiness();
    let reason = ready["reason"].as_str().unwrap();
    assert!(ready["mode"] == mode && reason.contains("runs write to the domain's own disk: "), "{ready}");
}

fn disk_content(fixture: &KvmFixture) -> Vec<u8> {
    fs::read(&fixture.lab.machine("m").disk).unwrap()
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            files_below(&entry.path(), found);
        } else {
            found.push(entry.path());
        }
    }
}

#[test]
fn image_is_sparse_when_libvirt_reads_it_by_several_threads() {
    let mut fixture = with_image();
    let libvirt = fixture.virsh(&["version", "--daemon"]);
    let newest = |program: &str| {
        libvirt.lines().rfind(|line| line.contains(program)).and_then(version::numbers).unwrap()
    };
    let is_new = newest("daemon") >= (11, 2) && newest("hypervisor") >= (9, 0);
    let mut header = [0; 32];
    File::open(image(&fixture)).unwrap().read_exact(&mut header).unwrap();
    // The format is the number after the version, the size of the description and the state. 6 is the sparse one.
    assert_eq!(header[28] == 6, is_new, "{libvirt}");
    fixture.restore();
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn restore_from_an_image_has_memory_and_disk_of_the_snapshot() {
    let mut fixture = with_image();
    let ready = fixture.readiness();
    assert!(ready["disk"].as_u64() > Some(0) && ready["memory"] == 0, "{ready}");
    fixture.lab.assert_clean();
    for _ in 0..5 {
        // A write as of the run before.
        qemu_io(&fixture, "write -P 0x5a 64k 512");
        fixture.restore();
        fixture.act("stop");
        let output = qemu_io(&fixture, "read -P 0x5a 64k 512");
        assert!(
            output.contains("Pattern verification failed"),
            "the run had the changes of the one before: {output}"
        );
    }
    assert_eq!(restores(&fixture), (5, 0), "{}", fixture.host.log());
    // A cold start boots the guest, and leaves the image valid.
    fixture.act("norestore_start");
    assert_eq!(fixture.lab.machine("m").first_count(SOON).unwrap(), 1);
    fixture.act("stop");
    fixture.restore();
    fixture.act("stop");
    assert_eq!(restores(&fixture), (6, 0), "{}", fixture.host.log());
    // A revert and a run by hand leave the image valid as well.
    fixture.virsh(&["snapshot-revert", "lab-m", SNAPSHOT, "--running"]);
    fixture.lab.machine("m").wait_for_next_count(SOON).unwrap();
    fixture.virsh(&["destroy", "lab-m"]);
    fixture.restore();
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn changes_of_a_linux_guest_are_discarded_when_an_image_is_restored() {
    let mut fixture = KvmFixture::new(&[("m", LINUX)], IMAGES);
    prepare_image(&mut fixture);
    let disk = disk_content(&fixture);
    for _ in 0..3 {
        fixture.act("restore_start");
        let marks = fixture.lab.machine("m").marks(SOON).unwrap();
        assert_eq!((marks.ram.as_str(), marks.disk.as_str()), ("snapshot", "snapshot"));
        fixture.lab.machine("m").mark("spoilt1", "spoilt2", SOON).unwrap();
        fixture.act("stop");
    }
    assert_eq!(restores(&fixture), (3, 0), "{}", fixture.host.log());
    assert!(disk_content(&fixture) == disk, "a run has written to the domain's own disk");
    fixture.finish();
}

#[test]
fn run_has_an_overlay_until_its_end_and_the_domain_its_definition() {
    let mut fixture = with_image();
    let (disk, own) = (disk_content(&fixture), fixture.lab.machine("m").disk.display().to_string());
    let definition = ["dumpxml", "--inactive", "--security-info", "lab-m"];
    let defined = fixture.virsh(&definition);
    for action in ["restore_start", "norestore_start"] {
        fixture.act(action);
        assert_eq!(overlays(&fixture), [overlay(&fixture)], "{action}");
        let written = fixture.virsh(&["domblklist", "lab-m"]);
        assert!(written.contains(&overlay(&fixture)) && !written.contains(&own), "{action}: {written}");
        assert_eq!(fixture.virsh(&definition), defined, "{action}");
        let output = qemu_io(&fixture, "write -P 0x5a 64k 512");
        assert!(!output.contains("wrote"), "{action}: QEMU has not locked the disk: {output}");
        fixture.act("stop");
        assert_eq!(overlays(&fixture), [""; 0], "{action}");
        assert_eq!(fixture.virsh(&definition), defined, "{action}");
    }
    assert!(disk_content(&fixture) == disk, "a run has written to the domain's own disk");
    fixture.finish();
}

#[test]
fn overlay_of_a_killed_host_is_removed_with_its_run() {
    let mut fixture = with_image();
    for ends_before in [false, true] {
        fixture.restore();
        fixture.host.kill().unwrap();
        if ends_before {
            fixture.virsh(&["destroy", "lab-m"]);
        }
        assert_eq!(overlays(&fixture), [overlay(&fixture)]);
        fixture = KvmFixture::of(fixture.lab);
        if !ends_before {
            assert_eq!(overlays(&fixture), [overlay(&fixture)], "the run is adopted");
            fixture.act("stop");
        }
        assert_eq!(overlays(&fixture), [""; 0], "{ends_before}; {}", fixture.host.log());
    }
    fixture.finish();
}

/// The image survives the host, and is made again when snapshot or domain have changed.
#[test]
fn image_is_replaced_when_snapshot_or_domain_change() {
    let mut fixture = with_image();
    let made = fs::metadata(image(&fixture)).unwrap().modified().unwrap();
    assert_eq!(fixture.host.terminate().unwrap().code(), Some(0));
    let mut fixture = KvmFixture::of(fixture.lab);
    prepare_image(&mut fixture);
    assert_eq!(fs::metadata(image(&fixture)).unwrap().modified().unwrap(), made);
    // Another snapshot, of the same name.
    fixture.virsh(&["snapshot-revert", "lab-m", SNAPSHOT, "--running"]);
    let later = fixture.lab.restored_count().unwrap() + 20;
    fixture.lab.machine("m").wait_for_count(later, SOON).unwrap();
    fixture.virsh(&["snapshot-delete", "lab-m", SNAPSHOT]);
    fixture.virsh(&["snapshot-create-as", "lab-m", SNAPSHOT]);
    fixture.virsh(&["destroy", "lab-m"]);
    for _ in 0..2 {
        fixture.act("restore_start");
        assert!(fixture.lab.machine("m").first_count(SOON).unwrap() >= later, "it was the old snapshot");
        fixture.act("stop");
        prepare_image(&mut fixture);
    }
    assert_ne!(fs::metadata(image(&fixture)).unwrap().modified().unwrap(), made);
    // Another description of the domain.
    let before = restores(&fixture);
    let xml = fixture.virsh(&["dumpxml", "--inactive", "--security-info", "lab-m"]);
    let changed = xml.replace("</name>", "</name><description>another</description>");
    fixture.lab.libvirtd().virsh_with_file(&["define"], &changed, &[]).unwrap();
    fixture.act("restore_start");
    assert_eq!(restores(&fixture), (before.0, before.1 + 1), "{}", fixture.host.log());
    assert_own_disk(&mut fixture, "plain");
    fixture.act("stop");
    prepare_image(&mut fixture);
    fixture.finish();
}

/// A revert also restores the domain's description, with the disks of that time. `qemu-img` would revert other ones.
#[test]
fn image_is_not_made_when_the_snapshot_has_other_disks_than_the_domain() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    lab.cwd().host_yaml(IMAGES).unwrap();
    let disk = lab.machine("m").disk.clone();
    let copy = disk.with_file_name("copy.qcow2");
    fs::copy(&disk, &copy).unwrap();
    let xml = lab.libvirtd().virsh(&["dumpxml", "--inactive", "--security-info", "lab-m"]).unwrap();
    let changed = xml.replace(disk.to_str().unwrap(), copy.to_str().unwrap());
    assert_ne!(changed, xml);
    lab.libvirtd().virsh_with_file(&["define"], &changed, &[]).unwrap();
    let mut fixture = KvmFixture::of(lab);
    // The host may have tried by itself before. Either try fails, and there is no third one.
    fixture.client.act("prepare", "m").unwrap();
    fixture.act("prepare");
    let readiness = fixture.readiness();
    let reason = readiness["reason"].as_str().unwrap();
    assert!(readiness["mode"] == "plain" && reason.contains("the snapshot has other disks"), "{readiness}");
    fixture.act("restore_start");
    assert_eq!(restores(&fixture), (0, 1), "{}", fixture.host.log());
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn restore_falls_back_to_a_revert_when_the_image_is_broken() {
    let mut fixture = with_image();
    for time in 1..=3 {
        fs::write(image(&fixture), "no save image").unwrap();
        fixture.restore();
        assert_own_disk(&mut fixture, "plain");
        fixture.act("stop");
        // Three in a row are the last ones.
        if time < 3 {
            prepare_image(&mut fixture);
        }
    }
    // Each load has failed, and a revert followed.
    assert_eq!(restores(&fixture), (3, 3), "{}", fixture.host.log());
    fixture.act("prepare");
    assert_own_disk(&mut fixture, "plain");
    assert!(fixture.readiness()["reason"].as_str().unwrap().contains("image has failed"));
    fixture.restore();
    fixture.act("stop");
    fixture.finish();
}

/// The run would write to the domain's own disk.
#[test]
fn start_fails_and_the_image_is_kept_when_no_overlay_can_be_made() {
    let mut fixture = with_image();
    let overlay = fixture.lab.machine("m").overlay.clone();
    for action in ["restore_start", "norestore_start"] {
        fs::create_dir(&overlay).unwrap();
        let reason = fixture.ask_refused(json!({"action": action, "machine": "m"}));
        assert!(reason.contains("Its save image is kept"), "{reason}");
        assert_eq!(fixture.state(), "poweroff");
        fs::remove_dir(&overlay).unwrap();
        prepare_image(&mut fixture);
        fixture.restore();
        fixture.act("stop");
    }
    assert_eq!(restores(&fixture), (2, 0), "{}", fixture.host.log());
    fixture.finish();
}

#[test]
fn standby_without_an_image_has_the_reason_that_its_run_writes_to_the_own_disk() {
    let mut fixture = KvmFixture::new(&[MICRO], "machineries: {kvm: {instant: off, standby: on}}\n");
    fixture.act("prepare");
    assert_own_disk(&mut fixture, "standby");
    fixture.restore();
    assert_own_disk(&mut fixture, "plain");
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn unfinished_image_is_removed_by_the_next_host_when_its_host_was_killed() {
    let lab = KvmLab::new(&[("m", LINUX)]).unwrap();
    lab.cwd().host_yaml(IMAGES).unwrap();
    let watch = FileWatch::new(lab.machine("m").disk.parent().unwrap()).unwrap();
    let mut fixture = KvmFixture::of(lab);
    watch.wait(&[FileEvent::Opened("serial.log")], SOON).unwrap();
    fixture.host.kill().unwrap();
    let mut fixture = KvmFixture::of(fixture.lab);
    assert_eq!(fixture.state(), "poweroff");
    prepare_image(&mut fixture);
    fixture.lab.assert_clean();
    // A stop cancels the creation of an image, too.
    fs::remove_file(image(&fixture)).unwrap();
    fixture.send_until_start(json!({"action": "prepare", "machine": "m", "id": 1}));
    fixture.act("stop");
    fixture.lab.assert_clean();
    assert_eq!(fixture.client.machine("m").unwrap()["disabled"], false);
    fixture.finish();
}
