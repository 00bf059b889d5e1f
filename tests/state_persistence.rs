//! Persistence of locks, reservations and disabled machines, however the host ends.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::random::Rng;
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::trace::{self, Trace};
use serde_json::{Value, json};

fn books(cwd: &ScratchCwd) -> PathBuf {
    cwd.root().join("operational/generated/machinery-host/machines.json")
}

/// Returns a machine's availability, as `list` shows it.
fn standing(machine: &Value) -> Value {
    let keys = ["locked", "locked_by", "reserved", "reserved_by", "disabled", "disabled_reason"];
    keys.iter()
        .map(|key| ((*key).to_owned(), machine[*key].clone()))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn standings(client: &mut Client) -> Vec<Value> {
    let list = client.ask(json!({"action": "list"})).unwrap();
    list["machines"].as_array().unwrap().iter().map(standing).collect()
}

fn ask_well(client: &mut Client, request: Value) {
    let answer = client.ask(request.clone()).unwrap();
    assert_eq!(answer["success"], true, "{request}: {answer}");
}

#[test]
fn availability_is_kept_when_the_host_is_killed() {
    let machines = [("locked", ""), ("reserved", ""), ("broken", "faults: {restore_start: fail}"), ("m", "")];
    let cwd = ScratchCwd::double(&machines).unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    let dump = cwd.root().join("memory.dmp");
    ask_well(
        &mut client,
        json!({"action": "lock", "machine": "locked", "task_id": "t1", "memory_dump_path": dump}),
    );
    ask_well(&mut client, json!({"action": "reserve", "machine": "reserved", "task_id": "t2"}));
    assert_eq!(client.act("restore_start", "broken").unwrap()["success"], false);
    ask_well(&mut client, json!({"action": "restore_start", "machine": "locked"}));
    let before = standings(&mut client);
    host.kill().unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(standings(&mut client), before);
    assert_eq!(before[2]["disabled"], true);
    // The paths of the lock are kept, too.
    ask_well(&mut client, json!({"action": "restore_start", "machine": "locked"}));
    ask_well(&mut client, json!({"action": "dump_memory", "machine": "locked"}));
    assert!(dump.is_file());
    ask_well(&mut client, json!({"action": "unlock", "machine": "locked", "task_id": "t1"}));
}

#[test]
fn availability_is_kept_when_the_host_shuts_down() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    ask_well(&mut host.client().unwrap(), json!({"action": "lock", "machine": "m", "task_id": "t"}));
    assert!(host.terminate().unwrap().success());
    let host = RunningHost::start(&cwd).unwrap();
    assert_eq!(host.client().unwrap().machine("m").unwrap()["locked_by"], "t");
}

#[test]
fn availability_is_kept_when_a_machine_is_not_configured_for_a_while() {
    let cwd = ScratchCwd::double(&[("away", ""), ("m", "")]).unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    ask_well(&mut host.client().unwrap(), json!({"action": "disable_machine", "machine": "away"}));
    host.kill().unwrap();
    let both = cwd.yaml("double").unwrap();
    cwd.write_yaml("double", &machinery_testkit::scratch::double(&[("m", "")])).unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    ask_well(&mut host.client().unwrap(), json!({"action": "lock", "machine": "m", "task_id": "t"}));
    host.kill().unwrap();
    cwd.write_yaml("double", &both).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    assert_eq!(host.client().unwrap().machine("away").unwrap()["disabled"], true);
}

#[test]
fn serve_fails_and_keeps_the_state_file_when_it_is_invalid() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    cwd.write("operational/generated/machinery-host/machines.json", "{\"format\": 1, \"mach").unwrap();
    let ran = host::run(&cwd, &["serve"]).unwrap();
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("machines.json makes no sense") && ran.stderr.contains("move it away"));
    assert_eq!(fs::read_to_string(books(&cwd)).unwrap(), "{\"format\": 1, \"mach");
}

#[test]
fn lock_is_refused_when_the_state_file_cannot_be_written() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    // A folder blocks the temporary file: root is not restricted by permissions.
    let obstacle = books(&cwd).with_extension("json.new");
    fs::create_dir(&obstacle).unwrap();
    let lock = json!({"action": "lock", "machine": "m", "task_id": "t"});
    let answer = client.ask(lock.clone()).unwrap();
    let reason = answer["reason"].as_str().unwrap();
    assert!(reason.contains("machines.json") && reason.contains("'m'"), "{reason}");
    assert_eq!(client.machine("m").unwrap()["locked"], false);
    let reserve = json!({"action": "reserve", "machine": "m", "task_id": "t"});
    assert_eq!(client.ask(reserve).unwrap()["success"], false);
    assert_eq!(client.machine("m").unwrap()["reserved"], false);
    fs::remove_dir(&obstacle).unwrap();
    ask_well(&mut client, lock.clone());
    // A task keeps its lock when a repeated request cannot be saved.
    fs::create_dir(&obstacle).unwrap();
    assert_eq!(client.ask(lock).unwrap()["success"], false);
    assert_eq!(client.machine("m").unwrap()["locked_by"], "t");
    fs::remove_dir(&obstacle).unwrap();
}

#[test]
fn state_is_saved_by_the_next_request_when_a_write_has_failed() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    ask_well(&mut client, json!({"action": "lock", "machine": "m", "task_id": "t"}));
    let obstacle = books(&cwd).with_extension("json.new");
    fs::create_dir(&obstacle).unwrap();
    assert_eq!(client.act("unlock", "m").unwrap()["success"], false);
    fs::remove_dir(&obstacle).unwrap();
    let again = client.act("unlock", "m").unwrap();
    assert!(again["reason"].as_str().unwrap().contains("not locked"), "{again}");
    host.kill().unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    assert_eq!(host.client().unwrap().machine("m").unwrap()["locked"], false);
}

/// A computer that crashes keeps what was synced: first the new file, then its name in the folder.
#[test]
fn lock_is_on_disk_when_it_is_answered() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let trace =
        Trace::new(&["fsync", "fdatasync", "rename", "renameat", "renameat2", "sendto", "write"]).unwrap();
    let mut host = RunningHost::start_with(&cwd, |command| trace.attach(command)).unwrap();
    let lock = json!({"action": "lock", "machine": "m", "task_id": "of-this-test"});
    ask_well(&mut host.client().unwrap(), lock);
    assert!(host.terminate().unwrap().success(), "{}", host.log());
    let calls = trace.finish().unwrap();
    let written = calls.iter().position(|call| call.name == "write" && call.args.contains("of-this-test"));
    let mut at = written.unwrap_or_else(|| panic!("the lock was not written: {calls:?}"));
    let file = books(&cwd);
    let folder = file.parent().unwrap().display().to_string();
    for (name, path) in [
        ("fsync", file.with_extension("json.new").display().to_string()),
        ("rename", file.display().to_string()),
        ("fsync", folder),
    ] {
        at = trace::position(&calls, at + 1, name, &path).unwrap();
    }
    let answered = calls.iter().skip(at).find(|call| call.args.contains("success"));
    assert!(answered.is_some(), "the answer came before: {calls:?}");
}

const KILLS: usize = 200;
const HOSTS: usize = 4;
const MACHINES: usize = 3;

/// A client's knowledge of its machine: the last answered change, and the unanswered request after it.
#[derive(Debug, Clone)]
struct Known {
    answered: Value,
    asked: Option<Value>,
}

/// Changes a machine's availability again and again, until the host is killed.
fn keep_busy(client: &mut Client, machine: &str, rng: &mut Rng, known: &mut Known) {
    loop {
        let task = format!("t{}", rng.below(1000));
        let mut expected = known.answered.clone();
        let (on, by, action) = match rng.below(3) {
            0 => ("locked", "locked_by", ["lock", "unlock"]),
            1 => ("reserved", "reserved_by", ["reserve", "unreserve"]),
            _ => ("disabled", "disabled_reason", ["disable_machine", "enable_machine"]),
        };
        let is_on = expected[on] == true;
        // An unavailable machine can only be released.
        if !is_on
            && (expected["disabled"] == true || expected["reserved"] == true || expected["locked"] == true)
        {
            continue;
        }
        expected[on] = json!(!is_on);
        expected[by] = json!(if is_on { "" } else { &task });
        known.asked = Some(expected);
        let request = json!({"action": action[usize::from(is_on)], "machine": machine, "task_id": task, "reason": task});
        let request = if is_on { json!({"action": action[1], "machine": machine}) } else { request };
        match client.ask(request.clone()) {
            Ok(answer) => assert_eq!(answer["success"], true, "{request}: {answer}"),
            // The host was killed.
            Err(_) => return,
        }
        if let Some(expected) = known.asked.take() {
            known.answered = expected;
        }
    }
}

/// Returns the availability of all machines in the state file, in the words of `list`.
fn on_disk(cwd: &ScratchCwd) -> BTreeMap<String, Value> {
    let text = match fs::read_to_string(books(cwd)) {
        Ok(text) => text,
        Err(_) => return BTreeMap::new(),
    };
    let page: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("torn: {error}: {text:?}"));
    let text = |value: &Value| json!(value.as_str().unwrap_or(""));
    let machines = page["machines"].as_object().unwrap().iter();
    let in_words = |(name, of): (&String, &Value)| {
        let (lock, reserved, disabled) = (&of["lock"]["task_id"], &of["reserved_by"], &of["disabled"]);
        let standing = json!({
            "locked": !lock.is_null(), "locked_by": text(lock),
            "reserved": !reserved.is_null(), "reserved_by": text(reserved),
            "disabled": !disabled.is_null(), "disabled_reason": text(disabled),
        });
        (name.clone(), standing)
    };
    machines.map(in_words).collect()
}

fn plain() -> Value {
    json!({
        "locked": false, "locked_by": "", "reserved": false, "reserved_by": "",
        "disabled": false, "disabled_reason": "",
    })
}

/// Kills a busy host repeatedly, and compares the state file with its answers to clients.
fn kill_and_compare(kills: usize, seed: u64) {
    let names: Vec<String> = (0..MACHINES).map(|index| format!("m{index}")).collect();
    let machines: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
    let cwd = ScratchCwd::double(&machines).unwrap();
    let mut rng = Rng(seed);
    let mut all: Vec<Known> = names.iter().map(|_| Known { answered: plain(), asked: None }).collect();
    for kill in 0..kills {
        let mut host = RunningHost::start(&cwd).unwrap();
        let mut client = host.client().unwrap();
        for (known, standing) in all.iter_mut().zip(standings(&mut client)) {
            let possible = [Some(&known.answered), known.asked.as_ref()];
            assert!(possible.contains(&Some(&standing)), "kill {kill}: {standing} is neither of {known:?}");
            *known = Known { answered: standing, asked: None };
        }
        thread::scope(|scope| {
            for (name, known) in names.iter().zip(&mut all) {
                let (mut client, mut rng) = (host.client().unwrap(), Rng(rng.below(u64::MAX) | 1));
                scope.spawn(move || keep_busy(&mut client, name, &mut rng, known));
            }
            // The kill comes at a random moment.
            thread::sleep(Duration::from_micros(rng.below(40_000)));
            host.kill().unwrap();
        });
        let disk = on_disk(&cwd);
        for (name, known) in names.iter().zip(&all) {
            let standing = disk.get(name).cloned().unwrap_or_else(plain);
            let possible = [Some(&known.answered), known.asked.as_ref()];
            assert!(possible.contains(&Some(&standing)), "kill {kill}: {standing} is neither of {known:?}");
        }
    }
}

#[test]
fn state_file_is_consistent_when_the_host_is_killed_at_random_times() {
    let seed = RandomState::new().hash_one(1) | 1;
    println!("seed {seed}");
    thread::scope(|scope| {
        let hosts: Vec<_> = (0..HOSTS as u64)
            .map(|host| scope.spawn(move || kill_and_compare(KILLS / HOSTS, seed.wrapping_add(2 * host))))
            .collect();
        for host in hosts {
            host.join().unwrap();
        }
    });
}
