//! Faults of a plugin: each affects one action and one machine, never the host.
//!
//! The double machinery is configured with faults. In each test the machine `fine` has none, and must stay
//! usable.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use machinery_testkit::client::Client;
use machinery_testkit::host::RunningHost;
use machinery_testkit::scratch::{ScratchCwd, double};
use serde_json::{Value, json};

/// Short timeouts keep the tests short. A machine that has failed is left as it is; `host_heal.rs` is about the rest.
const LIMITS: &str = "heal: off\ntimeouts: {restore_start: 0.3, norestore_start: 0.3, stop: 0.2, acpi_stop: 0.3, \
                      dump_memory: 0.3, screenshot: 0.3}\n";

/// A host with its CWD; dropped in this order.
struct Served {
    host: RunningHost,
    cwd: ScratchCwd,
}

/// Starts a host with these machines and one more, `fine`.
fn served(machines: &[(&str, &str)]) -> Served {
    serve(&double(&[machines, &[("fine", "")]].concat()))
}

fn serve(double: &str) -> Served {
    let cwd = ScratchCwd::new(&[("double", double)]).unwrap();
    cwd.host_yaml(LIMITS).unwrap();
    Served { host: RunningHost::start(&cwd).unwrap(), cwd }
}

impl Served {
    fn client(&self) -> Client {
        self.host.client().unwrap()
    }

    /// Asserts that the host and the machine `fine` work, and that the host exits with code 0.
    fn assert_well(mut self) {
        let mut client = self.client();
        for action in ["restore_start", "stop", "norestore_start", "acpi_stop"] {
            assert_eq!(client.act(action, "fine").unwrap(), success(), "{action}");
        }
        assert_eq!(client.machine("fine").unwrap()["disabled"], false);
        drop(client);
        assert_eq!(self.host.terminate().unwrap().code(), Some(0), "{}", self.host.log());
    }
}

fn success() -> Value {
    json!({"success": true})
}

#[track_caller]
fn assert_fails(answer: &Value, why: &str) {
    assert_eq!(answer["success"], false, "{answer}");
    let reason = answer["reason"].as_str().unwrap();
    assert!(reason.contains(why), "{why:?} is not in {reason:?}");
}

/// Asserts that the machine is disabled, for the reason that was answered.
#[track_caller]
fn assert_disabled(client: &mut Client, machine: &str, answer: &Value) {
    let listed = client.machine(machine).unwrap();
    assert_eq!(listed["disabled"], true, "{listed}");
    assert_eq!(listed["disabled_reason"], answer["reason"]);
    assert_eq!(listed["errors"].as_array().unwrap().last(), Some(&answer["reason"]));
}

#[track_caller]
fn assert_enabled(client: &mut Client, machine: &str, state: &str) {
    let listed = client.machine(machine).unwrap();
    assert_eq!((&listed["disabled"], &listed["state"]), (&json!(false), &json!(state)), "{listed}");
}

/// The faults, with the words of their errors.
const WORDS: [(&str, &str); 5] = [
    ("fail", "configured to fail"),
    ("timeout", "waited 0.3 s"),
    ("panic", "panicked: configured to panic"),
    ("lie", "state poweroff after it, and running was expected"),
    ("hang", "did not return"),
];

#[test]
fn machine_is_disabled_when_its_start_fails() {
    for start in ["restore_start", "norestore_start"] {
        let faults = WORDS.map(|(fault, _)| (fault, format!("faults: {{{start}: {fault}}}")));
        let machines: Vec<_> = faults.iter().map(|(fault, keys)| (*fault, keys.as_str())).collect();
        let served = served(&machines);
        let mut client = served.client();
        for (fault, _) in WORDS {
            client.send(&json!({"action": start, "machine": fault, "id": fault})).unwrap();
        }
        for _ in WORDS {
            let answer = client.next_message().unwrap();
            let (fault, words) = WORDS.into_iter().find(|(fault, _)| answer["id"] == *fault).unwrap();
            assert_fails(&answer, words);
            assert_fails(&answer, &format!("{start} of machine '{fault}'"));
            assert_disabled(&mut client, fault, &answer);
            let state = if fault == "hang" { "error" } else { "poweroff" };
            assert_eq!(client.machine(fault).unwrap()["state"], state, "{start}: {fault}");
        }
        served.assert_well();
    }
}

#[test]
fn machine_is_disabled_when_its_stop_fails() {
    let faults = WORDS.map(|(fault, _)| (fault, format!("faults: {{stop: {fault}}}")));
    let machines: Vec<_> = faults.iter().map(|(fault, keys)| (*fault, keys.as_str())).collect();
    let served = served(&machines);
    let mut client = served.client();
    for (fault, words) in WORDS {
        assert_eq!(client.act("restore_start", fault).unwrap(), success());
        let answer = client.act("stop", fault).unwrap();
        let words = match fault {
            "timeout" => "waited 0.2 s",
            "lie" => "state running after it, and poweroff was expected",
            _ => words,
        };
        assert_fails(&answer, words);
        assert_disabled(&mut client, fault, &answer);
        let state = if fault == "hang" { "error" } else { "running" };
        assert_eq!(client.machine(fault).unwrap()["state"], state, "{fault}");
    }
    served.assert_well();
}

#[test]
fn acpi_stop_falls_back_to_stop_when_the_guest_ignores_it() {
    for fault in ["fail", "timeout", "lie"] {
        let served = served(&[("m", &format!("faults: {{acpi_stop: {fault}}}"))]);
        let mut client = served.client();
        client.act("restore_start", "m").unwrap();
        assert_eq!(client.act("acpi_stop", "m").unwrap(), success(), "{fault}");
        assert_enabled(&mut client, "m", "poweroff");
        served.assert_well();
    }
}

#[test]
fn machine_is_disabled_when_acpi_stop_hangs() {
    let served = served(&[("m", "faults: {acpi_stop: hang}")]);
    let mut client = served.client();
    client.act("restore_start", "m").unwrap();
    let answer = client.act("acpi_stop", "m").unwrap();
    assert_fails(&answer, "did not return");
    assert_disabled(&mut client, "m", &answer);
    served.assert_well();
}

#[test]
fn machine_stays_enabled_when_a_read_only_action_fails() {
    for look in ["dump_memory", "screenshot"] {
        for (fault, costs) in [("fail", false), ("timeout", false), ("panic", true), ("hang", true)] {
            let served = served(&[("m", &format!("faults: {{{look}: {fault}}}"))]);
            let mut client = served.client();
            client.act("restore_start", "m").unwrap();
            let path = served.cwd.root().join("file");
            let answer = client.ask(json!({"action": look, "machine": "m", "path": path})).unwrap();
            assert_eq!(answer["success"], false);
            assert!(!path.exists());
            if costs {
                assert_disabled(&mut client, "m", &answer);
            } else {
                assert_enabled(&mut client, "m", "running");
            }
            served.assert_well();
        }
    }
}

#[test]
fn machine_is_disabled_when_a_failed_read_only_action_leaves_it_in_another_state() {
    for action in ["dump_memory", "screenshot"] {
        let served = served(&[("m", &format!("faults: {{{action}: fail_powered_off}}"))]);
        let mut client = served.client();
        assert_eq!(client.act("restore_start", "m").unwrap(), success());
        let path = served.cwd.root().join("file");
        let answer = client.ask(json!({"action": action, "machine": "m", "path": path})).unwrap();
        assert_fails(&answer, "configured to fail");
        assert_disabled(&mut client, "m", &answer);
        assert_eq!(client.machine("m").unwrap()["state"], "poweroff", "{action}");
        served.assert_well();
    }
}

/// Each action has its own timeout, and the error names the time that the plugin had.
#[test]
fn action_fails_after_its_own_timeout_when_the_plugin_waits() {
    const TIMEOUTS: [(&str, &str); 8] = [
        ("restore_start", "0.2"),
        ("norestore_start", "0.3"),
        ("stop", "0.4"),
        ("acpi_stop", "0.5"),
        ("dump_memory", "0.6"),
        ("screenshot", "0.7"),
        ("prepare", "0.8"),
        ("state", "0.9"),
    ];
    // A prepared machine restores without the fault.
    let faults = TIMEOUTS.map(|(action, _)| {
        let prepare = if action == "prepare" { "timeout" } else { "fail" };
        let other = if action == "prepare" { String::new() } else { format!(", {action}: timeout") };
        (action, format!("faults: {{prepare: {prepare}{other}}}"))
    });
    let machines: Vec<_> = faults.iter().map(|(action, keys)| (*action, keys.as_str())).collect();
    let cwd = ScratchCwd::double(&machines).unwrap();
    cwd.change_yaml("double", "interface: lo\n", "interface: lo\ncapabilities: {prepare: true}\n").unwrap();
    let timeouts = TIMEOUTS.map(|(action, seconds)| format!("{action}: {seconds}"));
    cwd.host_yaml(&format!("heal: off\ntimeouts: {{{}}}\n", timeouts.join(", "))).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    for (action, seconds) in TIMEOUTS {
        if matches!(action, "stop" | "acpi_stop" | "dump_memory" | "screenshot") {
            assert_eq!(client.act("norestore_start", action).unwrap(), success());
        }
        let path = cwd.root().join("file");
        let answer = client.ask(json!({"action": action, "machine": action, "path": path})).unwrap();
        let waited = format!("waited {seconds} s for");
        if action == "acpi_stop" {
            // The host stops the machine instead, and logs the reason.
            assert_eq!(answer, success());
            host.wait_for_log(&["does not react to its power button", &waited]).unwrap();
        } else {
            assert_fails(&answer, &waited);
        }
    }
}

#[test]
fn restore_is_not_delayed_when_a_failed_start_is_cleaned_up() {
    let slow = "faults: {restore_start: fail_running}, delays_ms: {stop: 10000}";
    let cwd = ScratchCwd::double(&[("m", slow), ("n", "")]).unwrap();
    cwd.host_yaml("max_parallel_restores: 1\n").unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    let (mut client, mut other) = (host.client().unwrap(), host.client().unwrap());
    client.subscribe().unwrap();
    client.send(&json!({"action": "restore_start", "machine": "m", "id": "failed"})).unwrap();
    client.wait_for_state("m", "stopping").unwrap();
    assert_eq!(other.act("restore_start", "n").unwrap(), success());
    assert_eq!(other.machine("m").unwrap()["state"], "stopping", "the restore waited for the cleanup");
    host.kill().unwrap();
}

#[test]
fn machine_is_disabled_when_its_state_is_unknown() {
    let served =
        served(&[("m", "faults: {state: fail}, fault_times: 2"), ("blind", "faults: {state: fail}")]);
    let mut client = served.client();
    // The host has read the state once, at startup.
    assert_eq!(client.machine("m").unwrap()["state"], "error");
    assert_fails(&client.act("state", "m").unwrap(), "configured to fail");
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let answer = client.act("restore_start", "blind").unwrap();
    assert_fails(&answer, "configured to fail");
    assert_disabled(&mut client, "blind", &answer);
    served.assert_well();
}

#[test]
fn machine_is_usable_when_it_is_enabled_after_a_transient_fault() {
    for fault in ["fail", "timeout", "panic", "lie"] {
        let served = served(&[("m", &format!("faults: {{restore_start: {fault}}}, fault_times: 1"))]);
        let mut client = served.client();
        assert_eq!(client.act("restore_start", "m").unwrap()["success"], false, "{fault}");
        client.act("enable_machine", "m").unwrap();
        assert_eq!(client.act("restore_start", "m").unwrap(), success(), "{fault}");
        assert_enabled(&mut client, "m", "running");
        served.assert_well();
    }
}

#[test]
fn later_actions_fail_when_an_earlier_call_hangs() {
    let served = served(&[("m", "faults: {restore_start: hang}")]);
    let mut client = served.client();
    assert_fails(&client.act("restore_start", "m").unwrap(), "restart the host");
    for action in ["stop", "norestore_start", "acpi_stop", "restore_start"] {
        assert_fails(&client.act(action, "m").unwrap(), "earlier call");
    }
    assert_eq!(client.machine("m").unwrap()["disabled"], true);
    served.assert_well();
}

#[test]
fn answers_are_sent_in_the_order_in_which_actions_end() {
    let served = served(&[("m", "faults: {restore_start: hang}")]);
    let mut client = served.client();
    // The requests queued behind the hung one fail together.
    for id in 0..10 {
        client.send(&json!({"action": "restore_start", "machine": "m", "id": id})).unwrap();
    }
    let answered: Vec<_> = (0..10).map(|_| client.next_message().unwrap()["id"].clone()).collect();
    assert_eq!(answered, (0..10).map(Value::from).collect::<Vec<_>>());
    served.assert_well();
}

#[test]
fn enabled_machine_fails_when_an_earlier_call_hangs() {
    let served = served(&[("m", "faults: {restore_start: hang}")]);
    let mut client = served.client();
    client.act("restore_start", "m").unwrap();
    client.act("enable_machine", "m").unwrap();
    let answer = client.act("restore_start", "m").unwrap();
    assert_fails(&answer, "earlier call");
    assert_eq!(client.machine("m").unwrap()["disabled"], true, "it is of no use in the pool");
    served.assert_well();
}

#[test]
fn shutdown_completes_when_a_call_hangs() {
    let mut served = served(&[("m", "faults: {stop: hang}"), ("n", "faults: {restore_start: hang}")]);
    let mut client = served.client();
    client.act("restore_start", "m").unwrap();
    client.act("restore_start", "n").unwrap();
    // The stop of `m` hangs during the host's shutdown.
    assert_eq!(served.host.terminate().unwrap().code(), Some(0), "{}", served.host.log());
    assert!(!served.cwd.socket().exists());
}

/// Returns the machine's counter, which differs between a restore and a cold start.
fn counter(served: &Served, client: &mut Client, machine: &str) -> u64 {
    let path = served.cwd.root().join("counter");
    let answer = client.ask(json!({"action": "dump_memory", "machine": machine, "path": path})).unwrap();
    assert_eq!(answer, success());
    std::fs::read_to_string(&path).unwrap().split_whitespace().last().unwrap().parse().unwrap()
}

#[test]
fn restore_stops_the_machine_first_when_it_runs() {
    let served = served(&[("m", "snapshot: 1000000")]);
    let mut client = served.client();
    client.act("norestore_start", "m").unwrap();
    assert!(counter(&served, &mut client, "m") < 1_000_000);
    client.ask(json!({"action": "subscribe"})).unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let reported: Vec<_> = (0..4).map(|_| client.next_message().unwrap()["state"].clone()).collect();
    assert_eq!(reported, ["stopping", "poweroff", "starting", "running"]);
    assert!(counter(&served, &mut client, "m") > 1_000_000);
    assert_enabled(&mut client, "m", "running");
    served.assert_well();
}

#[test]
fn machine_is_disabled_when_a_restore_cannot_stop_it() {
    let served = served(&[("m", "faults: {stop: fail}")]);
    let mut client = served.client();
    client.act("restore_start", "m").unwrap();
    let answer = client.act("restore_start", "m").unwrap();
    assert_fails(&answer, "configured to fail");
    assert_disabled(&mut client, "m", &answer);
    served.assert_well();
}

#[test]
fn action_costs_nothing_when_it_works_at_another_time() {
    let served = served(&[("m", "faults: {screenshot: not_now, norestore_start: not_now}")]);
    let mut client = served.client();
    assert_fails(&client.act("norestore_start", "m").unwrap(), "configured to work later");
    assert_enabled(&mut client, "m", "poweroff");
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let path = served.cwd.root().join("file");
    let answer = client.ask(json!({"action": "screenshot", "machine": "m", "path": path})).unwrap();
    assert_fails(&answer, "configured to work later");
    assert_enabled(&mut client, "m", "running");
    assert_eq!(client.machine("m").unwrap()["errors"], json!([]));
    let metrics = client.ask(json!({"action": "metrics"})).unwrap().to_string();
    assert!(metrics.contains("\"failed\":0") && !metrics.contains("\"failed\":1"), "{metrics}");
    let log = served.host.log();
    assert!(!log.contains("ERROR"), "{log}");
}

#[test]
fn machine_stays_enabled_when_an_action_is_unsupported() {
    let able =
        "capabilities: {norestore_start: false, acpi_stop: false, dump_memory: false, screenshot: false}\n";
    let cwd = ScratchCwd::new(&[("double", &format!("{able}{}", double(&[("m", "")])))]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    assert_fails(&client.act("norestore_start", "m").unwrap(), "does not support norestore_start");
    assert_enabled(&mut client, "m", "poweroff");
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    for action in ["acpi_stop", "dump_memory", "screenshot", "norestore_start"] {
        let request = json!({"action": action, "machine": "m", "path": cwd.root().join("file")});
        let answer = client.ask(request).unwrap();
        assert_fails(&answer, &format!("does not support {action}"));
        assert_enabled(&mut client, "m", "running");
    }
}

#[test]
fn stop_succeeds_when_the_machine_is_off() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    client.ask(json!({"action": "subscribe"})).unwrap();
    for action in ["stop", "acpi_stop"] {
        assert_eq!(client.act(action, "m").unwrap(), success(), "{action}");
        assert_enabled(&mut client, "m", "poweroff");
    }
    // No event precedes that of the start.
    client.act("restore_start", "m").unwrap();
    assert_eq!(client.next_message().unwrap()["state"], "starting");
    served.assert_well();
}

#[test]
fn event_is_sent_when_a_machine_powers_itself_off() {
    let served = served(&[("m", "poweroff_after_ms: 100")]);
    let mut client = served.client();
    client.ask(json!({"action": "subscribe"})).unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let reported: Vec<_> = (0..3).map(|_| client.next_message().unwrap()).collect();
    assert_eq!([&reported[0]["state"], &reported[1]["state"]], ["starting", "running"]);
    let died = json!({
        "event": "state", "machine": "m", "state": "poweroff", "reason": "the machine powered itself off",
    });
    assert_eq!(reported[2], died);
    assert_enabled(&mut client, "m", "poweroff");
    let errors = client.machine("m").unwrap()["errors"].clone();
    let error = "machine 'm': the state became poweroff by itself: the machine powered itself off";
    assert_eq!(errors, json!([error]));
    let log = served.host.log();
    assert!(log.lines().any(|line| line.contains("WARN") && line.contains("powered itself off")), "{log}");
    assert_eq!(client.act("stop", "m").unwrap(), success());
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    served.assert_well();
}

#[test]
fn log_shows_the_source_line_when_a_plugin_panics() {
    let served = served(&[("m", "faults: {restore_start: panic}")]);
    served.client().act("restore_start", "m").unwrap();
    let log = served.host.log();
    let line = log.lines().find(|line| line.contains("the plugin panicked: configured to panic"));
    assert!(line.is_some_and(|line| line.contains("machine.rs:")), "{log}");
    served.assert_well();
}

#[test]
fn machine_is_not_delayed_when_another_hangs() {
    let served = served(&[("m", "faults: {restore_start: hang}")]);
    let mut client = served.client();
    client.send(&json!({"action": "restore_start", "machine": "m", "id": "hung"})).unwrap();
    for round in 0..50 {
        for action in ["restore_start", "stop"] {
            client.send(&json!({"action": action, "machine": "fine", "id": round})).unwrap();
            assert_eq!(client.next_message().unwrap(), json!({"success": true, "id": round}));
        }
    }
    assert_eq!(client.next_message().unwrap()["id"], "hung");
    served.assert_well();
}
