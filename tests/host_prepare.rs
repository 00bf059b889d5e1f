//! Preparation of restores, with machines in memory: when it happens, when it is cancelled, and how it is
//! reported.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::scratch::ScratchCwd;
use rustix::process::Signal;
use serde_json::{Value, json};

/// Longer than any test waits.
const FOR_EVER: &str = "delays_ms: {prepare: 600000}";
/// A restore that fails, unless the machine is prepared.
const ONLY_PREPARED: &str = "faults: {restore_start: fail}";

fn served(machines: &[(&str, &str)]) -> (RunningHost, ScratchCwd) {
    let cwd = ScratchCwd::double(machines).unwrap();
    cwd.change_yaml("double", "interface: lo\n", "interface: lo\ncapabilities: {prepare: true}\n").unwrap();
    (RunningHost::start(&cwd).unwrap(), cwd)
}

/// Returns a subscribed client, with the machine `m` prepared.
fn prepared(host: &RunningHost) -> Client {
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    assert_eq!(client.act("prepare", "m").unwrap()["success"], true);
    client
}

fn how(client: &mut Client) -> String {
    client.machine("m").unwrap()["ready"]["mode"].as_str().unwrap_or("unknown").to_owned()
}

/// Waits until the machine is prepared. An event may be of an earlier preparation.
fn until_prepared(client: &mut Client) {
    while how(client) != "standby" {
        client.wait_for_event("ready", "m").unwrap();
    }
}

#[test]
fn machine_is_prepared_at_startup_and_after_each_run() {
    let (host, _cwd) = served(&[("m", ONLY_PREPARED)]);
    let mut client = prepared(&host);
    for _ in 0..3 {
        assert_eq!(client.machine("m").unwrap()["state"], "poweroff");
        assert_eq!(how(&mut client), "standby");
        assert_eq!(client.act("restore_start", "m").unwrap()["success"], true);
        assert_eq!(how(&mut client), "plain");
        assert_eq!(client.act("stop", "m").unwrap()["success"], true);
        // The host prepares the machine without a request.
        until_prepared(&mut client);
    }
}

#[test]
fn machine_is_prepared_again_when_it_powers_itself_off() {
    let (host, _cwd) = served(&[("m", "poweroff_after_ms: 50")]);
    let mut client = prepared(&host);
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], true);
    client.wait_for_state("m", "poweroff").unwrap();
    until_prepared(&mut client);
}

#[test]
fn stop_discards_the_preparation() {
    let (host, _cwd) = served(&[("m", ""), ("other", "")]);
    let mut client = prepared(&host);
    assert_eq!(client.act("stop", "m").unwrap()["success"], true);
    assert_eq!(how(&mut client), "plain");
    // Another machine's preparation takes as long as an unwanted one of `m` would.
    assert_eq!(client.act("prepare", "other").unwrap()["success"], true);
    assert_eq!(how(&mut client), "plain");
    assert_eq!(client.act("prepare", "m").unwrap()["success"], true);
    assert_eq!(how(&mut client), "standby");
}

#[test]
fn restore_waits_when_the_machine_is_being_prepared() {
    let (host, _cwd) = served(&[("m", &format!("{ONLY_PREPARED}, delays_ms: {{prepare: 300}}"))]);
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], true, "{}", host.log());
}

#[test]
fn preparation_is_cancelled_when_a_stop_or_a_cold_start_is_requested() {
    let (mut host, _cwd) = served(&[("m", FOR_EVER)]);
    let mut client = host.client().unwrap();
    for (action, state) in [("stop", "poweroff"), ("norestore_start", "running"), ("stop", "poweroff")] {
        assert_eq!(client.act(action, "m").unwrap()["success"], true);
        assert_eq!(client.machine("m").unwrap()["state"], state);
    }
    client.send(&json!({"action": "prepare", "machine": "m", "id": 1})).unwrap();
    client.send(&json!({"action": "stop", "machine": "m", "id": 2})).unwrap();
    let mut answers = [client.next_message().unwrap(), client.next_message().unwrap()];
    answers.sort_by_key(|answer| answer["id"].as_u64());
    assert_eq!(
        (&answers[0]["success"], &answers[1]["success"]),
        (&json!(false), &json!(true)),
        "{answers:?}"
    );
    assert_eq!(client.machine("m").unwrap()["disabled"], false);
    let log = host.log();
    assert!(
        log.contains("the preparation was cancelled by another action") && !log.contains("WARN"),
        "{log}"
    );
    client.send(&json!({"action": "prepare", "machine": "m"})).unwrap();
    let begun = Instant::now();
    host.signal(Signal::TERM).unwrap();
    assert!(host.wait().unwrap().success());
    assert!(begun.elapsed() < Duration::from_secs(60), "the end waits for a preparation");
}

/// A task may inspect its machine after the run.
#[test]
fn preparation_waits_when_the_machine_is_locked() {
    let (host, _cwd) = served(&[("m", ""), ("other", "")]);
    let mut client = prepared(&host);
    let lock = json!({"action": "lock", "machine": "m", "task_id": "t"});
    assert_eq!(client.ask(lock).unwrap()["success"], true);
    for action in ["restore_start", "stop"] {
        assert_eq!(client.act(action, "m").unwrap()["success"], true);
    }
    // Another machine's preparation takes as long as an unwanted one of `m` would.
    assert_eq!(client.act("prepare", "other").unwrap()["success"], true);
    assert_eq!(how(&mut client), "plain");
    // A repeated stop has no effect.
    assert_eq!(client.act("stop", "m").unwrap()["success"], true);
    assert_eq!(client.act("unlock", "m").unwrap()["success"], true);
    while how(&mut client) != "standby" {
        client.wait_for_event("ready", "m").unwrap();
    }
}

/// A task may inspect a machine that it has just locked, and an operator one that he has just disabled.
#[test]
fn machine_is_not_prepared_when_it_is_locked_or_disabled_while_its_preparation_waits() {
    for request in [
        json!({"action": "lock", "machine": "m", "task_id": "t"}),
        json!({"action": "disable_machine", "machine": "m", "reason": "inspected"}),
    ] {
        // The workers begin at the same time, so `m` may have a permit before the request. That does not happen each time.
        assert!(!(0..10).all(|_| is_prepared_after(&request)), "{request}");
    }
}

/// Sends the request while the preparation of `m` waits for a permit, and reports whether `m` is prepared all the same.
fn is_prepared_after(request: &Value) -> bool {
    let (host, _cwd) = served(&[("slow1", FOR_EVER), ("slow2", FOR_EVER), ("m", ""), ("n", "")]);
    let mut client = host.client().unwrap();
    // The first two machines hold all prepare permits.
    assert_eq!(client.ask(request.clone()).unwrap()["success"], true);
    assert_eq!(client.act("stop", "slow1").unwrap()["success"], true);
    // The permit of this preparation comes after that of `m`.
    assert_eq!(client.act("prepare", "n").unwrap()["success"], true);
    how(&mut client) == "standby"
}

/// A queued preparation is kept when another action comes first.
#[test]
fn preparation_is_retried_when_another_action_displaced_it() {
    let (host, _cwd) = served(&[("slow1", FOR_EVER), ("slow2", FOR_EVER), ("m", "")]);
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    // The first two machines hold all prepare permits.
    let screenshot = json!({"action": "screenshot", "machine": "m", "path": "/tmp/never-written.png"});
    assert_eq!(client.ask(screenshot).unwrap()["success"], false);
    assert_eq!(client.act("stop", "slow1").unwrap()["success"], true);
    while how(&mut client) != "standby" {
        client.wait_for_event("ready", "m").unwrap();
    }
}

#[test]
fn restore_is_not_delayed_when_many_machines_are_being_prepared() {
    let slow: Vec<String> = (0..20).map(|number| format!("slow{number}")).collect();
    let mut machines: Vec<(&str, &str)> = slow.iter().map(|name| (name.as_str(), FOR_EVER)).collect();
    machines.push(("m", FOR_EVER));
    let (host, _cwd) = served(&machines);
    let mut client = host.client().unwrap();
    // The machines before it in the list hold all prepare permits, so its own preparation is queued.
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], true, "{}", host.log());
}

#[test]
fn machine_stays_enabled_when_its_preparation_fails() {
    let (host, _cwd) = served(&[("m", "faults: {prepare: fail}, fault_times: 2")]);
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], true);
    // A running machine is not prepared.
    assert_eq!(client.act("prepare", "m").unwrap()["success"], false);
    let machine = client.machine("m").unwrap();
    assert_eq!((&machine["disabled"], &machine["state"]), (&json!(false), &json!("running")));
    assert_eq!(machine["errors"], json!([]));
}

#[test]
fn prepare_command_prepares_all_machines_when_none_is_named() {
    let (_host, cwd) = served(&[("m", ""), ("n", "")]);
    let ran = host::run(&cwd, &["prepare"]).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("prepare m: done") && ran.stdout.contains("prepare n: done"), "{ran:?}");
    let ran = host::run(&cwd, &["list"]).unwrap();
    assert_eq!(ran.stdout.matches("standby").count(), 2, "{ran:?}");
}

#[test]
fn metrics_count_actions_and_failures() {
    let (host, cwd) = served(&[("m", "faults: {stop: fail}, fault_times: 1")]);
    let mut client = prepared(&host);
    client.act("restore_start", "m").unwrap();
    client.act("stop", "m").unwrap();
    let answer = client.ask(json!({"action": "metrics"})).unwrap();
    let tally = |action: &str| {
        let tallies = answer["metrics"].as_array().unwrap();
        tallies.iter().find(|tally| tally["action"] == action).unwrap_or_else(|| panic!("{answer}")).clone()
    };
    assert_eq!((&tally("restore_start")["count"], &tally("restore_start")["failed"]), (&json!(1), &json!(0)));
    assert_eq!((&tally("stop")["count"], &tally("stop")["failed"]), (&json!(1), &json!(1)));
    let ran = host::run(&cwd, &["metrics"]).unwrap();
    assert!(ran.code == Some(0) && ran.stdout.contains("restore_start"), "{ran:?}");
}
