//! Accidents of real domains: a QEMU, a libvirtd or a host that dies; a libvirtd that hangs; a guest that powers off
//! or fills its disk.
//!
//! After each of them the host answers in time, reports the accident, and restores the machine again.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use machinery_testkit::guest::Guest;
use machinery_testkit::lab::{KvmFixture, KvmLab, KvmMachine};
use machinery_testkit::libvirt::SNAPSHOT;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const MICRO: (&str, Guest) = ("m", Guest::Micro);

fn good() -> Value {
    json!({"success": true})
}

/// Expects that the machine can be restored and stopped, without leftovers.
#[track_caller]
fn assert_restores(fixture: &mut KvmFixture) {
    fixture.act("enable_machine");
    fixture.act("restore_start");
    fixture.assert_at_snapshot();
    fixture.act("stop");
    fixture.lab.assert_clean();
}

fn kill(process: Pid) {
    kill_process(process, Signal::KILL).unwrap();
}

#[test]
fn death_of_qemu_is_reported_at_once() {
    let mut fixture = KvmFixture::new(&[MICRO], "");
    for _ in 0..3 {
        fixture.act("restore_start");
        fixture.wait_for_state("running");
        let begun = Instant::now();
        kill(fixture.qemu());
        let reason = fixture.wait_for_state("poweroff");
        println!("reported {:?} after the kill: {reason}", begun.elapsed());
        assert!(reason.contains("its QEMU ended"), "{reason}");
        assert_eq!(fixture.state(), "poweroff");
        fixture.lab.assert_clean();
    }
    assert_restores(&mut fixture);
    fixture.finish();
}

/// libvirt reports at once that the guest powers off, and a little later that its QEMU has ended.
#[test]
fn poweroff_by_the_guest_is_reported_at_once() {
    let mut fixture = KvmFixture::new(&[MICRO], "");
    fixture.act("restore_start");
    fixture.wait_for_state("running");
    let begun = Instant::now();
    fixture.virsh(&["shutdown", "lab-m"]);
    let goes = fixture.wait_for_state("stopping");
    println!("{:?} after the power button: {goes}", begun.elapsed());
    assert!(goes.contains("the guest powers itself off"), "{goes}");
    let gone = fixture.wait_for_state("poweroff");
    println!("{:?}: {gone}", begun.elapsed());
    assert!(gone.contains("the guest powered itself off"), "{gone}");
    fixture.lab.assert_clean();
    assert_restores(&mut fixture);
    fixture.finish();
}

#[test]
fn machine_is_in_error_when_somebody_pauses_its_guest() {
    let mut fixture = KvmFixture::new(&[MICRO], "");
    fixture.act("restore_start");
    fixture.virsh(&["suspend", "lab-m"]);
    fixture.wait_for_state("paused");
    assert_eq!(fixture.state(), "error");
    let reason = fixture.wait_for_state("error");
    assert!(reason.contains("paused by somebody else"), "{reason}");
    fixture.virsh(&["resume", "lab-m"]);
    fixture.wait_for_state("running");
    assert_eq!(fixture.state(), "running");
    // A paused guest is stopped before the next start, as a running one is.
    fixture.virsh(&["suspend", "lab-m"]);
    fixture.wait_for_state("paused");
    assert_restores(&mut fixture);
    fixture.finish();
}

/// The domain's disk is on a file system with hardly any free space.
#[test]
fn full_disk_is_reported_with_its_path_and_the_reason() {
    let guest = Guest::Linux { ram_mib: 256, noise_mib: 64 };
    let lab = KvmLab::new(&[("m", guest)]).unwrap();
    let disk = lab.machine("m").disk.clone();
    let tiny = lab.cwd().root().join("tiny");
    fs::create_dir(&tiny).unwrap();
    let (disk, tiny) = (disk.to_str().unwrap(), tiny.to_str().unwrap());
    let kib = fs::metadata(disk).unwrap().len() / 1024 + 4096;
    let size = format!("size={kib}k");
    lab.libvirtd().inside(&["mount", "-t", "tmpfs", "-o", &size, "tmpfs", tiny]).unwrap();
    let copy = format!("{tiny}/disk.qcow2");
    lab.libvirtd().inside(&["cp", disk, &copy]).unwrap();
    lab.libvirtd().inside(&["mount", "--bind", &copy, disk]).unwrap();
    let mut fixture = KvmFixture::of(lab);
    fixture.act("restore_start");
    fixture.lab.machine("m").fill_disk(60);
    let reason = fixture.wait_for_state("error");
    println!("{reason}");
    assert!(reason.contains(disk) && reason.contains("no space"), "{reason}");
    assert_eq!(fixture.state(), "error");
    fixture.act("stop");
    fixture.act("restore_start");
    assert_eq!(fixture.lab.machine("m").marks(SOON).unwrap().ram, "snapshot");
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn machine_is_driven_when_libvirtd_restarts_between_actions() {
    let mut fixture = KvmFixture::new(&[MICRO], "");
    for _ in 0..3 {
        fixture.act("restore_start");
        fixture.wait_for_state("running");
        fixture.lab.libvirtd().kill_daemon().unwrap();
        let reason = fixture.wait_for_state("error");
        assert!(reason.contains("is lost: libvirtd has ended"), "{reason}");
        fixture.lab.libvirtd().start_daemon().unwrap();
        fixture.wait_for_state("running");
        // Events arrive again, too.
        fixture.virsh(&["shutdown", "lab-m"]);
        fixture.wait_for_state("poweroff");
        // While no machine runs, a restart is not reported.
        fixture.lab.libvirtd().kill_daemon().unwrap();
        fixture.lab.libvirtd().start_daemon().unwrap();
    }
    assert_restores(&mut fixture);
    fixture.finish();
}

#[test]
fn action_waits_when_libvirtd_restarts() {
    let mut fixture = KvmFixture::new(&[MICRO], "");
    for action in ["restore_start", "stop"] {
        fixture.lab.libvirtd().kill_daemon().unwrap();
        fixture.client.send(&json!({"action": action, "machine": "m"})).unwrap();
        fixture.lab.libvirtd().start_daemon().unwrap();
        assert_eq!(fixture.client.next_message().unwrap(), good(), "{action}; {}", fixture.host.log());
    }
    assert_restores(&mut fixture);
    fixture.finish();
}

/// libvirtd dies at different moments of a restore. The restore fails with a reason or succeeds, and the next one
/// succeeds.
#[test]
fn machine_restores_again_when_libvirtd_died_during_a_restore() {
    for instant in ["off", "on"] {
        let mut fixture = KvmFixture::new(
            &[MICRO],
            &format!("machineries: {{kvm: {{instant: {instant}, standby: off}}}}\n"),
        );
        fixture.act("prepare");
        let KvmMachine { disk, overlay, .. } = fixture.lab.machine("m");
        let opened = if instant == "on" { overlay } else { disk }.clone();
        restore_while_libvirtd_dies(&mut fixture, &opened);
        fixture.finish();
    }
}

/// Kills libvirtd some time after a restore has opened that file.
fn restore_while_libvirtd_dies(fixture: &mut KvmFixture, opened: &Path) {
    let opened = opened.file_name().unwrap().to_str().unwrap();
    let mut failed = 0;
    for delay in [0, 30, 60, 100, 150, 200] {
        fixture.send_until_opened(json!({"action": "restore_start", "machine": "m"}), opened);
        // The sleep chooses the moment; it waits for no event.
        thread::sleep(Duration::from_millis(delay));
        fixture.lab.libvirtd().kill_daemon().unwrap();
        fixture.lab.libvirtd().start_daemon_without_lost_starts().unwrap();
        let answer = fixture.client.next_message().unwrap();
        println!("after {delay} ms: {answer}");
        if answer["success"] == false {
            failed += 1;
            let reason = answer["reason"].as_str().unwrap();
            assert!(reason.contains("restore_start of machine 'm' failed: "), "{reason}");
            assert!(reason.contains("libvirtd has gone away"), "{reason}");
        }
        assert_restores(fixture);
    }
    assert!(failed > 0, "libvirtd never died during a restore");
}

/// A libvirtd that is killed before it has noted QEMU's process leaves a start that no later one finishes. The domain can
/// be stopped in no way: libvirt answers after 30 s that it is locked.
#[test]
fn machine_reports_the_way_out_when_libvirt_has_lost_its_start_and_heals_after_it() {
    let mut fixture = KvmFixture::new(&[MICRO], "timeouts: {stop: 50, restore_start: 6}");
    fixture.act("restore_start");
    let qemu = fixture.qemu();
    fixture.lab.libvirtd().kill_daemon().unwrap();
    fixture.wait_for_state("error");
    kill(qemu);
    fixture.lab.libvirtd().lose_start("lab-m").unwrap();
    fixture.lab.libvirtd().start_daemon().unwrap();
    fixture.wait_for_state("paused");
    let reason = fixture.ask_refused(json!({"action": "stop", "machine": "m"}));
    assert!(reason.contains("the domain is still starting up"), "{reason}");
    assert!(
        reason.contains("libvirt/qemu") && reason.contains("/lab-m.xml there, and start libvirtd again"),
        "{reason}"
    );
    assert_ne!(fixture.client.machine("m").unwrap()["quarantine"], Value::Null);
    fixture.lab.libvirtd().kill_daemon().unwrap();
    fixture.lab.libvirtd().start_daemon_without_lost_starts().unwrap();
    fixture.subscriber.wait_for_event("enabled", "m").unwrap();
    assert_restores(&mut fixture);
    fixture.finish();
}

#[test]
fn end_of_the_guest_is_reported_when_libvirtd_is_back() {
    let mut fixture = KvmFixture::new(&[MICRO], "");
    fixture.act("restore_start");
    fixture.wait_for_state("running");
    fixture.lab.libvirtd().kill_daemon().unwrap();
    fixture.wait_for_state("error");
    kill(fixture.qemu());
    fixture.lab.libvirtd().start_daemon().unwrap();
    let reason = fixture.wait_for_state("poweroff");
    println!("{reason}");
    assert_restores(&mut fixture);
    fixture.finish();
}

#[test]
fn restore_fails_with_advice_when_libvirtd_stays_away() {
    let mut fixture = KvmFixture::new(&[MICRO], "");
    fixture.lab.libvirtd().kill_daemon().unwrap();
    let reason = fixture.ask_refused(json!({"action": "restore_start", "machine": "m"}));
    println!("{reason}");
    for words in ["the connection to libvirt at qemu:///system", "is lost", "Start libvirtd"] {
        assert!(reason.contains(words), "no {words:?} in {reason}");
    }
    fixture.lab.libvirtd().start_daemon().unwrap();
    assert_restores(&mut fixture);
    // Without libvirtd the host does not start.
    fixture.lab.libvirtd().kill_daemon().unwrap();
    assert_eq!(fixture.host.terminate().unwrap().code(), Some(0), "{}", fixture.host.log());
    let ran = fixture.lab.run(&["serve"]).unwrap();
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(
        ran.stderr.contains("cannot connect to libvirt") && ran.stderr.contains("Start libvirtd"),
        "{}",
        ran.stderr
    );
    fixture.lab.assert_clean();
}

#[test]
fn action_times_out_when_libvirtd_hangs() {
    let lab = KvmLab::new(&[MICRO]).unwrap();
    lab.cwd().host_yaml("timeouts: {screenshot: 1}\n").unwrap();
    let mut fixture = KvmFixture::of(lab);
    fixture.act("restore_start");
    fixture.lab.libvirtd().signal_daemon(Signal::STOP).unwrap();
    let path = fixture.lab.cwd().root().join("shot.png");
    let begun = Instant::now();
    let request = json!({"action": "screenshot", "machine": "m", "path": path});
    let answer = fixture.client.ask(request).unwrap();
    let (took, reason) = (begun.elapsed(), answer["reason"].as_str().unwrap());
    println!("{took:?}: {reason}");
    assert!(reason.contains("waited 1.0 s for libvirt"), "{reason}");
    fixture.lab.libvirtd().signal_daemon(Signal::CONT).unwrap();
    fixture.act("stop");
    assert!(!path.exists());
    assert_restores(&mut fixture);
    fixture.finish();
}

#[test]
fn restore_fails_at_its_timeout_when_libvirtd_hangs() {
    let yaml =
        "timeouts: {restore_start: 8, stop: 8, state: 5}\nmachineries: {kvm: {instant: off, standby: off}}\n";
    let mut fixture = KvmFixture::new(&[MICRO], yaml);
    fixture.send_until_start(json!({"action": "restore_start", "machine": "m"}));
    fixture.lab.libvirtd().signal_daemon(Signal::STOP).unwrap();
    let answer = fixture.client.next_message().unwrap();
    fixture.lab.libvirtd().signal_daemon(Signal::CONT).unwrap();
    let reason = answer["reason"].as_str().unwrap();
    assert!(reason.contains("waited 8.0 s for the domain to run"), "{reason}");
    fixture.subscriber.wait_for_event("healed", "m").unwrap();
    assert_restores(&mut fixture);
    fixture.finish();
}

#[test]
fn preparation_ends_soon_after_its_cancellation_when_libvirtd_hangs() {
    let mut fixture = KvmFixture::new(&[MICRO], "timeouts: {stop: 8}\nmachineries: {kvm: {standby: on}}\n");
    fixture.wait_for_standby();
    // It discards the standby.
    fixture.act("stop");
    fixture.send_until_start(json!({"action": "prepare", "machine": "m", "id": 1}));
    fixture.lab.libvirtd().signal_daemon(Signal::STOP).unwrap();
    fixture.client.send(&json!({"action": "stop", "machine": "m", "id": 2})).unwrap();
    let answers = [fixture.client.next_message().unwrap(), fixture.client.next_message().unwrap()];
    fixture.lab.libvirtd().signal_daemon(Signal::CONT).unwrap();
    println!("{answers:?}");
    let prepared = answers.iter().find(|answer| answer["id"] == 1).unwrap();
    let reason = prepared["reason"].as_str().unwrap();
    assert!(reason.contains("cancelled by another action"), "{reason}");
    let log = fixture.host.log();
    assert!(!log.contains("did not return from the plugin"), "{log}");
    fixture.subscriber.wait_for_event("healed", "m").unwrap();
    assert_restores(&mut fixture);
    fixture.finish();
}

/// The next host adopts the run of a killed host.
#[test]
fn run_is_adopted_by_the_next_host_when_its_host_was_killed() {
    for instant in ["off", "on"] {
        let yaml = format!("machineries: {{kvm: {{instant: {instant}, standby: off}}}}\n");
        let mut fixture = KvmFixture::new(&[MICRO], &yaml);
        let lock = json!({"action": "lock", "machine": "m", "task_id": "t"});
        assert_eq!(fixture.client.ask(lock).unwrap()["success"], true);
        fixture.act("restore_start");
        let qemu = fixture.qemu();
        fixture.host.kill().unwrap();
        let mut fixture = KvmFixture::of(fixture.lab);
        let machine = fixture.client.machine("m").unwrap();
        assert_eq!((&machine["state"], &machine["errors"]), (&json!("running"), &json!([])), "{machine}");
        assert_eq!((fixture.qemu(), &machine["locked_by"]), (qemu, &json!("t")));
        fixture.lab.machine("m").wait_for_next_count(SOON).unwrap();
        let path = fixture.lab.cwd().root().join("dump");
        let dump = json!({"action": "dump_memory", "machine": "m", "path": path});
        assert_eq!(fixture.client.ask(dump).unwrap(), json!({"success": true}));
        kill_process(qemu, Signal::KILL).unwrap();
        fixture.wait_for_state("poweroff");
        fixture.restore();
        fixture.host.kill().unwrap();
        fixture.virsh(&["destroy", "lab-m"]);
        let mut fixture = KvmFixture::of(fixture.lab);
        let machine = fixture.client.machine("m").unwrap();
        assert_eq!(machine["state"], "poweroff", "{machine}");
        let lost = "its domain has ended, or was started anew, while no host watched it";
        assert!(machine["errors"].to_string().contains(lost), "{machine}");
        assert_restores(&mut fixture);
        fixture.finish();
    }
}

/// Without adoption, the next host ends the run of a killed host, but not a run that an operator has started, until a restore is
/// requested.
#[test]
fn run_is_ended_by_the_next_host_when_adoption_is_off() {
    let mut fixture = KvmFixture::new(&[MICRO], "adopt: off\n");
    fixture.act("restore_start");
    let qemu = fixture.qemu();
    fixture.host.kill().unwrap();
    assert_eq!(fixture.qemu(), qemu, "the run has ended with the host");
    let mut fixture = KvmFixture::of(fixture.lab);
    fixture.lab.assert_clean();
    assert_eq!(fixture.state(), "poweroff");
    assert!(
        fixture.host.log().contains("a run that an earlier host has left is stopped"),
        "{}",
        fixture.host.log()
    );
    assert_restores(&mut fixture);
    assert_eq!(fixture.host.terminate().unwrap().code(), Some(0));

    let lab = fixture.lab;
    lab.libvirtd().virsh(&["snapshot-revert", "lab-m", SNAPSHOT]).unwrap();
    let theirs = lab.qemu_of("m").unwrap();
    let mut fixture = KvmFixture::of(lab);
    assert_eq!(fixture.qemu(), theirs, "somebody else's run was ended");
    assert_eq!(fixture.state(), "running");
    assert_restores(&mut fixture);
    fixture.finish();
}

#[test]
fn run_goes_on_when_its_host_is_replaced() {
    let mut fixture = KvmFixture::new(&[MICRO], "");
    fixture.act("restore_start");
    let qemu = fixture.qemu();
    fixture.host.signal(Signal::USR2).unwrap();
    let mut client = fixture.host.wait_for_replacement().unwrap();
    assert_eq!(client.machine("m").unwrap()["state"], "running");
    assert_eq!(fixture.qemu(), qemu);
    fixture.lab.machine("m").wait_for_next_count(SOON).unwrap();
    assert_eq!(client.act("stop", "m").unwrap(), good());
    assert_eq!(fixture.host.terminate().unwrap().code(), Some(0));
    fixture.lab.assert_clean();
}

#[test]
fn run_is_ended_when_its_machine_is_not_configured_any_more_or_has_another_domain() {
    for change in [|yaml: &str| yaml.replace("  m:", "  other:"), |yaml: &str| yaml.replace("lab-m", "lab-n")]
    {
        let mut fixture = KvmFixture::of(KvmLab::new(&[MICRO, ("n", Guest::Micro)]).unwrap());
        fixture.act("restore_start");
        fixture.host.kill().unwrap();
        let yaml = fixture.lab.cwd().yaml("kvm").unwrap();
        let without_n = yaml.split_once("  n:").unwrap().0;
        fixture.lab.cwd().write_yaml("kvm", &change(without_n)).unwrap();
        let mut fixture = KvmFixture::of(fixture.lab);
        fixture.lab.assert_clean();
        assert_eq!(fixture.host.terminate().unwrap().code(), Some(0));
    }
}

/// libvirtd completes a restore after the host that has requested it is killed.
#[test]
fn run_is_ended_by_the_next_host_when_its_host_was_killed_during_a_restore() {
    let mut fixture =
        KvmFixture::of(KvmLab::new(&[("m", Guest::Linux { ram_mib: 256, noise_mib: 64 })]).unwrap());
    for _ in 0..3 {
        fixture.send_until_start(json!({"action": "restore_start", "machine": "m"}));
        fixture.host.kill().unwrap();
        fixture = KvmFixture::of(fixture.lab);
        assert_eq!(fixture.state(), "poweroff");
        fixture.lab.assert_clean();
    }
    fixture.act("restore_start");
    assert_eq!(fixture.lab.machine("m").marks(SOON).unwrap().ram, "snapshot");
    fixture.act("stop");
    fixture.finish();
}
