//! The host watches itself: systemd's watchdog, stuck workers, the ages of locks and runs, and runs that last too long.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use machinery_testkit::client::Client;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::scratch::ScratchCwd;
use rustix::process::Signal;
use serde_json::{Value, json};

/// A host with its CWD; dropped in this order.
struct Served {
    host: RunningHost,
    cwd: ScratchCwd,
}

fn served(yaml: &str, machines: &[(&str, &str)]) -> Served {
    let cwd = ScratchCwd::double(machines).unwrap();
    cwd.host_yaml(yaml).unwrap();
    Served { host: RunningHost::start(&cwd).unwrap(), cwd }
}

impl Served {
    fn client(&self) -> Client {
        self.host.client().unwrap()
    }

    fn subscribed(&self) -> Client {
        let mut client = self.client();
        client.subscribe().unwrap();
        client
    }
}

fn success() -> Value {
    json!({"success": true})
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Half of it is the time between two reports.
const WATCHDOG: Duration = Duration::from_millis(500);
/// Much longer than the time between two reports.
const LONG: Duration = Duration::from_secs(3);

fn watched_host(cwd: &ScratchCwd) -> RunningHost {
    let interval = WATCHDOG.as_micros().to_string();
    let watched = |command: &mut Command| {
        command.env("WATCHDOG_USEC", interval);
    };
    RunningHost::start_with(cwd, watched).unwrap()
}

#[test]
fn watchdog_gets_reports_while_the_host_answers_and_none_while_it_is_frozen() {
    let cwd = ScratchCwd::double(&[("m", "delays_ms: {restore_start: 1500}")]).unwrap();
    let mut host = watched_host(&cwd);
    for _ in 0..3 {
        host.wait_for_notification("WATCHDOG=1").unwrap();
    }
    // Long work is no reason to end the host.
    let mut client = host.client().unwrap();
    client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
    for _ in 0..4 {
        host.wait_for_notification("WATCHDOG=1").unwrap();
    }
    assert_eq!(client.next_message().unwrap(), success());
    host.signal(Signal::STOP).unwrap();
    // Reports that were sent before.
    while host.next_notification(LONG).unwrap().is_some() {}
    assert_eq!(host.next_notification(LONG).unwrap(), None);
    host.signal(Signal::CONT).unwrap();
    host.wait_for_notification("WATCHDOG=1").unwrap();
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
}

#[test]
fn systemd_gets_reports_while_the_host_executes_its_program_again() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let mut host = watched_host(&cwd);
    host.signal(Signal::USR2).unwrap();
    host.wait_for_notification("RELOADING=1").unwrap();
    let mut reports = String::new();
    while !reports.contains("READY=1") {
        reports += &host.next_notification(Duration::from_secs(60)).unwrap().unwrap();
    }
    // Both are reported before the new program serves.
    let (loading, _) = reports.split_once("READY=1").unwrap();
    assert!(loading.contains("EXTEND_TIMEOUT_USEC=") && loading.contains("WATCHDOG=1"), "{reports}");
    host.wait_for_notification("WATCHDOG=1").unwrap();
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
}

#[test]
fn watchdog_gets_no_report_when_systemd_does_not_ask_for_it() {
    let served = served("", &[("m", "")]);
    assert_eq!(served.host.next_notification(LONG).unwrap(), None);
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    // systemd asks another process.
    let host = RunningHost::start_with(&cwd, |command| {
        command.env("WATCHDOG_USEC", "100000").env("WATCHDOG_PID", "1");
    });
    assert_eq!(host.unwrap().next_notification(LONG).unwrap(), None);
}

#[test]
fn worker_is_named_once_when_it_is_stuck_in_an_action() {
    let limits = "timeouts: {restore_start: 0.1, stop: 0.1, state: 0.1}\n";
    let served = served(limits, &[("m", "faults: {restore_start: fail}, fault_times: 1")]);
    let mut client = served.client();
    // The host opens a new state file, and a pipe has no reader yet.
    let pipe = served.cwd.root().join("operational/generated/machinery-host/machines.json.new");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
    let words = ["WARN", "its worker is stuck", "machine=\"m\"", "action=\"restore_start\"", "seconds="];
    println!("{}", served.host.wait_for_log(&words).unwrap());
    // Other machines and requests go on meanwhile.
    assert_eq!(served.client().machine("m").unwrap()["disabled"], true);
    // The reader stays until the pipe is removed: the host may open the file again at once.
    let reader = fs::File::open(&pipe).unwrap();
    fs::remove_file(&pipe).unwrap();
    drop(reader);
    assert_eq!(client.next_message().unwrap()["success"], false);
    assert_eq!(client.act("enable_machine", "m").unwrap(), success());
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    assert_eq!(served.host.log().matches("its worker is stuck").count(), 1);
}

#[test]
fn list_has_the_ages_of_locks_and_runs_and_a_lock_keeps_its_age_when_the_host_restarts() {
    let mut served = served("", &[("m", "")]);
    let mut client = served.client();
    let idle = client.machine("m").unwrap();
    assert_eq!((&idle["locked_since"], &idle["running_since"]), (&Value::Null, &Value::Null));
    let begun = now();
    let lock = json!({"action": "lock", "machine": "m", "task_id": "t"});
    let locked = client.ask(lock.clone()).unwrap()["machine"]["locked_since"].as_u64().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let running = client.machine("m").unwrap()["running_since"].as_u64().unwrap();
    assert!(begun <= locked && locked <= running && running <= now(), "{begun} {locked} {running}");
    let list = host::run(&served.cwd, &["list"]).unwrap().stdout;
    assert!(list.contains("SINCE") && list.contains("locked by t for "), "{list}");
    // The age is that of the first lock.
    let repeated = client.ask(lock).unwrap();
    assert_eq!(repeated["machine"]["locked_since"], locked);
    served.host.kill().unwrap();
    served.host = RunningHost::start(&served.cwd).unwrap();
    let mut client = served.client();
    let listed = client.machine("m").unwrap();
    assert_eq!((&listed["locked_since"], &listed["running_since"]), (&json!(locked), &Value::Null));
    assert_eq!(client.act("unlock", "m").unwrap(), success());
    assert_eq!(client.machine("m").unwrap()["locked_since"], Value::Null);
    assert_eq!(served.host.terminate().unwrap().code(), Some(0), "{}", served.host.log());
}

#[test]
fn state_file_of_an_older_host_is_read_without_ages_and_quarantines() {
    let cwd = ScratchCwd::double(&[("m", ""), ("n", "")]).unwrap();
    let old = r#"{"format": 1, "machines": {"m": {"lock": {"task_id": "t"}}, "n": {"disabled": "smells"}}}"#;
    cwd.write("operational/generated/machinery-host/machines.json", old).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    let locked = client.machine("m").unwrap();
    assert_eq!((&locked["locked_by"], &locked["locked_since"]), (&json!("t"), &Value::Null));
    let disabled = client.machine("n").unwrap();
    assert_eq!((&disabled["disabled_reason"], &disabled["quarantine"]), (&json!("smells"), &Value::Null));
}

/// Checks that the run of `m` is stopped, and that events, errors and log have the reason.
#[track_caller]
fn assert_stopped(served: &Served, subscriber: &mut Client, limit: &str) {
    let reason = format!("the run has lasted longer than max_run ({limit} s)");
    for state in ["stopping", "poweroff"] {
        assert_eq!(subscriber.wait_for_state("m", state).unwrap(), reason, "{state}");
    }
    let machine = served.client().machine("m").unwrap();
    let error = machine["errors"].as_array().unwrap().last().unwrap().as_str().unwrap();
    assert!(error.contains("machine 'm'") && error.contains(&reason), "{machine}");
    assert_eq!((&machine["disabled"], &machine["running_since"]), (&json!(false), &Value::Null), "{machine}");
    let log = served.host.log();
    assert!(log.lines().any(|line| line.contains("WARN") && line.contains(&reason)), "{log}");
}

#[test]
fn run_is_stopped_with_a_reason_when_it_lasts_longer_than_max_run() {
    let mut served = served("max_run: 0.5\n", &[("m", "")]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    let lock = json!({"action": "lock", "machine": "m", "task_id": "t"});
    assert_eq!(client.ask(lock).unwrap()["success"], true);
    for start in ["restore_start", "norestore_start"] {
        assert_eq!(client.act(start, "m").unwrap(), success());
        assert_stopped(&served, &mut subscriber, "0.5");
    }
    assert_eq!(client.machine("m").unwrap()["locked_by"], "t");
    // A stop of a client has no such reason.
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    assert_eq!(client.act("stop", "m").unwrap(), success());
    assert_eq!(subscriber.wait_for_state("m", "poweroff").unwrap(), "");
    assert_eq!(served.host.terminate().unwrap().code(), Some(0), "{}", served.host.log());
}

#[test]
fn max_run_applies_to_a_present_run_when_a_reload_sets_it() {
    let served = served("", &[("m", "")]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    served.cwd.host_yaml("max_run: 0.25\n").unwrap();
    let answer = client.ask(json!({"action": "reload"})).unwrap();
    assert_eq!(answer["settings"], json!(["max_run"]), "{answer}");
    assert_stopped(&served, &mut subscriber, "0.25");
}

#[test]
fn machine_is_tried_once_to_stop_and_then_in_quarantine_when_its_run_lasts_too_long_and_cannot_be_stopped() {
    let keys = "faults: {stop: fail}, fault_times: 1";
    let served = served("max_run: 0.5\n", &[("m", keys)]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let event = subscriber.wait_for_event("quarantined", "m").unwrap();
    assert!(event["reason"].as_str().unwrap().contains("stop of machine 'm' failed"), "{event}");
    subscriber.wait_for_event("healed", "m").unwrap();
    assert_eq!(served.host.log().matches("the run is stopped").count(), 1);
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    subscriber.wait_for_state("m", "stopping").unwrap();
}
