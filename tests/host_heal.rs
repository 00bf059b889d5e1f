//! Machines heal: a failure that is an accident puts a machine into quarantine, and the host tries it until it works.
//!
//! The first try comes 5 s after the failure, so a test that waits for one takes that long.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use machinery_testkit::client::Client;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::scratch::{ScratchCwd, double};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Short timeouts keep the tests short.
const LIMITS: &str = "timeouts: {restore_start: 0.3, norestore_start: 0.3, stop: 0.2}\n";

/// A host with its CWD; dropped in this order.
struct Served {
    host: RunningHost,
    cwd: ScratchCwd,
}

fn served_with(yaml: &str, machines: &[(&str, &str)]) -> Served {
    let cwd = ScratchCwd::double(machines).unwrap();
    cwd.host_yaml(yaml).unwrap();
    Served { host: RunningHost::start(&cwd).unwrap(), cwd }
}

fn served(machines: &[(&str, &str)]) -> Served {
    served_with(LIMITS, machines)
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

    /// Writes the configuration of these machines, and reloads it.
    fn reload(&self, client: &mut Client, machines: &[(&str, &str)]) -> Value {
        self.cwd.write_yaml("double", &double(machines)).unwrap();
        let answer = client.ask(json!({"action": "reload"})).unwrap();
        assert_eq!(answer["success"], true, "{answer}");
        answer
    }

    fn assert_ends_well(&mut self) {
        assert_eq!(self.host.terminate().unwrap().code(), Some(0), "{}", self.host.log());
    }
}

fn success() -> Value {
    json!({"success": true})
}

/// Requests an action that fails, and returns the reason.
#[track_caller]
fn fails(client: &mut Client, action: &str, machine: &str) -> String {
    let answer = client.act(action, machine).unwrap();
    assert_eq!(answer["success"], false, "{answer}");
    answer["reason"].as_str().unwrap().to_owned()
}

fn in_quarantine(client: &mut Client, machine: &str) -> Value {
    let mut listed = client.machine(machine).unwrap();
    assert_eq!(listed["disabled"], !listed["quarantine"].is_null(), "{listed}");
    listed["quarantine"].take()
}

/// Asserts that the machine is disabled for good, and not in quarantine.
#[track_caller]
fn assert_disabled(client: &mut Client, machine: &str, reason: &str) {
    let listed = client.machine(machine).unwrap();
    assert_eq!((&listed["disabled"], &listed["quarantine"]), (&json!(true), &Value::Null), "{listed}");
    assert_eq!(listed["disabled_reason"], reason);
}

#[track_caller]
fn assert_works(client: &mut Client, machine: &str) {
    for action in ["restore_start", "stop", "norestore_start", "acpi_stop"] {
        assert_eq!(client.act(action, machine).unwrap(), success(), "{action} of {machine}");
    }
    let listed = client.machine(machine).unwrap();
    assert_eq!((&listed["disabled"], &listed["quarantine"]), (&json!(false), &Value::Null), "{listed}");
}

/// Returns the numbers of machines in quarantine, of tries, and of healed machines.
fn counts(client: &mut Client) -> [u64; 3] {
    let metrics = client.ask(json!({"action": "metrics"})).unwrap();
    ["machines", "tries", "healed"].map(|key| metrics["quarantine"][key].as_u64().unwrap())
}

/// Waits for the event of a healed machine, and returns the number of its tries.
fn wait_for_healing(subscriber: &mut Client, machine: &str) -> Value {
    subscriber.wait_for_event("healed", machine).unwrap()["tries"].take()
}

const ACCIDENTS: [&str; 4] = ["fail", "timeout", "panic", "lie"];

#[test]
fn machine_is_back_in_the_pool_when_its_start_failed_by_an_accident() {
    let keys = ACCIDENTS.map(|fault| format!("faults: {{restore_start: {fault}}}, fault_times: 1"));
    let machines: Vec<_> = ACCIDENTS.into_iter().zip(keys.iter().map(String::as_str)).collect();
    let mut served = served(&machines);
    let mut client = served.client();
    for machine in ACCIDENTS {
        let mut subscriber = served.subscribed();
        let reason = fails(&mut client, "restore_start", machine);
        let disabled = subscriber.wait_for_event("disabled", machine).unwrap();
        assert_eq!(disabled, json!({"event": "disabled", "machine": machine, "reason": reason}));
        let expected = json!({
            "event": "quarantined", "machine": machine, "reason": reason, "tries": 0, "next_try_in": 5,
        });
        assert_eq!(subscriber.next_message().unwrap(), expected);
        let listed = client.machine(machine).unwrap();
        assert_eq!(listed["disabled_reason"], reason.as_str());
        let quarantine = &listed["quarantine"];
        assert_eq!((&quarantine["reason"], &quarantine["tries"]), (&json!(reason), &json!(0)));
        assert!(quarantine["since"].as_u64().unwrap() > 1_700_000_000, "{quarantine}");
        let lock = client.ask(json!({"action": "lock", "machine": machine, "task_id": "t"})).unwrap();
        assert!(lock["reason"].as_str().unwrap().contains("Machine is disabled. Reason: "), "{lock}");
        assert_eq!(wait_for_healing(&mut subscriber, machine), 1, "{machine}");
        assert_works(&mut client, machine);
        let lock = client.ask(json!({"action": "lock", "machine": machine, "task_id": "t"})).unwrap();
        assert_eq!(lock["success"], true, "{lock}");
    }
    assert_eq!(counts(&mut client), [0, 4, 4]);
    let log = served.host.log();
    assert!(log.lines().any(|line| line.contains("INFO") && line.contains("machine healed")), "{log}");
    served.assert_ends_well();
}

#[test]
fn events_of_a_try_are_those_of_a_restore_and_a_stop_before_enabled_and_healed() {
    let mut served = served(&[("m", "faults: {restore_start: fail}, fault_times: 1")]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    fails(&mut client, "restore_start", "m");
    subscriber.wait_for_event("quarantined", "m").unwrap();
    let heard: Vec<Value> = (0..6).map(|_| subscriber.next_message().unwrap()).collect();
    let states: Vec<_> = heard[..4].iter().map(|event| event["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["starting", "running", "stopping", "poweroff"]);
    assert_eq!(heard[4], json!({"event": "enabled", "machine": "m"}));
    assert_eq!((&heard[5]["event"], &heard[5]["tries"]), (&json!("healed"), &json!(1)));
    assert!(heard[5]["seconds"].as_u64().is_some(), "{:?}", heard[5]);
    served.assert_ends_well();
}

#[test]
fn quarantine_lasts_with_one_warning_and_a_longer_pause_when_a_try_fails() {
    let mut served = served(&[("m", "faults: {restore_start: fail}")]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    fails(&mut client, "restore_start", "m");
    subscriber.wait_for_event("quarantined", "m").unwrap();
    let before = served.host.log();
    let failed = subscriber.wait_for_event("quarantined", "m").unwrap();
    assert_eq!((&failed["tries"], &failed["next_try_in"]), (&json!(1), &json!(30)));
    let reason = failed["reason"].as_str().unwrap();
    assert!(reason.contains("heal of machine 'm' failed: configured to fail"), "{reason}");
    let quarantine = in_quarantine(&mut client, "m");
    assert_eq!((&quarantine["tries"], &quarantine["reason"]), (&json!(1), &failed["reason"]));
    assert!((1..=30).contains(&quarantine["next_try_in"].as_u64().unwrap()), "{quarantine}");
    assert_eq!(counts(&mut client), [1, 1, 0]);
    let log = served.host.log();
    let of_try: Vec<&str> =
        log[before.len()..].lines().filter(|line| line.contains("machine=\"m\"")).collect();
    let warnings: Vec<&&str> = of_try.iter().filter(|line| line.contains("WARN")).collect();
    assert!(warnings.len() == 1 && warnings[0].contains("not healed"), "{of_try:?}");
    assert!(!of_try.iter().any(|line| line.contains("ERROR")), "{of_try:?}");
    // The errors of the machine are not replaced by those of the tries.
    assert_eq!(client.machine("m").unwrap()["errors"].as_array().unwrap().len(), 1);
    let list = host::run(&served.cwd, &["list"]).unwrap().stdout;
    assert!(list.contains("in quarantine for ") && list.contains("tried once, again in "), "{list}");
    let metrics = host::run(&served.cwd, &["metrics"]).unwrap().stdout;
    assert!(metrics.contains("in quarantine: 1; tries: 1; healed: 0"), "{metrics}");
    served.assert_ends_well();
}

#[test]
fn machine_is_disabled_and_not_tried_when_its_configuration_is_wrong() {
    let faulty = "faults: {restore_start: refuse}, fault_times: 1";
    let other = ("other", "faults: {restore_start: fail}, fault_times: 1");
    let mut served = served(&[("m", faulty), other]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    let reason = fails(&mut client, "restore_start", "m");
    assert!(reason.contains("configured to be wrong"), "{reason}");
    assert_disabled(&mut client, "m", &reason);
    fails(&mut client, "restore_start", "other");
    // A try of `m` would have come first.
    assert_eq!(wait_for_healing(&mut subscriber, "other"), 1);
    assert_eq!(counts(&mut client), [0, 1, 1]);
    assert_disabled(&mut client, "m", &reason);
    assert_eq!(client.act("enable_machine", "m").unwrap(), success());
    assert_works(&mut client, "m");
    served.assert_ends_well();
}

#[test]
fn machine_is_disabled_by_a_try_when_its_configuration_is_wrong() {
    // The second start, which is the try, fails in another way.
    let mut served = served(&[("m", "faults: {norestore_start: fail, restore_start: refuse}")]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    fails(&mut client, "norestore_start", "m");
    assert!(!in_quarantine(&mut client, "m").is_null());
    subscriber.wait_for_event("disabled", "m").unwrap();
    let reason = subscriber.wait_for_event("disabled", "m").unwrap()["reason"].take();
    assert!(reason.as_str().unwrap().contains("configured to be wrong"), "{reason}");
    assert_disabled(&mut client, "m", reason.as_str().unwrap());
    assert_eq!(counts(&mut client), [0, 1, 0]);
    served.assert_ends_well();
}

#[test]
fn machine_is_disabled_when_its_plugin_fails_three_times_in_a_row() {
    let mut served = served(&[("m", "faults: {restore_start: panic}")]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    for _ in 0..2 {
        fails(&mut client, "restore_start", "m");
        assert!(!in_quarantine(&mut client, "m").is_null());
    }
    subscriber.wait_for_event("disabled", "m").unwrap();
    // The third time is the try.
    let reason = subscriber.wait_for_event("disabled", "m").unwrap()["reason"].take();
    assert!(reason.as_str().unwrap().contains("panicked"), "{reason}");
    assert_disabled(&mut client, "m", reason.as_str().unwrap());
    assert_eq!(counts(&mut client), [0, 1, 0]);
    served.assert_ends_well();
}

#[test]
fn plugin_faults_are_counted_anew_when_an_action_has_succeeded_or_an_operator_enables() {
    let served = served(&[("m", "faults: {restore_start: panic}")]);
    let mut client = served.client();
    for enable in [false, true] {
        for _ in 0..2 {
            fails(&mut client, "restore_start", "m");
            assert!(!in_quarantine(&mut client, "m").is_null());
        }
        if enable {
            assert_eq!(client.act("enable_machine", "m").unwrap(), success());
        } else {
            for action in ["norestore_start", "stop"] {
                assert_eq!(client.act(action, "m").unwrap(), success(), "{action}");
            }
        }
    }
    for _ in 0..2 {
        fails(&mut client, "restore_start", "m");
        assert!(!in_quarantine(&mut client, "m").is_null());
    }
    let reason = fails(&mut client, "restore_start", "m");
    assert_disabled(&mut client, "m", &reason);
}

#[test]
fn machine_is_tried_when_a_hung_call_returns_and_not_before() {
    let hang = |ms| format!("faults: {{restore_start: hang}}, fault_times: 1, hang_ms: {ms}");
    let (long, short) = (hang(600_000), hang(7000));
    let accident = "faults: {restore_start: fail}, fault_times: 1";
    let mut served = served(&[("never", &long), ("late", &short), ("other", accident)]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    for machine in ["never", "late"] {
        let reason = fails(&mut client, "restore_start", machine);
        assert!(reason.contains("did not return"), "{reason}");
        assert!(!in_quarantine(&mut client, machine).is_null());
        // This is no further fault of the plugin.
        for _ in 0..4 {
            let refused = fails(&mut client, "restore_start", machine);
            assert!(refused.contains("earlier call"), "{refused}");
        }
        assert_eq!(in_quarantine(&mut client, machine)["reason"], reason.as_str());
    }
    assert_eq!(wait_for_healing(&mut subscriber, "late"), 1);
    // Now a try of `never`, which failed before, would be over.
    fails(&mut client, "restore_start", "other");
    assert_eq!(wait_for_healing(&mut subscriber, "other"), 1);
    let waits = in_quarantine(&mut client, "never");
    assert_eq!((&waits["tries"], &waits["next_try_in"]), (&json!(0), &json!(0)), "{waits}");
    assert_eq!(counts(&mut client), [1, 2, 2]);
    for machine in ["late", "other"] {
        assert_works(&mut client, machine);
    }
    served.assert_ends_well();
}

#[test]
fn operator_ends_a_quarantine_by_enable_and_by_disable() {
    let accident = "faults: {restore_start: fail}, fault_times: 1";
    let machines = [("enabled", accident), ("disabled", accident), ("other", accident)];
    let mut served = served(&machines);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    for (machine, _) in machines {
        fails(&mut client, "restore_start", machine);
    }
    assert_eq!(client.act("enable_machine", "enabled").unwrap(), success());
    subscriber.wait_for_event("enabled", "enabled").unwrap();
    assert!(in_quarantine(&mut client, "enabled").is_null());
    let request = json!({"action": "disable_machine", "machine": "disabled", "reason": "smells"});
    assert_eq!(client.ask(request).unwrap(), success());
    assert_disabled(&mut client, "disabled", "smells");
    // Neither is tried.
    assert_eq!(wait_for_healing(&mut subscriber, "other"), 1);
    assert_eq!(counts(&mut client), [0, 1, 1]);
    assert_disabled(&mut client, "disabled", "smells");
    assert_works(&mut client, "enabled");
    served.assert_ends_well();
}

#[test]
fn operators_disable_stays_when_an_action_fails_by_an_accident() {
    let served = served(&[("m", "faults: {stop: fail}, fault_times: 1")]);
    let mut client = served.client();
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let request = json!({"action": "disable_machine", "machine": "m", "reason": "smells"});
    assert_eq!(client.ask(request).unwrap(), success());
    fails(&mut client, "stop", "m");
    assert_disabled(&mut client, "m", "smells");
}

#[test]
fn machine_is_not_tried_while_a_task_has_it() {
    let accident = "faults: {restore_start: fail}, fault_times: 1";
    let mut served = served(&[("m", accident), ("other", accident)]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    let lock = json!({"action": "lock", "machine": "m", "task_id": "t"});
    assert_eq!(client.ask(lock).unwrap()["success"], true);
    fails(&mut client, "restore_start", "m");
    fails(&mut client, "restore_start", "other");
    assert_eq!(wait_for_healing(&mut subscriber, "other"), 1);
    let waits = in_quarantine(&mut client, "m");
    assert_eq!((&waits["tries"], &waits["next_try_in"]), (&json!(0), &json!(0)), "{waits}");
    assert_eq!(client.act("unlock", "m").unwrap(), success());
    assert_eq!(wait_for_healing(&mut subscriber, "m"), 1);
    assert_works(&mut client, "m");
    served.assert_ends_well();
}

#[test]
fn machine_is_not_tried_during_a_run_that_a_client_has_started_in_quarantine() {
    let accident = "faults: {restore_start: fail}, fault_times: 1";
    let mut served = served(&[("m", accident), ("other", accident)]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    fails(&mut client, "restore_start", "m");
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    fails(&mut client, "restore_start", "other");
    assert_eq!(wait_for_healing(&mut subscriber, "other"), 1);
    assert_eq!(client.act("state", "m").unwrap()["state"], "running");
    assert!(!in_quarantine(&mut client, "m").is_null());
    assert_eq!(client.act("stop", "m").unwrap(), success());
    assert_eq!(wait_for_healing(&mut subscriber, "m"), 1);
    served.assert_ends_well();
}

#[test]
fn machine_that_cannot_be_stopped_is_stopped_by_the_try() {
    let mut served = served(&[("m", "faults: {stop: fail}, fault_times: 1")]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    fails(&mut client, "stop", "m");
    assert_eq!(client.act("state", "m").unwrap()["state"], "running");
    assert_eq!(wait_for_healing(&mut subscriber, "m"), 1);
    assert_eq!(client.act("state", "m").unwrap()["state"], "poweroff");
    assert_works(&mut client, "m");
    served.assert_ends_well();
}

#[test]
fn request_waits_and_lock_is_refused_during_a_try() {
    let keys = "faults: {norestore_start: fail}, fault_times: 1, delays_ms: {restore_start: 1000}";
    let mut served = served_with("", &[("m", keys)]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    fails(&mut client, "norestore_start", "m");
    subscriber.wait_for_event("quarantined", "m").unwrap();
    subscriber.wait_for_state("m", "starting").unwrap();
    let lock = client.ask(json!({"action": "lock", "machine": "m", "task_id": "t"})).unwrap();
    assert!(lock["reason"].as_str().unwrap().contains("Machine is disabled"), "{lock}");
    assert_eq!(client.act("norestore_start", "m").unwrap(), success());
    // The try has ended before.
    assert_eq!(counts(&mut client), [0, 1, 1]);
    assert_eq!(client.act("state", "m").unwrap()["state"], "running");
    served.assert_ends_well();
}

#[test]
fn host_stops_the_machine_when_it_is_terminated_during_a_try() {
    let keys = "faults: {norestore_start: fail}, fault_times: 1, delays_ms: {restore_start: 1000}";
    let mut served = served_with("", &[("m", keys)]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    fails(&mut client, "norestore_start", "m");
    subscriber.wait_for_event("quarantined", "m").unwrap();
    subscriber.wait_for_state("m", "starting").unwrap();
    served.host.signal(Signal::TERM).unwrap();
    subscriber.wait_for_state("m", "poweroff").unwrap();
    assert_eq!(served.host.wait().unwrap().code(), Some(0), "{}", served.host.log());
}

#[test]
fn quarantine_is_kept_with_its_tries_when_the_host_restarts() {
    let mut served = served(&[("m", "faults: {restore_start: fail}, fault_times: 2")]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    fails(&mut client, "restore_start", "m");
    subscriber.wait_for_event("quarantined", "m").unwrap();
    // The try is the second fault.
    subscriber.wait_for_event("quarantined", "m").unwrap();
    let before = in_quarantine(&mut client, "m");
    // A reply comes after the write of the try's result.
    assert_eq!(client.act("stop", "m").unwrap(), success());
    served.host.kill().unwrap();
    // Its machine works, because the plugin of the new host counts its faults anew, unless the configuration is
    // replaced.
    served.cwd.write_yaml("double", &double(&[("m", "")])).unwrap();
    served.host = RunningHost::start(&served.cwd).unwrap();
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    let after = in_quarantine(&mut client, "m");
    for key in ["reason", "tries", "since"] {
        assert_eq!(after[key], before[key], "{key}");
    }
    assert!(after["next_try_in"].as_u64().unwrap() <= 5, "{after}");
    assert_eq!(wait_for_healing(&mut subscriber, "m"), 2);
    assert_works(&mut client, "m");
    served.assert_ends_well();
    let text =
        std::fs::read_to_string(served.cwd.root().join("operational/generated/machinery-host/machines.json"));
    assert!(!text.unwrap().contains("quarantine"));
}

#[test]
fn machine_is_tried_at_once_with_all_tries_before_it_when_a_reload_has_changed_it() {
    let served = served(&[("m", "faults: {restore_start: fail}"), ("same", "faults: {restore_start: fail}")]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    for machine in ["m", "same"] {
        fails(&mut client, "restore_start", machine);
    }
    while subscriber.wait_for_event("quarantined", "m").unwrap()["tries"] != 1 {}
    while in_quarantine(&mut client, "same")["tries"] != 1 {
        subscriber.next_message().unwrap();
    }
    let changed = served.reload(&mut client, &[("m", ""), ("same", "faults: {restore_start: fail}")]);
    assert_eq!(changed["changed"], json!(["m"]));
    // Not after 30 s.
    assert_eq!(wait_for_healing(&mut subscriber, "m"), 1);
    let same = in_quarantine(&mut client, "same");
    assert!(same["tries"] == 1 && same["next_try_in"].as_u64().unwrap() > 0, "{same}");
    assert_works(&mut client, "m");
}

#[test]
fn machine_is_disabled_when_healing_is_off_and_a_reload_applies_that() {
    let accident = "faults: {restore_start: fail}";
    let mut served = served_with("heal: off\n", &[("m", accident), ("n", accident)]);
    let mut client = served.client();
    let reason = fails(&mut client, "restore_start", "m");
    assert_disabled(&mut client, "m", &reason);
    served.cwd.host_yaml("heal: auto\n").unwrap();
    let answer = client.ask(json!({"action": "reload"})).unwrap();
    assert_eq!(answer["settings"], json!(["heal"]), "{answer}");
    // A machine that is disabled already stays so.
    assert_disabled(&mut client, "m", &reason);
    let of_n = fails(&mut client, "restore_start", "n");
    assert!(!in_quarantine(&mut client, "n").is_null());
    // A machine in quarantine is disabled, also on disk.
    served.cwd.host_yaml("heal: off\n").unwrap();
    assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true);
    assert_disabled(&mut client, "n", &of_n);
    served.host.kill().unwrap();
    served.cwd.host_yaml("heal: auto\n").unwrap();
    served.host = RunningHost::start(&served.cwd).unwrap();
    assert_disabled(&mut served.client(), "n", &of_n);
    assert_eq!(counts(&mut served.client()), [0, 0, 0]);
}

#[test]
fn quarantine_of_an_earlier_host_becomes_a_disable_when_healing_is_off_now() {
    let mut served = served(&[("m", "faults: {restore_start: fail}")]);
    let reason = fails(&mut served.client(), "restore_start", "m");
    served.host.kill().unwrap();
    served.cwd.host_yaml("heal: off\n").unwrap();
    served.host = RunningHost::start(&served.cwd).unwrap();
    assert_disabled(&mut served.client(), "m", &reason);
    served.assert_ends_well();
}

#[test]
fn machine_is_tried_when_its_state_could_not_be_read_at_the_start_of_the_host() {
    let mut served = served(&[("m", "faults: {state: panic}, fault_times: 1")]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    let reason = in_quarantine(&mut client, "m")["reason"].take();
    assert!(reason.as_str().unwrap().contains("panicked"), "{reason}");
    assert_eq!(wait_for_healing(&mut subscriber, "m"), 1);
    assert_works(&mut client, "m");
    served.assert_ends_well();
}

#[test]
fn unusable_machine_in_quarantine_is_tried_when_it_is_usable_again() {
    let folder = tempfile::tempdir().unwrap();
    let needed = folder.path().join("needed");
    std::fs::write(&needed, "").unwrap();
    let keys = format!("needs: {}, faults: {{restore_start: fail}}, fault_times: 1", needed.display());
    let accident = "faults: {restore_start: fail}, fault_times: 1";
    let mut served = served(&[("m", &keys), ("other", accident)]);
    let (mut client, mut subscriber) = (served.client(), served.subscribed());
    fails(&mut client, "restore_start", "m");
    std::fs::remove_file(&needed).unwrap();
    assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true);
    fails(&mut client, "restore_start", "other");
    assert_eq!(wait_for_healing(&mut subscriber, "other"), 1);
    assert_eq!(in_quarantine(&mut client, "m")["tries"], 0);
    std::fs::write(&needed, "").unwrap();
    assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true);
    assert_eq!(wait_for_healing(&mut subscriber, "m"), 1);
    assert_works(&mut client, "m");
    served.assert_ends_well();
}
