//! Standbys of real domains. A restore resumes the standby, always at the snapshot, and never one that has changed.
//! The host reports the machine as powered off, and ends the standby with itself.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::lab::KvmFixture;
use machinery_testkit::libvirt::SNAPSHOT;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const MICRO: (&str, Guest) = ("m", Guest::Micro);
const LINUX: Guest = Guest::Linux { ram_mib: 256, noise_mib: 64 };
const ON: &str = "machineries: {kvm: {standby: on}}\n";

/// Starts a lab with the micro guest, and waits for its standby.
fn with_standby() -> KvmFixture {
    let mut fixture = KvmFixture::new(&[MICRO], ON);
    fixture.wait_for_standby();
    fixture
}

/// Returns the state events that the subscriber has received by now.
fn received_states(client: &mut Client) -> Vec<Value> {
    // The answer to this request follows the events before it.
    client.send(&json!({"action": "state", "machine": "m", "id": "mark"})).unwrap();
    let mut states = Vec::new();
    loop {
        let message = client.next_message().unwrap();
        if message["id"] == "mark" {
            return states;
        }
        if message["event"] == "state" {
            states.push(message);
        }
    }
}

#[test]
fn standby_is_resumed_at_the_snapshot_by_each_restore() {
    let mut fixture = with_standby();
    for round in 0..10 {
        let standby = fixture.qemu();
        let begun = Instant::now();
        fixture.restore();
        println!("round {round}: {:?} until the guest counts on", begun.elapsed());
        assert_eq!(fixture.qemu(), standby, "the standby was not resumed");
        assert_eq!(fixture.readiness()["mode"], "instant");
        fixture.act("stop");
        fixture.wait_for_mode("standby");
    }
    let log = fixture.host.log();
    assert!(!log.contains("not used") && !log.contains("ERROR"), "{log}");
    fixture.finish();
}

#[test]
fn automatic_standby_is_given_back_when_memory_is_short_and_made_again_when_it_is_free() {
    let automatic = |reserve: &str| {
        format!("machineries: {{kvm: {{standby: auto, standby_memory_reserve: {reserve}}}}}\n")
    };
    let mut fixture = KvmFixture::new(&[MICRO], &automatic("0"));
    fixture.wait_for_standby();
    fixture.lab.cwd().host_yaml(&automatic("1000000 GiB")).unwrap();
    fixture.client.ask(json!({"action": "reload"})).unwrap();
    fixture.wait_for_readiness("instant", "the computer needs its memory");
    fixture.lab.assert_clean();
    fixture.restore();
    fixture.act("stop");
    fixture.wait_for_readiness("instant", "standby_memory_reserve");
    fixture.lab.cwd().host_yaml(&automatic("0")).unwrap();
    fixture.client.ask(json!({"action": "reload"})).unwrap();
    fixture.wait_for_standby();
    let standby = fixture.qemu();
    fixture.restore();
    assert_eq!(fixture.qemu(), standby, "the standby was not resumed");
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn standby_is_reported_as_powered_off() {
    let mut fixture = KvmFixture::new(&[MICRO], ON);
    let ready = fixture.wait_for_standby();
    assert!(ready["memory"].as_u64().unwrap() > 32 << 20, "{ready}");
    assert_eq!(ready["reason"], "");
    assert_eq!(fixture.state(), "poweroff");
    assert_eq!(fixture.client.machine("m").unwrap()["state"], "poweroff");
    assert_eq!(received_states(&mut fixture.subscriber), [] as [Value; 0]);
    let path = fixture.lab.cwd().root().join("look");
    let checked = fixture.lab.run(&["-v", "check"]).unwrap();
    assert!(checked.stdout.contains("machine 'm': it has a standby"), "{}", checked.stdout);
    for action in ["dump_memory", "screenshot"] {
        let reason = fixture.ask_refused(json!({"action": action, "machine": "m", "path": path}));
        assert!(reason.contains("powered off"), "{reason}");
    }
    fixture.act("acpi_stop");
    assert_eq!(fixture.wait_for_standby()["mode"], "standby");
    fixture.restore();
    // Drops the events of the restore.
    received_states(&mut fixture.subscriber);
    fixture.act("stop");
    fixture.wait_for_mode("standby");
    fixture.finish();
}

#[test]
fn standby_is_discarded_by_a_stop() {
    let mut fixture = with_standby();
    received_states(&mut fixture.subscriber);
    fixture.act("stop");
    fixture.lab.assert_clean();
    let ready = fixture.readiness();
    assert!(ready["mode"] == "instant" && ready["memory"] == 0, "{ready}");
    assert_eq!(received_states(&mut fixture.subscriber), [] as [Value; 0]);
    fixture.restore();
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn cold_start_does_not_use_the_standby() {
    let mut fixture = with_standby();
    for _ in 0..2 {
        let standby = fixture.qemu();
        fixture.act("norestore_start");
        assert_eq!(fixture.lab.machine("m").first_count(SOON).unwrap(), 1);
        assert_ne!(fixture.qemu(), standby);
        fixture.act("stop");
        fixture.wait_for_mode("standby");
    }
    fixture.restore();
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn standby_is_replaced_when_it_is_killed() {
    let mut fixture = with_standby();
    let standby = fixture.qemu();
    received_states(&mut fixture.subscriber);
    kill_process(standby, Signal::KILL).unwrap();
    let ready = fixture.wait_for_mode("instant");
    println!("{ready}");
    fixture.wait_for_mode("standby");
    assert_ne!(fixture.qemu(), standby);
    assert_eq!(received_states(&mut fixture.subscriber), [] as [Value; 0]);
    fixture.restore();
    fixture.act("stop");
    fixture.finish();
}

/// A guest that somebody resumes has left its snapshot.
#[test]
fn standby_is_replaced_when_somebody_resumes_it() {
    let mut fixture = with_standby();
    let standby = fixture.qemu();
    received_states(&mut fixture.subscriber);
    fixture.virsh(&["resume", "lab-m"]);
    fixture.wait_for_mode("instant");
    fixture.wait_for_mode("standby");
    assert_ne!(fixture.qemu(), standby);
    assert_eq!(received_states(&mut fixture.subscriber), [] as [Value; 0]);
    // A restore before, during or right after the resume does not get that guest either.
    for together in [false, true] {
        if together {
            fixture.client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
            // It fails if the restore was first.
            let _ = fixture.lab.libvirtd().virsh(&["resume", "lab-m"]);
            assert_eq!(
                fixture.client.next_message().unwrap(),
                json!({"success": true}),
                "{}",
                fixture.host.log()
            );
        } else {
            fixture.virsh(&["resume", "lab-m"]);
            fixture.act("restore_start");
        }
        let first = fixture.lab.machine("m").first_count(SOON).unwrap();
        assert_eq!(first, fixture.lab.restored_count().unwrap());
        fixture.act("stop");
        fixture.wait_for_mode("standby");
    }
    fixture.finish();
}

#[test]
fn standby_is_replaced_when_libvirtd_was_away() {
    let mut fixture = with_standby();
    for _ in 0..2 {
        let standby = fixture.qemu();
        fixture.lab.libvirtd().kill_daemon().unwrap();
        fixture.wait_for_mode("instant");
        assert_eq!(fixture.state(), "poweroff");
        fixture.lab.libvirtd().start_daemon().unwrap();
        fixture.wait_for_mode("standby");
        assert_ne!(fixture.qemu(), standby);
        fixture.restore();
        fixture.act("stop");
        fixture.wait_for_mode("standby");
    }
    // A restore that comes meanwhile waits, and does not resume that standby either.
    let standby = fixture.qemu();
    fixture.lab.libvirtd().kill_daemon().unwrap();
    fixture.client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
    fixture.lab.libvirtd().start_daemon().unwrap();
    assert_eq!(fixture.client.next_message().unwrap(), json!({"success": true}), "{}", fixture.host.log());
    assert_ne!(fixture.qemu(), standby);
    assert_eq!(fixture.lab.machine("m").first_count(SOON).unwrap(), fixture.lab.restored_count().unwrap());
    fixture.act("stop");
    fixture.finish();
}

/// No event reports a new snapshot, so a restore checks the snapshot.
#[test]
fn standby_is_not_used_when_its_snapshot_was_replaced() {
    // libvirt deletes no snapshot of a domain whose disk is an overlay.
    let mut fixture = KvmFixture::new(&[MICRO], "machineries: {kvm: {standby: on, instant: off}}\n");
    fixture.wait_for_standby();
    fixture.act("stop");
    // Another snapshot becomes the current one, while the standby is of the old one.
    fixture.virsh(&["snapshot-revert", "lab-m", SNAPSHOT]);
    let later = fixture.lab.restored_count().unwrap() + 20;
    fixture.lab.machine("m").wait_for_count(later, SOON).unwrap();
    fixture.virsh(&["snapshot-create-as", "lab-m", "other"]);
    // The host prepares a domain as soon as it is off, and a revert makes its snapshot the current one.
    fixture.virsh(&["snapshot-current", "lab-m", "--snapshotname", SNAPSHOT]);
    fixture.virsh(&["destroy", "lab-m"]);
    fixture.act("restore_start");
    // The events of the standby after the run by hand are not waited for.
    fixture.subscribe_again();
    fixture.act("stop");
    fixture.wait_for_mode("standby");
    let old = fixture.qemu();
    fixture.virsh(&["snapshot-delete", "lab-m", SNAPSHOT]);
    let other = fixture.virsh(&["snapshot-dumpxml", "--security-info", "lab-m", "other"]);
    fixture.virsh(&["snapshot-delete", "lab-m", "other", "--metadata"]);
    fixture
        .lab
        .libvirtd()
        .virsh_with_file(&["snapshot-create", "lab-m"], &other, &["--redefine", "--current"])
        .unwrap();
    fixture.act("restore_start");
    assert_ne!(fixture.qemu(), old, "{}", fixture.host.log());
    assert!(fixture.lab.machine("m").first_count(SOON).unwrap() > later - 1, "it was the old snapshot");
    assert!(fixture.host.log().contains("the standby is not used"), "{}", fixture.host.log());
    fixture.subscribe_again();
    fixture.act("stop");
    fixture.wait_for_mode("standby");
    fixture.act("restore_start");
    assert!(fixture.lab.machine("m").first_count(SOON).unwrap() > later - 1, "it was the old snapshot");
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn standby_is_ended_by_the_next_host_when_its_host_was_killed() {
    let mut fixture = with_standby();
    let left = fixture.qemu();
    fixture.host.kill().unwrap();
    assert_eq!(fixture.qemu(), left, "the standby has ended with the host");
    // The next host has no standbys.
    fixture.lab.cwd().host_yaml("machineries: {kvm: {standby: off}}\n").unwrap();
    let mut fixture = KvmFixture::of(fixture.lab);
    fixture.lab.assert_clean();
    assert_eq!(fixture.state(), "poweroff");
    fixture.act("prepare");
    let ready = fixture.readiness();
    assert!(ready["reason"].as_str().unwrap().starts_with("standby is off"), "{ready}");
    fixture.restore();
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn standbys_end_with_the_host() {
    let machines = ["m", "n", "o", "p", "q", "r"].map(|name| (name, Guest::Micro));
    let mut fixture = KvmFixture::new(&machines, ON);
    for (name, _) in machines {
        assert_eq!(fixture.client.act("prepare", name).unwrap(), json!({"success": true}));
        assert_eq!(fixture.client.machine(name).unwrap()["ready"]["mode"], "standby", "{name}");
    }
    // One machine runs, the others have a standby.
    fixture.act("restore_start");
    fixture.finish();
}

#[test]
fn readiness_has_the_reason_when_there_is_no_memory_for_a_standby() {
    let section =
        "machineries: {kvm: {standby: on, standby_memory_limit: 40 MiB, machines: {n: {standby: off}}}}\n";
    let machines = [MICRO, ("n", Guest::Micro), ("big", LINUX)];
    let mut fixture = KvmFixture::new(&machines, section);
    for (name, words) in [("n", "standby is off"), ("big", "256 MiB of memory")] {
        assert_eq!(fixture.client.act("prepare", name).unwrap(), json!({"success": true}));
        let ready = fixture.client.machine(name).unwrap()["ready"].take();
        assert_eq!(ready["mode"], "instant");
        assert!(ready["reason"].as_str().unwrap().contains(words), "{ready}");
    }
    fixture.wait_for_standby();
    fixture.restore();
    fixture.act("stop");
    fixture.finish();
}

#[test]
fn standby_is_made_by_default_while_memory_is_free() {
    let mut fixture = KvmFixture::new(&[MICRO], "");
    fixture.act("prepare");
    let ready = fixture.readiness();
    assert_eq!(ready["mode"], "standby", "{ready}");
    fixture.finish();
}

/// The domain that is being loaded ends at once.
#[test]
fn preparation_is_cancelled_by_a_stop_or_a_cold_start() {
    let mut fixture = KvmFixture::new(&[("m", LINUX)], ON);
    fixture.wait_for_standby();
    fixture.act("stop");
    for action in ["stop", "norestore_start"] {
        fixture.send_until_start(json!({"action": "prepare", "machine": "m", "id": 1}));
        fixture.client.send(&json!({"action": action, "machine": "m", "id": 2})).unwrap();
        let mut answers = [fixture.client.next_message().unwrap(), fixture.client.next_message().unwrap()];
        answers.sort_by_key(|answer| answer["id"].as_u64());
        println!("{answers:?}");
        let reason = answers[0]["reason"].as_str().unwrap();
        assert!(reason.contains("cancelled by another action"), "{reason}");
        assert_eq!(answers[1]["success"], true, "{}", fixture.host.log());
        assert_eq!(fixture.client.machine("m").unwrap()["disabled"], false);
        if action == "stop" {
            fixture.lab.assert_clean();
        } else {
            fixture.act("stop");
            fixture.wait_for_mode("standby");
            fixture.act("stop");
        }
    }
    // A cancellation is no failure.
    let log = fixture.host.log();
    assert!(!log.contains("WARN"), "{log}");
    fixture.send_until_start(json!({"action": "prepare", "machine": "m"}));
    fixture.finish();
}
