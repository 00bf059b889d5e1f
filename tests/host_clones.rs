//! Clones of one machine: a row, a sample and a line for all of them, and a life of its own for each.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::terminal::Terminal;
use serde_json::{Value, json};

/// Makes a lab of clones of `w` and of the machine `other`. The first clone has these further keys.
fn lab(clones: usize, of_first: &str) -> ScratchCwd {
    let names: Vec<String> = (1..=clones).map(|number| format!("w-{number}")).collect();
    let first = format!("clone_of: w{of_first}");
    let keys = [first.as_str()].into_iter().chain(std::iter::repeat("clone_of: w"));
    let machines = names.iter().map(String::as_str).zip(keys);
    ScratchCwd::double(&machines.chain([("other", "")]).collect::<Vec<_>>()).unwrap()
}

/// Runs `list` with these arguments, and returns its output.
fn list(cwd: &ScratchCwd, arguments: &[&str]) -> String {
    let ran = host::run(cwd, &[&["list"], arguments].concat()).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ran.stdout
}

fn names(list: &str) -> Vec<&str> {
    let rows = list.lines().skip(1).take_while(|line| !line.is_empty());
    rows.filter_map(|row| row.split_whitespace().next()).collect()
}

#[test]
fn list_folds_clones_until_all_or_their_machine_is_named() {
    let cwd = lab(20, "");
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    for machine in ["w-3", "w-4"] {
        assert_eq!(client.act("restore_start", machine).unwrap()["success"], true);
    }
    client.ask(json!({"action": "lock", "machine": "w-4", "task_id": "t"})).unwrap();
    client.act("disable_machine", "w-7").unwrap();
    let folded = list(&cwd, &[]);
    assert!(folded.contains("w ×20  17 ready, 2 running, 1 disabled"), "{folded}");
    assert!(folded.contains("disabled: w-7; 1 locked"), "{folded}");
    assert_eq!(names(&folded), ["w", "other"]);
    assert_eq!(names(&list(&cwd, &["--all"])).len(), 21);
    assert_eq!(names(&list(&cwd, &["w"])).len(), 20);
    assert_eq!(names(&list(&cwd, &["w-4", "other"])), ["w-4", "other"]);
    let unknown = host::run(&cwd, &["list", "x"]).unwrap();
    assert_eq!(
        (unknown.code, unknown.stderr.as_str()),
        (Some(1), "error: Machine with name x does not exist\n")
    );
    let whole: Value = serde_json::from_str(&list(&cwd, &["--json"])).unwrap();
    let machines = whole["machines"].as_array().unwrap();
    assert_eq!(
        (machines.len(), &machines[0]["clone_of"], &machines[20]["clone_of"]),
        (21, &json!("w"), &Value::Null)
    );
}

#[test]
fn quarantine_is_of_one_clone_and_the_others_go_on() {
    let cwd = lab(5, ", faults: {restore_start: fail}, fault_times: 1");
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    for number in 1..=5 {
        let name = format!("w-{number}");
        let started = client.act("restore_start", &name).unwrap()["success"] == true;
        let clone = client.machine(&name).unwrap();
        let is_sound = (started, clone["state"] == "running", clone["quarantine"].is_null());
        assert_eq!(is_sound, (number != 1, number != 1, number != 1), "{clone}");
    }
    let folded = list(&cwd, &[]);
    assert!(folded.contains("4 running, 1 quarantined") && folded.contains("quarantined: w-1"), "{folded}");
    // It heals by itself, while the others run.
    client.wait_for_event("healed", "w-1").unwrap();
    let folded = list(&cwd, &[]);
    assert!(folded.contains("1 ready, 4 running") && !folded.contains("quarantined"), "{folded}");
}

#[test]
fn acquire_prefers_clones_that_stand_by() {
    let cwd = lab(3, ", delays_ms: {prepare: 600000}");
    cwd.change_yaml("double", "interface: lo\n", "interface: lo\ncapabilities: {prepare: true}\n").unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    for machine in ["w-2", "w-3", "other"] {
        assert_eq!(client.act("prepare", machine).unwrap()["success"], true);
    }
    let acquired = ["1", "2", "3", "4"].map(|task| {
        let answer = client.ask(json!({"action": "acquire", "task_id": task, "platform": "linux"})).unwrap();
        answer["machine"]["name"].as_str().unwrap().to_owned()
    });
    assert_eq!(acquired, ["w-2", "w-3", "other", "w-1"]);
}

#[test]
fn machine_is_prepared_while_two_clones_of_another_one_take_long() {
    let slow = "clone_of: w, delays_ms: {prepare: 600000}";
    let cwd = ScratchCwd::double(&[("w-1", slow), ("w-2", slow), ("other", "")]).unwrap();
    cwd.change_yaml("double", "interface: lo\n", "interface: lo\ncapabilities: {prepare: true}\n").unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    for _ in 0..2 {
        assert_eq!(client.act("prepare", "other").unwrap()["success"], true);
    }
}

#[test]
fn top_folds_clones_until_f_unfolds_them() {
    let cwd = lab(20, "");
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    let mut command = host::command(&cwd).unwrap();
    command.arg("top");
    let mut top = Terminal::start(command, (24, 80)).unwrap();
    top.wait_for_words("20 ready; 20 plain").unwrap();
    client.act("restore_start", "w-3").unwrap();
    client.act("disable_machine", "w-7").unwrap();
    top.wait_for_words("18 ready, 1 running, 1 disabled").unwrap();
    top.wait_for_words("other            poweroff").unwrap();
    top.type_keys("f").unwrap();
    top.wait_for_words("w-3              running").unwrap();
    top.type_keys("f").unwrap();
    top.wait_until("folded", |screen| !screen.contents().contains("w-3")).unwrap();
}
