//! The host's lifecycle: one host for each CWD, orderly shutdown, and exit codes of the command line.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::host::{self, CommandOutput, RunningHost};
use machinery_testkit::scratch::{ScratchCwd, double};
use rustix::process::Signal;
use serde_json::{Value, json};

fn success() -> Value {
    json!({"success": true})
}

fn subscribed(host: &RunningHost) -> Client {
    let mut client = host.client().unwrap();
    assert_eq!(client.ask(json!({"action": "subscribe"})).unwrap(), success());
    client
}

fn hear_state(subscriber: &mut Client, machine: &str, state: &str) {
    let reported = json!({"event": "state", "machine": machine, "state": state});
    while subscriber.next_message().unwrap() != reported {}
}

#[track_caller]
fn assert_ended_well(host: &mut RunningHost, cwd: &ScratchCwd) {
    assert_eq!(host.wait().unwrap().code(), Some(0), "{}", host.log());
    let left: Vec<_> = fs::read_dir(cwd.socket().parent().unwrap()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn host_exits_on_sigterm_and_sigint_when_idle() {
    for signal in [Signal::TERM, Signal::INT] {
        let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
        let mut host = RunningHost::start(&cwd).unwrap();
        let mut client = host.client().unwrap();
        host.signal(signal).unwrap();
        assert!(client.wait_for_close());
        assert_ended_well(&mut host, &cwd);
    }
}

#[test]
fn shutdown_finishes_running_actions_and_refuses_queued_ones() {
    let cwd =
        ScratchCwd::double(&[("m", "delays_ms: {restore_start: 500}"), ("n", ""), ("off", "")]).unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut subscriber = subscribed(&host);
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "n").unwrap(), success());
    for id in ["runs", "waits"] {
        client.send(&json!({"action": "restore_start", "machine": "m", "id": id})).unwrap();
    }
    hear_state(&mut subscriber, "m", "starting");
    host.signal(Signal::TERM).unwrap();
    host.wait_for_notification("STOPPING=1").unwrap();

    // Connected clients still get answers.
    let answer = client.act("restore_start", "off").unwrap();
    assert!(answer["reason"].as_str().unwrap().contains("shutting down"), "{answer}");
    let mut answers = [client.next_message().unwrap(), client.next_message().unwrap()];
    answers.sort_by_key(|answer| answer["id"].to_string());
    let [runs, waits] = answers;
    assert_eq!(runs, json!({"success": true, "id": "runs"}));
    assert_eq!((&waits["id"], &waits["success"]), (&json!("waits"), &json!(false)));
    assert!(waits["reason"].as_str().unwrap().contains("shutting down"), "{waits}");
    assert!(client.wait_for_close());

    assert_ended_well(&mut host, &cwd);
    let log = host.log();
    for machine in ["m", "n"] {
        let stopped = |line: &&str| line.contains(&format!("machine=\"{machine}\" action=\"stop\""));
        assert!(log.lines().any(|line| stopped(&line) && line.contains("done")), "{machine}: {log}");
    }
    assert!(!log.contains("machine=\"off\" action"), "{log}");
}

#[test]
fn shutdown_answers_all_queued_requests() {
    let cwd = ScratchCwd::double(&[("m", "delays_ms: {restore_start: 300}")]).unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut subscriber = subscribed(&host);
    let mut client = host.client().unwrap();
    for id in 0..3000 {
        client.send(&json!({"action": "restore_start", "machine": "m", "id": id})).unwrap();
    }
    hear_state(&mut subscriber, "m", "starting");
    host.signal(Signal::TERM).unwrap();
    let mut answered = 0;
    while client.next_message().is_ok() {
        answered += 1;
    }
    assert_eq!(answered, 3000);
    assert_ended_well(&mut host, &cwd);
}

#[test]
fn host_exits_at_once_on_a_second_sigterm() {
    let cwd = ScratchCwd::double(&[("m", "delays_ms: {stop: 40000}")]).unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    host.client().unwrap().act("restore_start", "m").unwrap();
    let begun = Instant::now();
    host.signal(Signal::TERM).unwrap();
    host.wait_for_notification("STOPPING=1").unwrap();
    host.signal(Signal::TERM).unwrap();
    host.wait().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert!(host.log().contains("machines may be left"), "{}", host.log());
    assert!(!cwd.socket().exists());
}

#[test]
fn second_host_is_refused_when_the_cwd_is_served() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    let second = host::run(&cwd, &["serve"]).unwrap();
    assert_eq!(second.code, Some(2), "{second:?}");
    assert!(second.stderr.contains("another host already serves this CWD"), "{second:?}");
    // The first host is not affected.
    assert_eq!(host.client().unwrap().act("restore_start", "m").unwrap(), success());
    host.terminate().unwrap();
    RunningHost::start(&cwd).unwrap();
}

#[test]
fn serve_fails_when_another_manager_answers_on_the_socket() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    fs::create_dir_all(cwd.socket().parent().unwrap()).unwrap();
    let _manager = UnixListener::bind(cwd.socket()).unwrap();
    let refused = host::run(&cwd, &["serve"]).unwrap();
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("another machinery manager answers"), "{refused:?}");
    UnixStream::connect(cwd.socket()).unwrap();
}

#[test]
fn stale_socket_is_replaced_when_a_host_was_killed() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let mut killed = RunningHost::start(&cwd).unwrap();
    killed.kill().unwrap();
    assert!(cwd.socket().exists());
    assert_eq!(host::run(&cwd, &["list"]).unwrap().code, Some(1));
    let mut host = RunningHost::start(&cwd).unwrap();
    assert_eq!(host.client().unwrap().act("restore_start", "m").unwrap(), success());
    host.signal(Signal::TERM).unwrap();
    assert_ended_well(&mut host, &cwd);
}

#[test]
fn host_serves_when_the_cwd_is_longer_than_a_socket_address() {
    let deep = PathBuf::from("a-rather-long-name-of-a-folder".repeat(4)).join("and another one".repeat(4));
    let cwd = ScratchCwd::below(&deep, &[("double", &double(&[("m", "")]))]).unwrap();
    assert!(cwd.socket().as_os_str().len() > 200);
    let mut host = RunningHost::start(&cwd).unwrap();
    assert_eq!(host.client().unwrap().act("restore_start", "m").unwrap(), success());
    let stopped = host::run(&cwd, &["stop", "m"]).unwrap();
    assert_eq!(stopped.code, Some(0), "{stopped:?}");
    let second = host::run(&cwd, &["serve"]).unwrap();
    assert_eq!(second.code, Some(2), "{second:?}");
    host.signal(Signal::TERM).unwrap();
    assert_ended_well(&mut host, &cwd);
}

#[test]
fn cwd_is_taken_from_the_environment_when_no_option_is_given() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let _host = RunningHost::start(&cwd).unwrap();
    let program = host::command(&cwd).unwrap().get_program().to_owned();
    let mut command = Command::new(&program);
    command.arg("list").env("CUCKOO_CWD", cwd.root());
    assert_eq!(host::run_command(command).unwrap().code, Some(0));
}

/// Runs a command and asserts its exit code.
#[track_caller]
fn assert_code(cwd: &ScratchCwd, arguments: &[&str], code: i32) -> CommandOutput {
    let ran = host::run(cwd, arguments).unwrap();
    assert_eq!(ran.code, Some(code), "{arguments:?}: {ran:?}");
    assert!(code == 0 || !ran.stderr.is_empty() || !ran.stdout.is_empty(), "{arguments:?} fails silently");
    ran
}

#[test]
fn exit_code_shows_the_kind_of_failure() {
    let cwd = ScratchCwd::double(&[("m", ""), ("bad", "faults: {restore_start: fail}")]).unwrap();
    for arguments in [&["list"][..], &["state", "m"], &["restore-start", "m"]] {
        assert!(assert_code(&cwd, arguments, 1).stderr.contains("cuckoo-machinery serve"), "{arguments:?}");
    }
    let _host = RunningHost::start(&cwd).unwrap();
    let [memory, screen] = ["memory", "screen"].map(|name| cwd.root().join(name).display().to_string());
    for arguments in [
        &["check"][..],
        &["plugins"],
        &["list"],
        &["state", "m"],
        &["restore-start", "m"],
        &["dump-memory", "m", &memory],
        &["dump-memory", "m", &memory, "--format", "elf"],
        &["screenshot", "m", &screen],
        &["acpi-stop", "m"],
        &["norestore-start", "m"],
        &["stop", "m"],
        &["stop", "m"],
        &["disable-machine", "m", "smells"],
        &["disable-machine", "m"],
        &["enable-machine", "m"],
        &["--version"],
        &["--help"],
    ] {
        assert_code(&cwd, arguments, 0);
    }
    assert!(Path::new(&memory).exists() && Path::new(&screen).exists());
    for arguments in [
        &["restore-start", "bad"][..],
        &["restore-start", "ghost"],
        &["state", "ghost"],
        &["screenshot", "m", &screen],
        &["dump-memory", "m", &memory, "--format", "win-dmp"],
        &["unlock", "m"],
    ] {
        assert_code(&cwd, arguments, 1);
    }
    for arguments in [
        &["explode"][..],
        &["list", "--loudly"],
        &["stop"],
        &["dump-memory", "m", &memory, "--format", "zip"],
    ] {
        assert_code(&cwd, arguments, 2);
    }
    cwd.write("conf/cuckoo.yaml", "machineries: [DOUBLE]\n").unwrap();
    for arguments in [&["check"][..], &["plugins"], &["serve"]] {
        let ran = assert_code(&cwd, arguments, 2);
        assert!(format!("{}{}", ran.stdout, ran.stderr).contains("'DOUBLE'"), "{ran:?}");
    }
    fs::remove_file(cwd.root().join(".cuckoocwd")).unwrap();
    assert!(assert_code(&cwd, &["list"], 2).stderr.contains(".cuckoocwd"));
}

#[test]
fn list_shows_the_reason_when_a_machine_is_unavailable() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    client.ask(json!({"action": "reserve", "machine": "m", "task_id": "t1"})).unwrap();
    client.ask(json!({"action": "lock", "machine": "m", "task_id": "t1"})).unwrap();
    assert_code(&cwd, &["disable-machine", "m", "smells"], 0);
    let listed = assert_code(&cwd, &["list"], 0).stdout;
    assert!(listed.contains("disabled: smells; reserved by t1; locked by t1"), "{listed}");
    assert_code(&cwd, &["unlock", "m"], 0);
    assert_code(&cwd, &["enable-machine", "m"], 0);
    let listed = assert_code(&cwd, &["list"], 0).stdout;
    assert!(listed.contains("reserved by t1") && !listed.contains("locked"), "{listed}");
}

#[test]
fn commands_write_one_json_value_when_json_is_requested() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let json = |arguments: &[&str], code: i32| -> Value {
        let ran = assert_code(&cwd, &[&["--json"], arguments].concat(), code);
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {ran:?}"))
    };
    assert_eq!(json(&["list"], 1)["success"], false);
    let _host = RunningHost::start(&cwd).unwrap();
    let screen = cwd.root().join("screen").display().to_string();
    assert_eq!(json(&["list"], 0)["machines"][0]["name"], "m");
    assert_eq!(json(&["state", "m"], 0), json!({"success": true, "state": "poweroff"}));
    assert_eq!(json(&["restore-start", "m"], 0), success());
    assert_eq!(json(&["screenshot", "m", &screen], 0), success());
    assert_eq!(json(&["stop", "m"], 0), success());
    let failed = json(&["stop", "ghost"], 1);
    assert!(failed["reason"].as_str().unwrap().contains("ghost"), "{failed}");
    assert_eq!(json(&["check"], 0)["success"], true);
    assert_eq!(json(&["plugins"], 0)["listed"][0]["name"], "double");
    cwd.write("conf/cuckoo.yaml", "machineries: []\n").unwrap();
    assert_eq!(json(&["check"], 2)["success"], false);
    assert_eq!(json(&["plugins"], 2)["success"], false);
    assert_eq!(json(&["serve"], 2)["success"], false);
}

#[test]
fn log_is_json_when_json_is_requested() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let mut host = RunningHost::start_with(&cwd, |command| {
        command.args(["--log-format", "json"]);
    })
    .unwrap();
    host.client().unwrap().act("restore_start", "m").unwrap();
    host.terminate().unwrap();
    let log = host.log();
    assert!(log.lines().count() > 2);
    for line in log.lines() {
        assert!(serde_json::from_str::<Value>(line).is_ok(), "{line}");
    }
    assert!(log.contains("\"machinery\":\"double\""), "{log}");
}
