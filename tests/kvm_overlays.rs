//! The overlays of runs: the domain's own disks stay as they are, whatever a run, its guest or its QEMU does.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, SystemTime};

use machinery_testkit::guest::Guest;
use machinery_testkit::lab::{KvmFixture, KvmLab};
use machinery_testkit::libvirt::SNAPSHOT;
use machinery_testkit::requirement;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;
use sha2::{Digest, Sha256};

const SOON: Duration = Duration::from_secs(60);
const MICRO: (&str, Guest) = ("m", Guest::Micro);
const IMAGES: &str = "machineries: {kvm: {instant: on, standby: off}}\n";
/// A user that no process has; Debian gives QEMU this number.
const QEMU_USER: u32 = 64055;

/// The content, the size and the time of the last write of a file.
type Content = (Vec<u8>, u64, SystemTime);

fn content(file: &Path) -> Content {
    let about = fs::metadata(file).unwrap();
    (Sha256::digest(fs::read(file).unwrap()).to_vec(), about.len(), about.modified().unwrap())
}

fn disk(lab: &KvmLab) -> PathBuf {
    lab.machine("m").disk.clone()
}

/// Returns the name of the overlay.
fn overlay(lab: &KvmLab) -> String {
    lab.machine("m").overlay.file_name().unwrap().to_str().unwrap().to_owned()
}

/// Makes the machine's save image.
fn prepare(fixture: &mut KvmFixture) {
    fixture.act("prepare");
    let ready = fixture.readiness();
    assert_eq!(ready["mode"], "instant", "{ready}; {}", fixture.host.log());
}

fn with_image() -> KvmFixture {
    let mut fixture = KvmFixture::new(&[MICRO], IMAGES);
    prepare(&mut fixture);
    fixture
}

/// Has QEMU itself read or write at the device of that disk. It prints the result into its log at its end.
fn qemu_io(fixture: &KvmFixture, device: &str, command: &str) {
    let command = format!("qemu-io -d {device} \"{command}\"");
    fixture.virsh(&["qemu-monitor-command", "lab-m", "--hmp", &command]);
}

/// Returns the results of [`qemu_io`] in the last run, which has ended.
fn results(fixture: &KvmFixture) -> String {
    // libvirt of the system, and of a session.
    let logs = ["log/libvirt/qemu/lab-m.log", "cache/libvirt/qemu/log/lab-m.log"];
    let logs = logs.map(|log| fixture.lab.cwd().root().join("libvirt/var").join(log));
    let log = logs.iter().find(|log| log.exists()).unwrap();
    let text = fs::read_to_string(log).unwrap();
    text[text.rfind(": starting up").unwrap()..].to_owned()
}

/// Expects that the last run has read or written that number of bytes so many times, and has found no other pattern.
#[track_caller]
fn assert_results(fixture: &KvmFixture, wanted: &[(&str, usize)]) {
    let results = results(fixture);
    for (result, times) in wanted {
        assert_eq!(results.matches(result).count(), *times, "{result}: {results}");
    }
}

fn qemu_img(args: &[&str]) {
    let ran = Command::new("qemu-img").args(args).output().unwrap();
    assert!(ran.status.success(), "{args:?}: {ran:?}");
}

fn assert_no_warning(fixture: &KvmFixture) {
    let log = fixture.host.log();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
}

#[test]
fn disks_are_unchanged_after_two_hundred_runs() {
    let machines = ["a", "b", "c", "d"];
    let lab = KvmLab::new(&machines.map(|name| (name, Guest::Micro))).unwrap();
    lab.cwd().host_yaml(IMAGES).unwrap();
    let (mut host, mut client) = lab.serve().unwrap();
    for name in machines {
        assert_eq!(client.act("prepare", name).unwrap(), json!({"success": true}), "{name}");
    }
    let contents = || machines.map(|name| content(&lab.machine(name).disk));
    let (before, restored) = (contents(), lab.restored_count().unwrap());
    thread::scope(|scope| {
        for name in machines {
            let (host, lab) = (&host, &lab);
            scope.spawn(move || {
                let mut client = host.client().unwrap();
                for run in 0..50 {
                    let action = if run % 10 == 9 { "norestore_start" } else { "restore_start" };
                    assert_eq!(client.act(action, name).unwrap(), json!({"success": true}), "{name}, {run}");
                    let first = if action == "restore_start" { restored } else { 1 };
                    assert_eq!(lab.machine(name).first_count(SOON).unwrap(), first, "{name}, {run}");
                    assert_eq!(client.act("stop", name).unwrap(), json!({"success": true}), "{name}, {run}");
                }
            });
        }
    });
    assert_eq!(contents(), before);
    assert_eq!(host.terminate().unwrap().code(), Some(0));
    assert!(!host.log().contains("ERROR"), "{}", host.log());
    lab.assert_clean();
}

/// Code that has escaped into QEMU can write to its overlay as it likes.
#[test]
fn next_run_is_at_the_snapshot_when_a_run_has_rewritten_its_overlay() {
    let mut fixture = with_image();
    let (disk, evil) = (disk(&fixture.lab), fixture.lab.cwd().root().join("evil"));
    // A process that opens a pipe waits for its other end.
    mknodat(CWD, &evil, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let before = content(&disk);
    for action in ["restore_start", "norestore_start", "restore_start"] {
        fixture.act(action);
        let overlay = fixture.lab.machine("m").overlay.clone();
        let header = fs::read(&overlay).unwrap();
        let (own, evil) = (disk.to_str().unwrap().as_bytes(), evil.to_str().unwrap().as_bytes());
        let at = header.windows(own.len()).position(|part| part == own).unwrap();
        let file = File::options().write(true).open(&overlay).unwrap();
        file.write_all_at(&[evil, &vec![b'/'; own.len() - evil.len()]].concat(), at as u64).unwrap();
        // The name of the header, and all that follows it.
        file.write_all_at(&vec![0xff; 1 << 20], 1 << 16).unwrap();
        // One run ends with its host.
        if action == "norestore_start" {
            fixture.host.kill().unwrap();
            fixture = KvmFixture::of(fixture.lab);
        }
        fixture.act("stop");
        assert_eq!(content(&disk), before, "{action}");
    }
    fixture.restore();
    fixture.act("stop");
    assert_eq!(content(&disk), before);
    fixture.finish();
}

#[test]
fn next_run_has_the_disk_of_the_snapshot_when_a_run_has_written_to_all_of_it() {
    let mut fixture = with_image();
    let before = content(&disk(&fixture.lab));
    for action in ["restore_start", "norestore_start", "restore_start"] {
        fixture.act(action);
        qemu_io(&fixture, "ide0-0-0", "read -P 0x5a 64k 512");
        qemu_io(&fixture, "ide0-0-0", "write -P 0x5a 0 1M");
        fixture.act("stop");
        assert_results(&fixture, &[("Pattern verification failed", 1), ("wrote 1048576/1048576", 1)]);
        assert_eq!(content(&disk(&fixture.lab)), before, "{action}");
    }
    assert_no_warning(&fixture);
    fixture.finish();
}

/// The second disk has a base.
#[test]
fn run_has_an_overlay_of_each_disk_over_its_own_chain() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    lab.cwd().host_yaml(IMAGES).unwrap();
    let first = disk(&lab);
    let (base, second) =
        (first.with_file_name("base & more.qcow2"), first.with_file_name("it's second.qcow2"));
    let (base_text, second_text) = (base.to_str().unwrap(), second.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", base_text, "1M"]);
    let written =
        Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 0x11 0 64k"]).arg(&base).output();
    assert!(written.unwrap().status.success());
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base_text, second_text]);
    let virsh = |args: &[&str]| lab.libvirtd().virsh(args).unwrap();
    virsh(&["snapshot-delete", "lab-m", SNAPSHOT]);
    let attach = ["attach-disk", "lab-m", second_text, "hdb", "--subdriver", "qcow2", "--targetbus", "ide"];
    virsh(&[&attach[..], &["--config"]].concat());
    virsh(&["start", "lab-m"]);
    lab.machine("m").wait_for_count(20, SOON).unwrap();
    virsh(&["snapshot-create-as", "lab-m", SNAPSHOT]);
    virsh(&["destroy", "lab-m"]);
    let mut fixture = KvmFixture::of(lab);
    prepare(&mut fixture);
    let before = [&first, &second, &base].map(|file| content(file));
    for action in ["restore_start", "norestore_start", "restore_start"] {
        fixture.act(action);
        let disks = fixture.virsh(&["domblklist", "lab-m"]);
        let overlay = overlay(&fixture.lab);
        let overlay_2 = overlay.replace(".qcow2", "_2.qcow2");
        assert!(disks.contains(&overlay) && disks.contains(&overlay_2), "{action}: {disks}");
        qemu_io(&fixture, "ide0-0-1", "read -P 0x11 0 64k");
        for device in ["ide0-0-0", "ide0-0-1"] {
            qemu_io(&fixture, device, "write -P 0x5a 0 1M");
        }
        fixture.act("stop");
        let wanted = [("read 65536/65536", 1), ("verification failed", 0), ("wrote 1048576/1048576", 2)];
        assert_results(&fixture, &wanted);
        assert_eq!([&first, &second, &base].map(|file| content(file)), before, "{action}");
    }
    assert_no_warning(&fixture);
    fixture.finish();
}

#[test]
fn overlays_are_made_in_the_configured_folder() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    lab.cwd().host_yaml(IMAGES).unwrap();
    let folder = lab.cwd().root().join("overlays");
    fs::create_dir(&folder).unwrap();
    lab.change_yaml("machines:", &format!("disposable_copy_dir: {}\nmachines:", folder.display())).unwrap();
    let mut fixture = KvmFixture::of(lab);
    prepare(&mut fixture);
    for action in ["restore_start", "norestore_start"] {
        fixture.act(action);
        let disks = fixture.virsh(&["domblklist", "lab-m"]);
        assert!(disks.contains(folder.join(overlay(&fixture.lab)).to_str().unwrap()), "{action}: {disks}");
        fixture.act("stop");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "{action}");
    }
    // Without the key again, the machine gets another image.
    fixture.lab.change_yaml(&format!("disposable_copy_dir: {}\n", folder.display()), "").unwrap();
    assert_eq!(fixture.client.ask(json!({"action": "reload"})).unwrap()["success"], true);
    prepare(&mut fixture);
    fixture.restore();
    assert!(fixture.lab.machine("m").overlay.exists());
    fixture.act("stop");
    fixture.finish();
}

/// The overlay ends with its run, and so does the disk of such a snapshot.
#[test]
fn restore_advises_what_to_do_when_the_current_snapshot_is_of_a_run() {
    let mut fixture = with_image();
    let before = content(&disk(&fixture.lab));
    // QEMU 10.0 ends at a snapshot of a run from a sparse image. A cold start loads none.
    fixture.act("norestore_start");
    fixture.virsh(&["snapshot-create-as", "lab-m", "op"]);
    fixture.act("stop");
    let reason = fixture.ask_refused(json!({"action": "restore_start", "machine": "m"}));
    assert!(reason.contains(&overlay(&fixture.lab)) && reason.contains("virsh snapshot-delete"), "{reason}");
    let checked = fixture.lab.run(&["-v", "check"]).unwrap();
    assert!(checked.stdout.contains("virsh snapshot-delete"), "{}", checked.stdout);
    // The operator takes the advice.
    fixture.virsh(&["snapshot-delete", "lab-m", "op"]);
    fixture.virsh(&["snapshot-current", "lab-m", "--snapshotname", SNAPSHOT]);
    fixture.act("enable_machine");
    prepare(&mut fixture);
    fixture.restore();
    fixture.act("stop");
    assert_eq!(content(&disk(&fixture.lab)).0, before.0);
    fixture.finish();
}

/// Returns a lab whose QEMUs have a user of their own. The user may reach the disk, and `configure` sets its owner and mode.
fn lab_of_user(dynamic: bool, owner: u32, mode: u32) -> KvmLab {
    lab_of_user_with(&[MICRO], dynamic, owner, mode)
}

fn lab_of_user_with(machines: &[(&str, Guest)], dynamic: bool, owner: u32, mode: u32) -> KvmLab {
    let lab = KvmLab::new(machines).unwrap();
    lab.cwd().host_yaml(IMAGES).unwrap();
    let conf = lab.cwd().root().join("libvirt/etc/libvirt/qemu.conf");
    let text = format!(
        "security_driver = \"none\"\nstdio_handler = \"file\"\nuser = \"+{QEMU_USER}\"\ngroup = \"+{QEMU_USER}\"\n\
         dynamic_ownership = {}\nnamespaces = []\ncgroup_controllers = []\n",
        u32::from(dynamic)
    );
    fs::write(conf, text).unwrap();
    lab.libvirtd().kill_daemon().unwrap();
    lab.libvirtd().start_daemon().unwrap();
    for (name, _) in machines {
        set_owner(&lab.machine(name).disk, owner, mode);
    }
    lab
}

fn set_owner(file: &Path, owner: u32, mode: u32) {
    chown(file, Some(owner), Some(owner)).unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
}

fn owner(file: &Path) -> u32 {
    fs::metadata(file).unwrap().uid()
}

fn check(fixture: &KvmFixture) -> String {
    fixture.lab.run(&["-v", "check"]).unwrap().stdout
}

/// Runs the machine in both ways, and expects that its disk keeps its content and has this owner afterwards.
fn run_as_user(fixture: &mut KvmFixture, wanted: u32) {
    let disk = disk(&fixture.lab);
    let before = content(&disk);
    for action in ["restore_start", "norestore_start", "restore_start"] {
        fixture.act(action);
        let qemu = fs::metadata(format!("/proc/{}", fixture.qemu().as_raw_nonzero())).unwrap();
        assert_eq!(qemu.uid(), QEMU_USER);
        qemu_io(fixture, "ide0-0-0", "write -P 0x5a 0 1M");
        fixture.act("stop");
        assert_results(fixture, &[("wrote 1048576/1048576", 1)]);
        assert_eq!((content(&disk), owner(&disk)), (before.clone(), wanted), "{action}");
    }
    assert_no_warning(fixture);
}

#[test]
fn disk_keeps_its_owner_when_qemus_user_may_read_it() {
    if !requirement::is_root() {
        return;
    }
    let mut fixture = KvmFixture::of(lab_of_user(true, 0, 0o644));
    prepare(&mut fixture);
    run_as_user(&mut fixture, 0);
    assert!(!check(&fixture).contains("may write to") && !check(&fixture).contains("may not read"));
    fixture.finish();
}

#[test]
fn disk_belongs_to_its_owner_again_when_qemus_user_may_not_read_it() {
    if !requirement::is_root() {
        return;
    }
    let mut fixture = KvmFixture::of(lab_of_user(true, 0, 0o600));
    let disk = disk(&fixture.lab);
    prepare(&mut fixture);
    run_as_user(&mut fixture, 0);
    fixture.restore();
    assert_eq!(owner(&disk), QEMU_USER, "libvirt gives the disk to that user");
    fixture.host.kill().unwrap();
    fixture.virsh(&["destroy", "lab-m"]);
    let mut fixture = KvmFixture::of(fixture.lab);
    assert_eq!(owner(&disk), 0);
    let found = check(&fixture);
    assert!(found.contains("may not read") && found.contains(disk.to_str().unwrap()), "{found}");
    // The operator takes the advice: the next image leaves the owner.
    set_owner(&disk, 0, 0o644);
    prepare(&mut fixture);
    fixture.restore();
    assert_eq!(owner(&disk), 0);
    fixture.act("stop");
    fixture.finish();
}

/// Puts an empty image below the disks of both machines.
fn share_base(lab: &KvmLab, machines: [&str; 2]) -> PathBuf {
    let base = lab.cwd().root().join("base.qcow2");
    let qemu_img = |arguments: &[&str]| {
        assert!(Command::new("qemu-img").args(arguments).status().unwrap().success(), "{arguments:?}");
    };
    let name = base.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, "64M"]);
    for machine in machines {
        let disk = lab.machine(machine).disk.to_str().unwrap();
        qemu_img(&["rebase", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", disk]);
    }
    set_owner(&base, 0, 0o644);
    for machine in machines {
        let label = &lab.machine(machine).label;
        // Without the mark of a chain's end, libvirt looks for the base itself.
        lab.change_domain(label, |xml| xml.replace("<backingStore/>", "")).unwrap();
    }
    base
}

#[test]
fn base_belongs_to_its_owner_again_after_the_last_of_its_runs() {
    if !requirement::is_root() {
        return;
    }
    let lab = lab_of_user_with(&[MICRO, ("n", Guest::Micro)], true, 0, 0o600);
    lab.cwd().host_yaml("machineries: {kvm: {instant: off, standby: off}}\n").unwrap();
    let base = share_base(&lab, ["m", "n"]);
    let mut fixture = KvmFixture::of(lab);
    let mut client = fixture.host.client().unwrap();
    let mut act = |action: &str, machine: &str| {
        assert_eq!(client.act(action, machine).unwrap(), json!({"success": true}), "{action} {machine}");
    };
    for action in ["restore_start", "norestore_start"] {
        act(action, "m");
        assert_eq!(owner(&base), QEMU_USER, "libvirt gives the base to that user");
        act(action, "n");
        act("stop", "m");
        assert_eq!(owner(&base), QEMU_USER, "the other machine uses it");
        act("stop", "n");
        assert_eq!(owner(&base), 0, "{action}");
    }
    assert_no_warning(&fixture);
    fixture.host.terminate().unwrap();
    // With an image, libvirt's own revert comes before the runs.
    fixture.lab.cwd().host_yaml(IMAGES).unwrap();
    let mut fixture = KvmFixture::of(fixture.lab);
    prepare(&mut fixture);
    // The preparation of the other machine uses the base as well.
    let prepared = fixture.host.client().unwrap().act("prepare", "n").unwrap();
    assert_eq!((prepared, owner(&base)), (json!({"success": true}), 0));
    fixture.restore();
    fixture.act("stop");
    assert_eq!(owner(&base), 0);
    fixture.finish();
}

#[test]
fn run_has_an_overlay_when_libvirt_changes_no_owners() {
    if !requirement::is_root() {
        return;
    }
    let mut fixture = KvmFixture::of(lab_of_user(false, QEMU_USER, 0o600));
    prepare(&mut fixture);
    run_as_user(&mut fixture, QEMU_USER);
    assert!(check(&fixture).contains("may write to"), "{}", check(&fixture));
    // A disk of another user is reverted as well.
    let written = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 0x5a 64k 512"])
        .arg(disk(&fixture.lab))
        .output();
    assert!(written.unwrap().status.success());
    fixture.restore();
    qemu_io(&fixture, "ide0-0-0", "read -P 0x5a 64k 512");
    fixture.act("stop");
    assert_results(&fixture, &[("Pattern verification failed", 1)]);
    assert_no_warning(&fixture);
    fixture.finish();
}

#[test]
fn check_warns_when_qemus_user_may_not_reach_the_overlays() {
    if !requirement::is_root() {
        return;
    }
    let lab = lab_of_user(true, 0, 0o644);
    let closed = lab.cwd().root().join("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    lab.change_yaml("machines:", &format!("disposable_copy_dir: {}\nmachines:", closed.display())).unwrap();
    let found = lab.run(&["-v", "check"]).unwrap().stdout;
    assert!(found.contains("may not enter") && found.contains(closed.to_str().unwrap()), "{found}");
    let ran = lab.run(&["check"]).unwrap();
    assert_eq!(ran.code, Some(0), "{}", ran.stdout);
}
