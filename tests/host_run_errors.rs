//! A run of a task that is lost or incomplete has an error, and a clean one has none.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::Lab;
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::snapshot::SnapshotFormat;
use machinery_testkit::wait::wait_until;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

fn success() -> Value {
    json!({"success": true})
}

fn lock(client: &mut Client, task_id: &str) {
    let lock = json!({"action": "lock", "machine": "m", "task_id": task_id});
    assert_eq!(client.ask(lock).unwrap()["success"], true);
}

/// Locks the machine for the task `t`, and starts it.
fn start(client: &mut Client) {
    lock(client, "t");
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    assert_eq!(client.machine("m").unwrap()["run_errors"], json!([]));
}

/// Checks that the machine has the error of its run until another task locks it.
#[track_caller]
fn assert_run_error(client: &mut Client, expected: &str) {
    let machine = client.machine("m").unwrap();
    let errors = machine["run_errors"].clone();
    assert!(errors[0].as_str().is_some_and(|error| error.contains(expected)), "{errors}");
    assert_eq!(machine["run_lost"], true);
    assert_eq!(client.act("stop", "m").unwrap(), success());
    assert_eq!(client.act("unlock", "m").unwrap(), success());
    assert_eq!(client.machine("m").unwrap()["run_errors"], errors);
    lock(client, "u");
    assert_eq!(client.machine("m").unwrap()["run_errors"], json!([]));
    assert_eq!(client.act("unlock", "m").unwrap(), success());
}

#[test]
fn run_error_is_an_event_a_warning_and_kept_for_the_task_when_its_qemu_is_killed() {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    let mut host = lab.host().unwrap();
    let (mut client, mut subscriber) = (host.client().unwrap(), host.client().unwrap());
    subscriber.subscribe().unwrap();
    start(&mut client);
    kill_process(lab.qemu_of("m").unwrap(), Signal::KILL).unwrap();
    let event = subscriber.wait_for_event("run_error", "m").unwrap();
    assert_eq!((&event["task_id"], &event["lost"]), (&json!("t"), &json!(true)));
    assert!(event["reason"].as_str().unwrap().contains("killed by signal 9"), "{event}");
    let words = ["WARN", "the run of its task is lost", "task_id=\"t\"", "killed by signal 9"];
    host.wait_for_log(&words).unwrap();
    assert_run_error(&mut client, "killed by signal 9");
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
}

#[test]
fn run_error_is_there_after_the_hosts_next_start_when_the_host_was_killed_during_the_run() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    start(&mut host.client().unwrap());
    host.kill().unwrap();
    // Twice: the error outlives the next host as well.
    for _ in 0..2 {
        let mut host = RunningHost::start(&cwd).unwrap();
        let errors = host.client().unwrap().machine("m").unwrap()["run_errors"].clone();
        assert_eq!(errors.as_array().unwrap().len(), 1, "{errors}");
        host.kill().unwrap();
    }
    let host = RunningHost::start(&cwd).unwrap();
    assert_run_error(&mut host.client().unwrap(), "the host has ended during its run");
}

#[test]
fn run_error_is_there_when_the_host_stops_all_machines() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    start(&mut client);
    assert_eq!(client.ask(json!({"action": "shutdown_all"})).unwrap(), success());
    assert_run_error(&mut client, "the host has stopped the machine during its run");
    start(&mut client);
    assert_eq!(host.terminate().unwrap().code(), Some(0));
    let host = RunningHost::start(&cwd).unwrap();
    assert_run_error(&mut host.client().unwrap(), "the host has stopped the machine during its run");
}

#[test]
fn run_has_no_error_when_its_task_or_its_guest_ends_it() {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    start(&mut client);
    for end in ["stop", "acpi_stop"] {
        assert_eq!(client.act("restore_start", "m").unwrap(), success());
        assert_eq!(client.act(end, "m").unwrap(), success());
        assert_eq!(client.machine("m").unwrap()["run_errors"], json!([]), "{end}");
    }
}

#[test]
fn run_has_no_error_beside_the_answer_when_its_start_fails() {
    let cwd = ScratchCwd::double(&[("m", "faults: {restore_start: fail}")]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    lock(&mut client, "t");
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], false);
    assert_eq!(client.machine("m").unwrap()["run_errors"], json!([]));
}

#[test]
fn run_error_is_there_when_an_action_takes_the_machine_out_of_the_pool() {
    let cwd = ScratchCwd::double(&[("m", "faults: {screenshot: panic}, fault_times: 1")]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    start(&mut client);
    let path = cwd.root().join("picture.png");
    let picture = json!({"action": "screenshot", "machine": "m", "path": path});
    assert_eq!(client.ask(picture).unwrap()["success"], false);
    let errors = client.machine("m").unwrap()["run_errors"].clone();
    assert!(errors[0].as_str().is_some_and(|error| error.contains("screenshot")), "{errors}");
    assert_eq!(client.machine("m").unwrap()["run_lost"], false);
}

#[test]
fn run_is_not_lost_after_the_hosts_next_start_when_its_guest_had_powered_itself_off() {
    let cwd =
        ScratchCwd::double(&[("m", "poweroff_after_ms: 1, poweroff_reason: the guest powered itself off")])
            .unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut subscriber = host.client().unwrap();
    subscriber.subscribe().unwrap();
    let mut client = host.client().unwrap();
    lock(&mut client, "t");
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    subscriber.wait_for_state("m", "poweroff").unwrap();
    // The host notices the end of the run on disk as well, for which there is no event.
    let mark = cwd.root().join("operational/generated/machinery-host/machines.runs/m");
    wait_until("the mark of the run is left", || !mark.exists());
    host.kill().unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let machine = host.client().unwrap().machine("m").unwrap();
    assert_eq!((&machine["locked_by"], &machine["run_lost"]), (&json!("t"), &json!(false)));
}
