//! Machines that their plugin cannot use: the host serves the others, and enables each machine when it is
//! usable again.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;

use machinery_testkit::client::Client;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::scratch::{ScratchCwd, double};
use serde_json::{Value, json};

/// Creates a CWD with a machine `broken` whose file is missing, and a usable one. Returns the file's path,
/// too.
fn cwd() -> (ScratchCwd, PathBuf) {
    let cwd = ScratchCwd::double(&[]).unwrap();
    let needs = cwd.root().join("snapshot");
    let keys = format!("needs: {}", needs.display());
    cwd.write_yaml("double", &double(&[("broken", &keys), ("sound", "warning: it snores")])).unwrap();
    (cwd, needs)
}

fn done() -> Value {
    json!({"success": true})
}

fn disabled_reason(client: &mut Client, machine: &str) -> Option<String> {
    let machine = client.machine(machine).unwrap();
    (machine["disabled"] == true).then(|| machine["disabled_reason"].as_str().unwrap().to_owned())
}

fn reason(answer: &Value) -> &str {
    assert_eq!(answer["success"], false, "{answer}");
    answer["reason"].as_str().unwrap()
}

#[test]
fn host_serves_other_machines_when_one_lacks_its_snapshot() {
    let (cwd, needs) = cwd();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "sound").unwrap(), done());
    let reported = disabled_reason(&mut client, "broken").unwrap();
    assert!(reported.contains(needs.to_str().unwrap()), "{reported}");
    for action in ["restore_start", "norestore_start"] {
        let refused = client.act(action, "broken").unwrap();
        assert!(
            reason(&refused).contains("cannot be used") && reason(&refused).contains("reload"),
            "{refused}"
        );
    }
    let lock = json!({"action": "lock", "machine": "broken", "task_id": "t"});
    assert!(reason(&client.ask(lock).unwrap()).contains("Machine is disabled"));
    assert_eq!(host.log().matches("ERROR machine cannot be used").count(), 1, "{}", host.log());
}

#[test]
fn unusable_machine_is_enabled_by_itself_when_a_reload_finds_it_sound() {
    let (cwd, needs) = cwd();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    let reload = json!({"action": "reload"});
    assert_eq!(client.ask(reload.clone()).unwrap()["success"], true);
    assert!(disabled_reason(&mut client, "broken").is_some());
    fs::write(&needs, "").unwrap();
    assert_eq!(client.ask(reload.clone()).unwrap()["success"], true);
    client.wait_for_event("enabled", "broken").unwrap();
    assert_eq!(disabled_reason(&mut client, "broken"), None);
    assert_eq!(client.act("restore_start", "broken").unwrap(), done());
    fs::remove_file(&needs).unwrap();
    assert_eq!(client.ask(reload).unwrap()["success"], true);
    let heard = client.wait_for_event("disabled", "broken").unwrap();
    assert!(heard["reason"].as_str().unwrap().contains("snapshot"), "{heard}");
    assert_eq!(client.machine("broken").unwrap()["state"], "running", "a run goes on");
    assert_eq!(client.act("stop", "broken").unwrap(), done());
}

#[test]
fn enable_machine_is_refused_until_the_machine_is_sound() {
    let (cwd, needs) = cwd();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    assert!(reason(&client.act("enable_machine", "broken").unwrap()).contains("snapshot"));
    assert!(disabled_reason(&mut client, "broken").is_some());
    fs::write(&needs, "").unwrap();
    assert_eq!(client.act("enable_machine", "broken").unwrap(), done());
    assert_eq!(disabled_reason(&mut client, "broken"), None);
}

#[test]
fn machine_disabled_by_an_operator_stays_so_when_a_reload_finds_it_sound() {
    let (cwd, needs) = cwd();
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    let disable = json!({"action": "disable_machine", "machine": "broken", "reason": "by hand"});
    assert_eq!(client.ask(disable).unwrap(), done());
    assert!(reason(&client.act("enable_machine", "broken").unwrap()).contains("snapshot"));
    fs::write(&needs, "").unwrap();
    assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true);
    assert_eq!(disabled_reason(&mut client, "broken").unwrap(), "by hand");
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(disabled_reason(&mut client, "broken").unwrap(), "by hand");
    assert_eq!(client.act("enable_machine", "broken").unwrap(), done());
}

#[test]
fn unusable_machine_is_sound_at_the_next_start_when_its_file_is_back() {
    let (cwd, needs) = cwd();
    let mut host = RunningHost::start(&cwd).unwrap();
    // A lock makes the host write its state file.
    let lock = json!({"action": "lock", "machine": "sound", "task_id": "t"});
    assert_eq!(host.client().unwrap().ask(lock).unwrap()["success"], true);
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
    fs::write(&needs, "").unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    assert_eq!(disabled_reason(&mut host.client().unwrap(), "broken"), None);
}

#[test]
fn warning_is_listed_and_logged_once_when_each_reload_finds_it() {
    let (cwd, _) = cwd();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    for _ in 0..3 {
        assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true);
    }
    assert_eq!(client.machine("sound").unwrap()["warnings"], json!(["it snores"]));
    assert_eq!(client.machine("broken").unwrap()["warnings"], json!([]));
    assert_eq!(client.act("restore_start", "sound").unwrap(), done());
    let list = host::run(&cwd, &["list"]).unwrap().stdout;
    assert!(list.contains("warning: it snores") && list.contains("disabled: cannot find"), "{list}");
    assert_eq!(host.log().matches("it snores").count(), 1, "{}", host.log());
}

#[test]
fn diagnosis_that_fails_or_hangs_leaves_machines_as_they_are() {
    for fault in ["fail", "panic", "hang"] {
        let keys = format!("faults: {{diagnose: {fault}}}");
        let cwd = ScratchCwd::double(&[("m", &keys)]).unwrap();
        cwd.host_yaml("timeouts: {load: 1, reload: 1, state: 1}\n").unwrap();
        let host = RunningHost::start(&cwd).unwrap();
        let mut client = host.client().unwrap();
        for _ in 0..2 {
            assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true, "{fault}");
        }
        assert_eq!(client.act("restore_start", "m").unwrap(), done(), "{fault}");
        assert_eq!(client.act("enable_machine", "m").unwrap(), done(), "{fault}");
        assert!(host.log().contains("diagnosing the machines of 'double'"), "{}", host.log());
    }
}
