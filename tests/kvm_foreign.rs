//! Foreign work on a domain of the machinery: a run by hand, a managed save, a reset. Automatic work does not
//! destroy it, and the end of the host does not end it. No task gets a guest that is not at its snapshot.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use machinery_testkit::guest::Guest;
use machinery_testkit::lab::{KvmFixture, KvmLab};
use machinery_testkit::libvirt::SNAPSHOT;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const MICRO: (&str, Guest) = ("m", Guest::Micro);
const STANDBY: &str = "machineries: {kvm: {standby: on}}\n";
const IMAGES: &str = "machineries: {kvm: {instant: on, standby: off}}\n";

/// The place of an operator's work on a disk, and its content.
const WORK: &str = "-P 0x5a 64k 512";

fn lab(section: &str) -> KvmLab {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    lab.cwd().host_yaml(section).unwrap();
    lab
}

fn qemu_io(disk: &Path, command: &str) -> String {
    let mut io = Command::new("qemu-io");
    let ran = io.args(["-f", "qcow2", "-c", command]).arg(disk).output().unwrap();
    format!("{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr))
}

/// Writes to the disk as a run would.
fn write_work(lab: &KvmLab) {
    let output = qemu_io(&lab.machine("m").disk, &format!("write {WORK}"));
    assert!(output.contains("wrote 512/512"), "{output}");
}

fn has_work(lab: &KvmLab) -> bool {
    let output = qemu_io(&lab.machine("m").disk, &format!("read {WORK}"));
    assert!(output.contains("read 512/512"), "{output}");
    !output.contains("Pattern verification failed")
}

/// Boots the domain as an operator would; returns its QEMU.
fn start_by_hand(lab: &KvmLab) -> Pid {
    lab.libvirtd().virsh(&["start", "lab-m"]).unwrap();
    lab.machine("m").wait_for_next_count(SOON).unwrap();
    lab.qemu_of("m").unwrap()
}

/// Boots the domain as an operator would, writes to its disk, and powers the domain off.
fn work_by_hand(lab: &KvmLab) {
    start_by_hand(lab);
    lab.libvirtd().virsh(&["destroy", "lab-m"]).unwrap();
    write_work(lab);
}

/// Expects that `check` finds no problem, and prints all of these words.
#[track_caller]
fn assert_check_prints(lab: &KvmLab, words: &[&str]) {
    let checked = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(checked.code, Some(0), "{}", checked.stdout);
    for word in words {
        assert!(checked.stdout.contains(word), "no {word:?} in {}", checked.stdout);
    }
}

#[test]
fn host_prepares_nothing_automatically_when_somebody_else_has_written_to_the_disk() {
    for (section, prepared) in [(STANDBY, "standby"), (IMAGES, "instant")] {
        let lab = lab(section);
        work_by_hand(&lab);
        let mut fixture = KvmFixture::of(lab);
        fixture.wait_for_readiness("plain", "not prepared automatically");
        assert!(has_work(&fixture.lab), "{section}: the start of the host has discarded the work");
        assert!(fixture.host.log().contains("WARN") && fixture.host.log().contains("in no snapshot"));
        assert_check_prints(
            &fixture.lab,
            &["warning  machine 'm'", "in no snapshot", "cuckoo-machinery prepare m"],
        );
        // Other automatic work of the host discards nothing either.
        fixture.client.ask(json!({"action": "lock", "machine": "m", "task_id": "t"})).unwrap();
        fixture.act("unlock");
        fixture.act("disable_machine");
        fixture.act("enable_machine");
        fixture.client.ask(json!({"action": "wait_idle"})).unwrap();
        assert!(has_work(&fixture.lab), "{section}: the work was discarded later");
        // An explicit request discards the work.
        fixture.act("prepare");
        fixture.wait_for_readiness(prepared, "");
        fixture.restore();
        fixture.act("stop");
        assert!(!has_work(&fixture.lab));
        fixture.wait_for_readiness(prepared, "");
        fixture.finish();
    }
}

/// The host receives the events of the run by hand, and of its end.
#[test]
fn host_prepares_nothing_automatically_when_a_run_by_hand_has_ended() {
    let mut fixture = KvmFixture::of(lab(STANDBY));
    fixture.wait_for_readiness("standby", "");
    fixture.act("disable_machine");
    fixture.act("stop");
    start_by_hand(&fixture.lab);
    fixture.wait_for_state("running");
    fixture.virsh(&["destroy", "lab-m"]);
    fixture.wait_for_state("poweroff");
    write_work(&fixture.lab);
    fixture.act("enable_machine");
    fixture.wait_for_readiness("instant", "not prepared automatically");
    assert!(has_work(&fixture.lab));
    fixture.restore();
    fixture.act("stop");
    fixture.wait_for_readiness("standby", "");
    fixture.finish();
}

/// Changes by a run of the host are no foreign work, also for the next host.
#[test]
fn host_prepares_automatically_when_its_own_run_was_the_last_to_write() {
    let guest = Guest::Linux { ram_mib: 256, noise_mib: 16 };
    let lab = KvmLab::new(&[("m", guest)]).unwrap();
    lab.cwd().host_yaml(STANDBY).unwrap();
    let mut fixture = KvmFixture::of(lab);
    fixture.wait_for_readiness("standby", "");
    for end in ["stop", "acpi_stop", "terminate", "kill"] {
        fixture.act("restore_start");
        fixture.lab.machine("m").mark("spoilt1", "spoilt2", SOON).unwrap();
        match end {
            "terminate" => fixture.terminate(),
            "kill" => drop(fixture.host.kill().unwrap()),
            action => fixture.act(action),
        }
        if ["terminate", "kill"].contains(&end) {
            fixture = KvmFixture::of(fixture.lab);
        }
        if end == "kill" {
            fixture.act("stop");
        }
        fixture.wait_for_readiness("standby", "");
        assert!(!fixture.host.log().contains("not prepared automatically"), "{end}: {}", fixture.host.log());
    }
    fixture.finish();
}

/// A new snapshot is the new state of the machine, so a return to it loses nothing.
#[test]
fn host_prepares_automatically_when_the_operator_has_taken_a_new_snapshot() {
    let lab = lab(STANDBY);
    work_by_hand(&lab);
    lab.libvirtd().virsh(&["snapshot-delete", "lab-m", SNAPSHOT]).unwrap();
    start_by_hand(&lab);
    lab.libvirtd().virsh(&["snapshot-create-as", "lab-m", "new"]).unwrap();
    lab.libvirtd().virsh(&["destroy", "lab-m"]).unwrap();
    let mut fixture = KvmFixture::of(lab);
    fixture.wait_for_readiness("standby", "");
    fixture.act("restore_start");
    fixture.act("stop");
    fixture.wait_for_readiness("standby", "");
    fixture.act("stop");
    assert!(has_work(&fixture.lab), "the work is in the snapshot, and was discarded");
    fixture.finish();
}

#[test]
fn host_leaves_a_run_by_hand_alone_when_it_ends() {
    for disabled in [false, true] {
        let mut fixture = KvmFixture::of(lab("machineries: {kvm: {instant: off, standby: off}}\n"));
        if disabled {
            fixture.act("disable_machine");
        }
        let qemu = start_by_hand(&fixture.lab);
        fixture.wait_for_state("running");
        assert_eq!(fixture.client.ask(json!({"action": "shutdown_all"})).unwrap(), json!({"success": true}));
        assert_eq!(fixture.state(), "running", "shutdown_all has ended the run by hand");
        fixture.terminate();
        assert_eq!(fixture.qemu(), qemu, "the end of the host has ended the run by hand");
        assert!(fixture.host.log().contains("the host has not started it"), "{}", fixture.host.log());
        // The next host finds the domain running, and leaves it alone as well.
        let mut fixture = KvmFixture::of(fixture.lab);
        assert_eq!(fixture.state(), "running");
        fixture.terminate();
        assert_eq!(fixture.qemu(), qemu);
        // An explicit request ends the run.
        let mut fixture = KvmFixture::of(fixture.lab);
        fixture.act("stop");
        fixture.finish();
    }
}

/// A try would discard the work on the disk.
#[test]
fn host_leaves_a_machine_in_quarantine_alone_when_an_operator_has_started_it() {
    let usual = "machineries: {kvm: {instant: off, standby: off}}\n";
    let mut fixture = KvmFixture::of(lab(&format!("timeouts: {{restore_start: 0.001}}\n{usual}")));
    // There is no try before the end of the lock.
    let lock = json!({"action": "lock", "machine": "m", "task_id": "t"});
    assert_eq!(fixture.client.ask(lock).unwrap()["success"], true);
    let reason = fixture.ask_refused(json!({"action": "restore_start", "machine": "m"}));
    start_by_hand(&fixture.lab);
    fixture.wait_for_state("running");
    let listed = fixture.client.machine("m").unwrap();
    assert_eq!(listed["quarantine"]["next_try_in"], Value::Null, "{reason}: {listed}");
    fixture.lab.libvirtd().virsh(&["destroy", "lab-m"]).unwrap();
    fixture.wait_for_state("poweroff");
    write_work(&fixture.lab);
    fixture.act("unlock");
    fixture.lab.cwd().host_yaml(usual).unwrap();
    // A reload wakes the worker, which has nothing to do.
    assert_eq!(fixture.client.ask(json!({"action": "reload"})).unwrap()["success"], true);
    assert_eq!(fixture.client.machine("m").unwrap()["quarantine"]["next_try_in"], Value::Null);
    assert!(has_work(&fixture.lab), "a try has discarded the work");
    assert!(fixture.host.log().contains("not tried any more"), "{}", fixture.host.log());
    fixture.act("enable_machine");
    fixture.act("restore_start");
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn host_ends_its_own_run_when_the_machine_was_disabled_meanwhile() {
    let mut fixture = KvmFixture::of(lab(""));
    fixture.restore();
    fixture.act("disable_machine");
    fixture.finish();
}

/// Domain ids begin anew after a restart of libvirtd. The operator's domain may therefore have the id of the
/// killed host's run.
#[test]
fn host_leaves_a_run_by_hand_alone_when_it_follows_a_run_of_a_killed_host() {
    // The creation of a save image takes an id, too.
    let mut fixture = KvmFixture::of(lab("machineries: {kvm: {instant: off, standby: off}}\n"));
    fixture.restore();
    let id = fixture.virsh(&["domid", "lab-m"]);
    fixture.host.kill().unwrap();
    fixture.virsh(&["destroy", "lab-m"]);
    fixture.lab.libvirtd().kill_daemon().unwrap();
    fixture.lab.libvirtd().start_daemon().unwrap();
    let qemu = start_by_hand(&fixture.lab);
    assert_eq!(
        fixture.virsh(&["domid", "lab-m"]),
        id,
        "the ids of domains differ, so the test shows nothing"
    );
    let mut fixture = KvmFixture::of(fixture.lab);
    assert_eq!(fixture.state(), "running");
    assert_eq!(fixture.qemu(), qemu, "it was ended as a run of the killed host");
    fixture.act("stop");
    fixture.finish();
}

/// The host's own run ends while libvirtd is away, and somebody else's run begins; the host is not restarted.
#[test]
fn host_leaves_a_run_by_hand_alone_when_its_own_ended_while_libvirtd_was_away() {
    let mut fixture = KvmFixture::of(lab(""));
    fixture.restore();
    fixture.wait_for_state("running");
    fixture.lab.libvirtd().kill_daemon().unwrap();
    fixture.wait_for_state("error");
    kill_process(fixture.qemu(), Signal::KILL).unwrap();
    // The host is suspended until the operator's run has begun.
    fixture.host.signal(Signal::STOP).unwrap();
    fixture.lab.libvirtd().start_daemon().unwrap();
    let qemu = start_by_hand(&fixture.lab);
    fixture.host.signal(Signal::CONT).unwrap();
    fixture.wait_for_state("poweroff");
    fixture.wait_for_state("running");
    fixture.terminate();
    assert_eq!(fixture.qemu(), qemu);
    let mut fixture = KvmFixture::of(fixture.lab);
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn managed_save_is_kept_until_the_machine_is_started() {
    let lab = lab(STANDBY);
    start_by_hand(&lab);
    lab.libvirtd().virsh(&["managedsave", "lab-m"]).unwrap();
    let mut fixture = KvmFixture::of(lab);
    fixture.wait_for_readiness("plain", "managed save");
    assert_check_prints(&fixture.lab, &["warning  machine 'm'", "managed save"]);
    assert!(fixture.virsh(&["dominfo", "lab-m"]).contains("Managed save:   yes"));
    for action in ["norestore_start", "restore_start"] {
        fixture.act(action);
        let first = fixture.lab.machine("m").first_count(SOON).unwrap();
        let wanted = if action == "restore_start" { fixture.lab.restored_count().unwrap() } else { 1 };
        assert_eq!(first, wanted, "{action} has resumed the managed save");
        assert!(
            fixture.host.log().contains("managed save of its domain is removed"),
            "{}",
            fixture.host.log()
        );
        assert!(fixture.virsh(&["dominfo", "lab-m"]).contains("Managed save:   no"));
        fixture.act("stop");
        fixture.wait_for_readiness("standby", "");
        fixture.act("stop");
        start_by_hand(&fixture.lab);
        fixture.virsh(&["managedsave", "lab-m"]);
    }
    // An explicit request for a preparation is executed, too.
    fixture.act("prepare");
    fixture.wait_for_readiness("standby", "");
    assert!(fixture.virsh(&["dominfo", "lab-m"]).contains("Managed save:   no"));
    fixture.restore();
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn shut_off_snapshot_is_restored_when_the_domain_has_a_managed_save() {
    let lab = lab("");
    lab.libvirtd().virsh(&["snapshot-create-as", "lab-m", "off"]).unwrap();
    start_by_hand(&lab);
    lab.libvirtd().virsh(&["managedsave", "lab-m"]).unwrap();
    let mut fixture = KvmFixture::of(lab);
    fixture.act("restore_start");
    assert_eq!(fixture.lab.machine("m").first_count(SOON).unwrap(), 1);
    fixture.act("stop");
    fixture.finish();
}

/// libvirt-guests saves and resumes domains in this way if the host's unit has no order relative to it.
#[test]
fn own_run_is_ended_when_somebody_has_saved_and_resumed_it() {
    for killed in [false, true] {
        let mut fixture = KvmFixture::of(lab(""));
        fixture.restore();
        if killed {
            fixture.host.kill().unwrap();
            fixture.virsh(&["managedsave", "lab-m"]);
        } else {
            fixture.virsh(&["managedsave", "lab-m"]);
            fixture.wait_for_state("poweroff");
            fixture.terminate();
        }
        fixture.virsh(&["start", "lab-m"]);
        fixture.qemu();
        let mut fixture = KvmFixture::of(fixture.lab);
        assert_eq!(fixture.state(), "poweroff", "killed: {killed}");
        fixture.lab.assert_clean();
        fixture.restore();
        fixture.act("stop");
        fixture.finish();
    }
}

/// Units stop in the reverse order of their start.
#[test]
fn unit_ends_the_host_before_libvirt_guests_saves_its_runs() {
    let unit = include_str!("../integrations/systemd/cuckoo-machinery.service");
    let after = unit.lines().filter_map(|line| line.strip_prefix("After="));
    assert!(after.flat_map(|line| line.split(' ')).any(|other| other == "libvirt-guests.service"), "{unit}");
}

#[test]
fn standby_is_replaced_when_somebody_resets_it() {
    let mut fixture = KvmFixture::of(lab(STANDBY));
    fixture.wait_for_readiness("standby", "");
    let standby = fixture.qemu();
    fixture.virsh(&["reset", "lab-m"]);
    fixture.wait_for_readiness("instant", "reset");
    fixture.wait_for_readiness("standby", "");
    assert_ne!(fixture.qemu(), standby);
    fixture.restore();
    fixture.act("stop");
    // A restore right after the reset does not get that guest either.
    for _ in 0..5 {
        fixture.wait_for_readiness("standby", "");
        fixture.virsh(&["reset", "lab-m"]);
        fixture.restore();
        fixture.act("stop");
    }
    fixture.finish();
}

#[test]
fn guest_is_kept_when_it_reboots_during_a_run() {
    let mut fixture = KvmFixture::of(lab(STANDBY));
    fixture.wait_for_readiness("standby", "");
    fixture.restore();
    let qemu = fixture.qemu();
    fixture.virsh(&["reset", "lab-m"]);
    fixture.lab.machine("m").wait_for_count(1, SOON).unwrap();
    fixture.lab.machine("m").wait_for_next_count(SOON).unwrap();
    assert_eq!((fixture.state(), fixture.qemu()), (json!("running"), qemu));
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn standby_is_renewed_when_the_guest_powered_itself_off() {
    let mut fixture = KvmFixture::of(lab(STANDBY));
    for round in 0..25 {
        fixture.wait_for_readiness("standby", "");
        let standby = fixture.qemu();
        fixture.restore();
        assert_eq!(fixture.qemu(), standby, "round {round} was not from standby");
        fixture.virsh(&["shutdown", "lab-m"]);
        fixture.wait_for_state("poweroff");
    }
    fixture.wait_for_readiness("standby", "");
    let log = fixture.host.log();
    assert!(!log.contains("not prepared") && !log.contains("not used"), "{log}");
    fixture.finish();
}
