//! Runs and standbys that outlive their host, and the next host that adopts them.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use machinery_testkit::artifacts;
use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const MICRO: (&str, Guest, SnapshotFormat) = ("m", Guest::Micro, SnapshotFormat::Lz4);

/// Makes a lab with the machine `m`, which has these keys.
fn lab(qemu: &str) -> Lab {
    let lab = Lab::new(&[MICRO]).unwrap();
    lab.ahead(qemu).unwrap();
    lab
}

fn served(lab: &Lab) -> (RunningHost, Client) {
    let host = lab.host().unwrap();
    let client = host.client().unwrap();
    (host, client)
}

#[track_caller]
fn does(client: &mut Client, action: &str) {
    assert_eq!(client.act(action, "m").unwrap(), json!({"success": true}), "{action}");
}

fn lock(client: &mut Client) {
    let request = json!({"action": "lock", "machine": "m", "task_id": "t"});
    assert_eq!(client.ask(request).unwrap()["success"], true);
}

#[track_caller]
fn is_lost(machine: &Value, why: &str) {
    let errors = machine["errors"].to_string();
    assert_eq!(machine["state"], "poweroff", "{machine}");
    assert!(errors.contains("adopting the run of an earlier host") && errors.contains(why), "{errors}");
}

/// Starts the machine for a task, kills the host, and returns the machine's QEMU.
fn abandoned(lab: &Lab) -> Pid {
    let (mut host, mut client) = served(lab);
    lock(&mut client);
    does(&mut client, "restore_start");
    lab.folder("m").first_count(SOON).unwrap();
    host.kill().unwrap();
    lab.qemu_of("m").unwrap()
}

fn ends_well(lab: &Lab, host: &mut RunningHost) {
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
}

#[test]
fn run_is_adopted_and_goes_on_when_its_host_was_killed() {
    for jail in ["strict", "auto", "off"] {
        let lab = lab("instant: auto, standby: off");
        lab.set_jail(jail).unwrap();
        let qemu = abandoned(&lab);
        let machine = lab.folder("m");
        machine.wait_for_next_count(SOON).unwrap();
        let (mut host, mut client) = served(&lab);
        let (run, errors) = (client.machine("m").unwrap(), json!([]));
        assert_eq!(
            (&run["state"], &run["locked_by"], &run["errors"]),
            (&json!("running"), &json!("t"), &errors)
        );
        let run_error = run["run_errors"][0].as_str().unwrap_or_default();
        assert!(run_error.contains("another host has taken the machine over"), "{run}");
        assert_eq!(lab.qemu_of("m").unwrap(), qemu, "{jail}");
        machine.wait_for_next_count(SOON).unwrap();
        let picture = lab.cwd().root().join("storage/picture.png");
        fs::create_dir_all(picture.parent().unwrap()).unwrap();
        let request = json!({"action": "screenshot", "machine": "m", "path": picture});
        assert_eq!(client.ask(request).unwrap(), json!({"success": true}));
        let dump = lab.cwd().root().join("dump");
        let request = json!({"action": "dump_memory", "machine": "m", "path": dump});
        assert_eq!(client.ask(request).unwrap(), json!({"success": true}));
        does(&mut client, "stop");
        lab.assert_clean();
        does(&mut client, "restore_start");
        assert_eq!(machine.first_count(SOON).unwrap(), lab.restored_count().unwrap());
        ends_well(&lab, &mut host);
    }
}

#[test]
fn host_uses_no_processor_time_when_it_has_adopted_a_standby_and_is_idle() {
    // With an automatic standby, the host looks at the free memory each second.
    let lab = lab("instant: auto, standby: on");
    let (mut host, mut client) = served(&lab);
    until_standby(&mut client);
    host.kill().unwrap();
    let (mut host, client) = served(&lab);
    drop(client);
    host.wait_until_quiet(Duration::from_secs(3)).unwrap();
    ends_well(&lab, &mut host);
}

#[test]
fn end_of_an_adopted_run_is_reported_at_once() {
    let lab = lab("instant: off, standby: off");
    let qemu = abandoned(&lab);
    let (mut host, mut client) = served(&lab);
    client.subscribe().unwrap();
    kill_process(qemu, Signal::KILL).unwrap();
    assert!(client.wait_for_state("m", "poweroff").unwrap().contains("QEMU"));
    lab.assert_clean();
    does(&mut client, "restore_start");
    does(&mut client, "acpi_stop");
    ends_well(&lab, &mut host);
}

#[test]
fn guest_powers_an_adopted_run_off() {
    let lab = lab("instant: off, standby: off");
    abandoned(&lab);
    let (mut host, mut client) = served(&lab);
    does(&mut client, "acpi_stop");
    assert_eq!(client.machine("m").unwrap()["errors"], json!([]));
    ends_well(&lab, &mut host);
}

#[test]
fn run_outlives_several_hosts() {
    let lab = lab("instant: auto, standby: off");
    let qemu = abandoned(&lab);
    for _ in 0..3 {
        let (mut host, mut client) = served(&lab);
        assert_eq!(client.machine("m").unwrap()["state"], "running");
        host.kill().unwrap();
    }
    let (mut host, mut client) = served(&lab);
    assert_eq!(lab.qemu_of("m").unwrap(), qemu);
    does(&mut client, "stop");
    ends_well(&lab, &mut host);
}

#[test]
fn lost_run_is_reported_when_qemu_died_while_no_host_watched() {
    let lab = lab("instant: auto, standby: off");
    let qemu = abandoned(&lab);
    kill_process(qemu, Signal::KILL).unwrap();
    let (mut host, mut client) = served(&lab);
    is_lost(&client.machine("m").unwrap(), "QEMU has ended while no host watched it");
    lab.assert_clean();
    does(&mut client, "restore_start");
    ends_well(&lab, &mut host);
}

#[test]
fn run_is_ended_when_its_record_is_of_another_process() {
    for change in [
        |record: &mut Value| record["process"]["started"] = json!(1),
        |record: &mut Value| record["process"]["pid"] = json!(1),
        |record: &mut Value| record["process"]["boot"] = json!("another"),
    ] {
        let lab = lab("instant: off, standby: off");
        abandoned(&lab);
        let path = record(&lab, "run");
        let mut content: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut content);
        fs::write(&path, content.to_string()).unwrap();
        let (mut host, mut client) = served(&lab);
        is_lost(&client.machine("m").unwrap(), "QEMU has ended");
        lab.assert_clean();
        ends_well(&lab, &mut host);
    }
}

fn record(lab: &Lab, kind: &str) -> PathBuf {
    lab.cwd().root().join(format!("operational/generated/machinery-host/qemu/state/m.{kind}"))
}

#[test]
fn run_is_ended_when_its_machine_is_not_configured_any_more() {
    let lab = Lab::new(&[MICRO, ("n", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    let yaml = lab.yaml().unwrap();
    abandoned(&lab);
    let (begin, end) = (yaml.find("  m:").unwrap(), yaml.find("  n:").unwrap());
    lab.write_yaml(&format!("{}{}", &yaml[..begin], &yaml[end..])).unwrap();
    let (mut host, _client) = served(&lab);
    lab.assert_clean();
    ends_well(&lab, &mut host);
}

#[test]
fn frozen_run_is_ended_and_reported() {
    let lab = lab("instant: off, standby: off");
    let qemu = abandoned(&lab);
    kill_process(qemu, Signal::STOP).unwrap();
    let (mut host, mut client) = served(&lab);
    is_lost(&client.machine("m").unwrap(), "QEMU to answer on its monitor");
    lab.assert_clean();
    does(&mut client, "restore_start");
    ends_well(&lab, &mut host);
}

#[test]
fn run_is_ended_when_adoption_is_off() {
    let lab = lab("instant: off, standby: off");
    abandoned(&lab);
    lab.host_yaml("adopt: off\n", "").unwrap();
    let (mut host, mut client) = served(&lab);
    assert_eq!(client.machine("m").unwrap()["state"], "poweroff");
    lab.assert_clean();
    ends_well(&lab, &mut host);
}

/// Waits until the host has made a standby of the machine.
fn until_standby(client: &mut Client) {
    client.subscribe().unwrap();
    while client.machine("m").unwrap()["ready"]["mode"] != "standby" {
        client.wait_for_event("ready", "m").unwrap();
    }
}

#[test]
fn standby_is_adopted_and_restores_the_machine() {
    let lab = lab("instant: auto, standby: auto");
    let (mut host, mut client) = served(&lab);
    until_standby(&mut client);
    let qemu = lab.qemu_of("m").unwrap();
    host.kill().unwrap();
    let (mut host, mut client) = served(&lab);
    until_standby(&mut client);
    assert_eq!(lab.qemu_of("m").unwrap(), qemu);
    does(&mut client, "restore_start");
    assert_eq!(lab.qemu_of("m").unwrap(), qemu);
    assert_eq!(lab.folder("m").first_count(SOON).unwrap(), lab.restored_count().unwrap());
    host.kill().unwrap();
    let (mut host, mut client) = served(&lab);
    assert_eq!(client.machine("m").unwrap()["state"], "running", "a standby that became a run");
    does(&mut client, "stop");
    ends_well(&lab, &mut host);
}

#[test]
fn stale_standby_is_not_adopted() {
    let lab = lab("instant: auto, standby: auto");
    let (mut host, mut client) = served(&lab);
    until_standby(&mut client);
    let qemu = lab.qemu_of("m").unwrap();
    host.kill().unwrap();
    let snapshot = lab.folder("m").snapshot.clone();
    let copy = snapshot.with_extension("copy");
    fs::copy(&snapshot, &copy).unwrap();
    fs::rename(&copy, &snapshot).unwrap();
    let (mut host, mut client) = served(&lab);
    until_standby(&mut client);
    assert_ne!(lab.qemu_of("m").unwrap(), qemu);
    does(&mut client, "restore_start");
    assert_eq!(lab.folder("m").first_count(SOON).unwrap(), lab.restored_count().unwrap());
    ends_well(&lab, &mut host);
}

#[test]
fn host_is_replaced_under_running_guests_and_answers_all_the_time() {
    let lab = lab("instant: auto, standby: off");
    let (mut host, mut client) = served(&lab);
    lock(&mut client);
    does(&mut client, "restore_start");
    let (qemu, pid) = (lab.qemu_of("m").unwrap(), host.pid());
    let before = client.ask(json!({"action": "version"})).unwrap();
    let upgraded = lab.run(&["upgrade"]).unwrap();
    assert_eq!(upgraded.code, Some(0), "{upgraded:?}");
    assert!(upgraded.stdout.contains("the host is cuckoo-machinery"), "{upgraded:?}");
    assert!(client.wait_for_close());
    let mut client = host.wait_for_replacement().unwrap();
    let after = client.ask(json!({"action": "version"})).unwrap();
    assert_ne!(before["started"], after["started"]);
    assert_eq!((lab.qemu_of("m").unwrap(), host.pid()), (qemu, pid));
    let machine = client.machine("m").unwrap();
    assert_eq!((&machine["state"], &machine["locked_by"]), (&json!("running"), &json!("t")));
    lab.folder("m").wait_for_next_count(SOON).unwrap();
    // The QEMU is still a child of this process, and is reaped.
    does(&mut client, "stop");
    assert_eq!(host.resources().unwrap().children, "");
    host.signal(Signal::USR2).unwrap();
    drop(client);
    let mut client = host.wait_for_replacement().unwrap();
    does(&mut client, "restore_start");
    ends_well(&lab, &mut host);
}

#[test]
fn action_under_way_is_finished_and_a_later_one_has_to_ask_again_when_the_host_is_replaced() {
    let lab = lab("instant: auto, standby: off");
    let (mut host, mut client) = served(&lab);
    let mut other = host.client().unwrap();
    does(&mut client, "restore_start");
    client.send(&json!({"action": "acpi_stop", "machine": "m", "id": 1})).unwrap();
    client.send(&json!({"action": "restore_start", "machine": "m", "id": 2})).unwrap();
    other.subscribe().unwrap();
    client.send(&json!({"action": "upgrade", "id": 3})).unwrap();
    let mut answers = [(); 3].map(|()| client.next_message().unwrap());
    answers.sort_by_key(|answer| answer["id"].as_u64());
    assert_eq!(answers[0], json!({"success": true, "id": 1}));
    assert_eq!(answers[2], json!({"success": true, "id": 3}));
    let refused = answers[1]["reason"].as_str().unwrap_or_default();
    assert!(answers[1]["success"] == json!(true) || refused.contains("ask again"), "{answers:?}");
    let mut client = host.wait_for_replacement().unwrap();
    let _ = client.act("stop", "m").unwrap();
    ends_well(&lab, &mut host);
}

#[test]
fn second_request_for_a_replacement_is_ignored() {
    let lab = lab("instant: auto, standby: off");
    let (mut host, mut client) = served(&lab);
    does(&mut client, "restore_start");
    let qemu = lab.qemu_of("m").unwrap();
    for _ in 0..3 {
        host.signal(Signal::USR2).unwrap();
    }
    let mut client = host.wait_for_replacement().unwrap();
    assert_eq!(lab.qemu_of("m").unwrap(), qemu);
    assert_eq!(client.machine("m").unwrap()["state"], "running");
    ends_well(&lab, &mut host);
}

#[test]
fn host_serves_on_when_the_program_that_would_replace_it_finds_a_problem() {
    let lab = lab("instant: auto, standby: off");
    let (mut host, mut client) = served(&lab);
    does(&mut client, "restore_start");
    let yaml = lab.yaml().unwrap();
    lab.write_yaml("machines: [").unwrap();
    let refused = lab.run(&["upgrade"]).unwrap();
    assert!(refused.code != Some(0) && refused.stderr.contains("finds problems"), "{refused:?}");
    assert!(refused.stderr.contains("qemu.yaml") && refused.stderr.contains("serves on"), "{refused:?}");
    host.signal(Signal::USR2).unwrap();
    host.wait_for_log(&["the host is not replaced", "qemu.yaml"]).unwrap();
    does(&mut client, "stop");
    lab.write_yaml(&yaml).unwrap();
    ends_well(&lab, &mut host);
}

#[test]
fn machines_are_stopped_when_a_stop_follows_the_request_for_a_replacement() {
    for pause in [0, 30, 100, 300] {
        let lab = lab("instant: auto, standby: off");
        let (mut host, mut client) = served(&lab);
        does(&mut client, "restore_start");
        client.send(&json!({"action": "upgrade", "id": 1})).unwrap();
        client.next_message().unwrap();
        // Meets the host as it hands over, as it executes its program, as that loads, and as that serves.
        std::thread::sleep(Duration::from_millis(pause));
        assert!(host.terminate().unwrap().success(), "{}", host.log());
        lab.assert_clean();
    }
}

#[test]
fn socket_is_made_again_when_its_name_was_removed_before_the_host_was_replaced() {
    let lab = lab("instant: auto, standby: off");
    let (mut host, _client) = served(&lab);
    fs::remove_file(lab.cwd().socket()).unwrap();
    host.signal(Signal::USR2).unwrap();
    let mut client = host.wait_for_replacement().unwrap();
    does(&mut client, "restore_start");
    ends_well(&lab, &mut host);
}

#[test]
fn process_that_ends_while_its_host_is_replaced_is_reaped() {
    let lab = lab("instant: auto, standby: off");
    let (mut host, mut client) = served(&lab);
    does(&mut client, "restore_start");
    let before = limits_of(&host);
    let qemu = lab.qemu_of("m").unwrap();
    // It cannot end before the host has handed over.
    kill_process(qemu, Signal::STOP).unwrap();
    client.send(&json!({"action": "upgrade", "id": 1})).unwrap();
    client.next_message().unwrap();
    assert!(client.wait_for_close());
    kill_process(qemu, Signal::KILL).unwrap();
    let mut client = host.wait_for_replacement().unwrap();
    assert_eq!(client.machine("m").unwrap()["state"], "poweroff");
    assert_eq!(host.resources().unwrap().children, "");
    assert_eq!(limits_of(&host), before);
    ends_well(&lab, &mut host);
}

/// Returns the limits of the host's process.
fn limits_of(host: &RunningHost) -> String {
    fs::read_to_string(format!("/proc/{}/limits", host.pid())).unwrap()
}

#[test]
fn adopted_run_is_stopped_when_it_has_lasted_longer_than_max_run() {
    let lab = lab("instant: auto, standby: off");
    abandoned(&lab);
    let state = lab.cwd().root().join("operational/generated/machinery-host/machines.json");
    let mut saved: Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
    let since = saved["machines"]["m"]["locked_since"].as_u64().unwrap();
    saved["machines"]["m"]["locked_since"] = json!(since - 3600);
    fs::write(&state, saved.to_string()).unwrap();
    // No run is older than the boot of this computer, which may be a minute ago.
    lab.host_yaml("max_run: 60\n", "").unwrap();
    let (mut host, mut client) = served(&lab);
    client.subscribe().unwrap();
    if client.machine("m").unwrap()["state"] != "poweroff" {
        client.wait_for_state("m", "poweroff").unwrap();
    }
    assert!(client.machine("m").unwrap()["errors"].to_string().contains("max_run"));
    ends_well(&lab, &mut host);
}

#[test]
fn run_is_ended_and_reported_when_its_record_cannot_be_read() {
    let lab = lab("instant: off, standby: off");
    abandoned(&lab);
    fs::write(record(&lab, "run"), "{\"format\": 99}").unwrap();
    let (mut host, mut client) = served(&lab);
    is_lost(&client.machine("m").unwrap(), "another version, or is damaged");
    lab.assert_clean();
    does(&mut client, "restore_start");
    ends_well(&lab, &mut host);
}

/// The programs of a host, in a folder of its own.
const PROGRAMS: [&str; 3] = ["cuckoo-machinery", "cuckoo-machinery-jail", "libmachinery_qemu.so"];

/// Installs the programs of that folder, as a package does: each replaces the one before by a new file.
fn install(from: &Path, to: &Path) {
    for name in PROGRAMS {
        let new = to.join(format!("{name}.new"));
        fs::copy(from.join(name), &new).unwrap();
        fs::rename(&new, to.join(name)).unwrap();
    }
}

#[test]
fn eight_guests_and_a_waiting_client_go_on_through_two_upgrades() {
    let names = ["a", "b", "c", "d", "e", "f", "g", "m"];
    let machines = names.map(|name| (name, Guest::Micro, SnapshotFormat::Lz4));
    let lab = Lab::new(&machines).unwrap();
    let programs = lab.cwd().root().join("programs");
    fs::create_dir(&programs).unwrap();
    let build = artifacts::folder().unwrap();
    install(&build, &programs);
    let own = |command: &mut Command| {
        let mut own = Command::new(programs.join(PROGRAMS[0]));
        own.env_clear().envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
        own.arg("--cwd").arg(lab.cwd().root()).arg("--plugin-dir").arg(&programs).arg("serve");
        *command = own;
    };
    let mut host = RunningHost::start_with(lab.cwd(), own).unwrap();
    let mut client = host.client().unwrap();
    for name in names {
        assert_eq!(client.act("restore_start", name).unwrap(), json!({"success": true}), "{name}");
    }
    let runs = || names.map(|name| lab.qemu_of(name).unwrap());
    let before = runs();
    for _ in 0..2 {
        install(&build, &programs);
        let mut waiting = host.client().unwrap();
        let dump = lab.cwd().root().join("dump");
        let request = json!({"action": "dump_memory", "machine": "m", "path": dump, "id": 1});
        waiting.send(&request).unwrap();
        let upgraded = lab.run(&["upgrade"]).unwrap();
        assert_eq!(upgraded.code, Some(0), "{upgraded:?}");
        assert_eq!(waiting.next_message().unwrap(), json!({"success": true, "id": 1}));
        client = host.wait_for_replacement().unwrap();
        assert_eq!(runs(), before);
        for name in names {
            assert_eq!(client.machine(name).unwrap()["state"], "running", "{name}");
            lab.folder(name).wait_for_next_count(SOON).unwrap();
        }
    }
    ends_well(&lab, &mut host);
}

#[test]
fn standby_is_not_adopted_when_its_jail_has_changed() {
    let lab = lab("instant: auto, standby: auto");
    lab.set_jail("off").unwrap();
    let (mut host, mut client) = served(&lab);
    until_standby(&mut client);
    let qemu = lab.qemu_of("m").unwrap();
    host.kill().unwrap();
    lab.set_jail("auto").unwrap();
    let (mut host, mut client) = served(&lab);
    until_standby(&mut client);
    assert_ne!(lab.qemu_of("m").unwrap(), qemu, "the standby has no jail");
    ends_well(&lab, &mut host);
}

#[test]
fn run_is_left_by_sigterm_when_the_host_hands_over_and_stopped_otherwise() {
    let lab = lab("instant: auto, standby: auto");
    let mut host = RunningHost::start_with(lab.cwd(), |command| {
        command.arg("--handover");
    })
    .unwrap();
    let mut client = host.client().unwrap();
    until_standby(&mut client);
    does(&mut client, "restore_start");
    let qemu = lab.qemu_of("m").unwrap();
    assert!(host.terminate().unwrap().success());
    assert_eq!(lab.qemu_of("m").unwrap(), qemu);
    let (mut host, mut client) = served(&lab);
    assert_eq!(client.machine("m").unwrap()["state"], "running");
    ends_well(&lab, &mut host);
}

#[test]
fn standby_is_left_to_the_new_host_when_the_host_is_replaced() {
    let lab = lab("instant: auto, standby: auto");
    let (mut host, mut client) = served(&lab);
    until_standby(&mut client);
    let qemu = lab.qemu_of("m").unwrap();
    host.signal(Signal::USR2).unwrap();
    let mut client = host.wait_for_replacement().unwrap();
    until_standby(&mut client);
    assert_eq!(lab.qemu_of("m").unwrap(), qemu);
    does(&mut client, "restore_start");
    assert_eq!(lab.qemu_of("m").unwrap(), qemu);
    ends_well(&lab, &mut host);
}
