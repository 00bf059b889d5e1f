//! Many clients at once, also misbehaving ones: each affects itself only.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::thread;

use machinery_testkit::client::{self, Client};
use machinery_testkit::host::RunningHost;
use machinery_testkit::random::Rng;
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::wait::wait_until;
use serde_json::{Value, json};

/// The maximum length of a line.
const LONGEST: usize = 1024 * 1024;

fn success() -> Value {
    json!({"success": true})
}

/// A host of machines `m0`, `m1` and so on, with its CWD; dropped in this order.
struct Served {
    host: RunningHost,
    _cwd: ScratchCwd,
}

fn served(machines: usize, keys: &str) -> Served {
    client::raise_file_limit().unwrap();
    let names: Vec<String> = (0..machines).map(|index| format!("m{index}")).collect();
    let machines: Vec<_> = names.iter().map(|name| (name.as_str(), keys)).collect();
    let cwd = ScratchCwd::double(&machines).unwrap();
    Served { host: RunningHost::start(&cwd).unwrap(), _cwd: cwd }
}

impl Served {
    fn clients(&self, count: usize) -> Vec<Client> {
        (0..count).map(|_| self.host.client().unwrap()).collect()
    }
}

/// Asserts that this client is served.
fn assert_served(client: &mut Client, machine: &str) {
    for action in ["restore_start", "state", "stop"] {
        assert_eq!(client.act(action, machine).unwrap()["success"], true, "{action}");
    }
}

/// Returns a valid request of that many bytes.
fn long_line(length: usize) -> Vec<u8> {
    let (head, tail) = (br#"{"action": "version", "padding": ""#, br#""}"#);
    [head.as_slice(), &vec![b'x'; length - head.len() - tail.len()], tail].concat()
}

#[test]
fn well_behaved_client_is_served_when_five_hundred_others_misbehave() {
    let served = served(100, "delays_ms: {restore_start: 20}");
    let mut normal = served.clients(1).remove(0);
    let empty = served.host.resources().unwrap();
    crowd(&served, &mut normal, empty.files);
    let before = served.host.resources().unwrap();
    crowd(&served, &mut normal, empty.files);
    let after = served.host.resources().unwrap();
    // The replies that nobody reads may hold the budget of their user, 64 MiB.
    assert!(after.resident_kib <= before.resident_kib + 128 * 1024, "{before:?}, {after:?}");
    // The number of concurrent calls varies; its maximum is two for each machine, and a few more.
    assert!(after.threads <= 300 && after.children.is_empty(), "{before:?}, {after:?}");
}

/// Connects five hundred clients, and disconnects them again. Returns when the host has as many open files as
/// when it was `empty`.
fn crowd(served: &Served, normal: &mut Client, empty: usize) {
    // Clients that never read the answers to their requests.
    let mut unread = served.clients(100);
    let list = b"{\"action\": \"list\"}\n".repeat(50);
    for client in &mut unread {
        client.send_bytes(&list).unwrap();
    }
    assert_served(normal, "m1");

    // Clients that send half a line.
    let mut halves = served.clients(150);
    for client in &mut halves {
        client.send_bytes(b"{\"action\": \"vers").unwrap();
    }
    assert_served(normal, "m2");

    // Clients with lines of the maximum length, and longer ones.
    let mut long = served.clients(60);
    thread::scope(|scope| {
        for (index, client) in long.iter_mut().enumerate() {
            scope.spawn(move || {
                let too_long = index % 2;
                // The host may close the connection before it has read everything.
                let _ = client.send_line(&long_line(LONGEST + too_long));
                let answer = client.next_message().unwrap();
                assert_eq!(answer["success"], too_long == 0, "{answer}");
                assert!(too_long == 0 || client.wait_for_close_after_refusal());
            });
        }
    });
    assert_served(normal, "m3");

    // Clients that send a request and disconnect.
    for index in 10..60 {
        let mut client = served.clients(1).remove(0);
        client.send(&json!({"action": "restore_start", "machine": format!("m{index}")})).unwrap();
    }
    // All other clients, at the same time.
    let mut polite = served.clients(149);
    thread::scope(|scope| {
        for (index, client) in polite.iter_mut().enumerate() {
            let machine = format!("m{}", 60 + index % 40);
            scope.spawn(move || {
                let id = json!(index);
                client.send(&json!({"action": "state", "machine": machine, "id": id})).unwrap();
                let answer = client.next_message().unwrap();
                assert_eq!((&answer["id"], &answer["success"]), (&id, &json!(true)), "{answer}");
            });
        }
    });
    // The half lines are completed.
    for client in &mut halves {
        client.send_bytes(b"ion\"}\n").unwrap();
        assert_eq!(client.next_message().unwrap()["success"], true);
    }
    // The actions of disconnected clients have run.
    normal.ask(json!({"action": "wait_idle"})).unwrap();
    for index in 10..60 {
        assert_eq!(normal.machine(&format!("m{index}")).unwrap()["state"], "running", "m{index}");
    }
    assert_eq!(normal.ask(json!({"action": "shutdown_all"})).unwrap(), success());
    drop((unread, halves, long, polite));
    // No event shows when the host has noticed.
    wait_until("files are open", || {
        assert_served(normal, "m4");
        served.host.resources().unwrap().files <= empty + 8
    });
}

#[test]
fn wait_idle_is_cancelled_when_its_client_disconnects() {
    let served = served(1, "delays_ms: {restore_start: 20000}");
    let mut normal = served.clients(1).remove(0);
    let before = served.host.resources().unwrap();
    normal.send(&json!({"action": "restore_start", "machine": "m0"})).unwrap();
    for mut client in served.clients(400) {
        client.send(&json!({"action": "wait_idle"})).unwrap();
    }
    // No event shows when the host has noticed; the machine is busy all the time.
    wait_until("files are open", || {
        assert_eq!(normal.act("state", "m0").unwrap()["state"], "starting");
        served.host.resources().unwrap().files <= before.files + 8
    });
}

#[test]
fn error_answer_is_short_when_the_request_is_long() {
    let served = served(1, "");
    let mut client = served.clients(1).remove(0);
    let long = "x".repeat(1_000_000);
    for request in [
        json!({"action": "dump_memory", "machine": "m0", "path": "/tmp/none", "format": long}),
        json!({"action": "dump_memory", "machine": "m0", "path": long}),
        json!({"action": "state", "machine": long}),
        json!({"action": "acquire", "task_id": "t", "name": long}),
        json!({"action": "acquire", "task_id": "t", "platform": long}),
    ] {
        client.send(&request).unwrap();
        let line = client.next_line().unwrap();
        assert!(line.len() < 1000 && line.contains("\"success\":false"), "{line:.1000}");
    }
}

#[test]
fn request_is_refused_when_too_many_wait_for_its_machine() {
    let served = served(2, "delays_ms: {restore_start: 20000}");
    let mut client = served.clients(1).remove(0);
    client.send(&json!({"action": "restore_start", "machine": "m0"})).unwrap();
    for id in 1..=100 {
        client
            .send(&json!({"action": "screenshot", "machine": "m0", "path": "/tmp/none", "id": id}))
            .unwrap();
    }
    // One runs and 63 wait.
    for id in 64..=100 {
        let answer = client.next_message().unwrap();
        assert_eq!(answer["id"], id, "{answer}");
        assert!(answer["reason"].as_str().unwrap().contains("64 requests for this machine"), "{answer}");
    }
    assert_served(&mut served.clients(1).remove(0), "m1");
}

/// The reproduced attack had 64 connections with 16,000 requests of 4 KB each.
#[test]
fn flood_costs_its_own_connections_and_little_memory() {
    let served = served(64, "");
    let mut normal = served.clients(1).remove(0);
    assert_eq!(normal.ask(json!({"action": "version"})).unwrap()["success"], true);
    let before = served.host.resources().unwrap();
    let path = format!("/{}", "x".repeat(4000));
    let mut flood = served.clients(64);
    thread::scope(|scope| {
        for (index, client) in flood.iter_mut().enumerate() {
            let request = json!({"action": "screenshot", "machine": format!("m{index}"), "path": path});
            let line = [request.to_string().into_bytes(), b"\n".to_vec()].concat();
            scope.spawn(move || {
                // The host reads no more, or closes the connection, long before this ends.
                client.flood(&line.repeat(16_000)).unwrap();
            });
        }
    });
    let after = served.host.resources().unwrap();
    assert!(after.resident_kib <= before.resident_kib + 128 * 1024, "{before:?}, {after:?}");
    assert_eq!(normal.ask(json!({"action": "version"})).unwrap()["success"], true);
}

#[test]
fn lock_is_kept_when_its_client_disconnects() {
    let served = served(1, "");
    let mut client = served.clients(1).remove(0);
    client.send(&json!({"action": "lock", "machine": "m0", "task_id": "t"})).unwrap();
    drop(client);
    let mut other = served.clients(1).remove(0);
    // No event shows when the host has read the request.
    wait_until("the machine is not locked", || other.machine("m0").unwrap()["locked"] == true);
    let answer = other.ask(json!({"action": "lock", "machine": "m0", "task_id": "other"})).unwrap();
    assert!(answer["reason"].as_str().unwrap().contains("locked by: t"), "{answer}");
}

const SEEDS: [&str; 8] = [
    r#"{"action": "restore_start", "machine": "m0", "id": 1}"#,
    r#"{"action": "lock", "machine": "m1", "task_id": "t", "pcap_path": "/tmp/none.pcap"}"#,
    r#"{"action": "unlock", "machine": "m1", "task_id": "t"}"#,
    r#"{"action": "acquire", "task_id": "t2", "platform": "linux", "tags": ["a"]}"#,
    r#"{"action": "reserve", "machine": "m2", "task_id": "t"}"#,
    r#"{"action": "list", "id": {"a": [1, 2.5, null]}}"#,
    r#"{"action": "disable_machine", "machine": "m1", "reason": "why"}"#,
    r#"{"action": "stop", "machine": "m0"}"#,
];

/// Returns one of the seeds with a few bytes changed, dropped or doubled, as one line.
fn mutated(rng: &mut Rng) -> Vec<u8> {
    let mut line = SEEDS[rng.index(SEEDS.len())].as_bytes().to_vec();
    for _ in 0..rng.index(4) {
        if line.is_empty() {
            break;
        }
        let at = rng.index(line.len());
        match rng.index(4) {
            0 => line[at] = u8::try_from(rng.index(256)).unwrap(),
            1 => drop(line.remove(at)),
            2 => line.truncate(at),
            _ => line.extend_from_within(at..),
        }
    }
    // A line feed would make two lines of it.
    line.retain(|byte| *byte != b'\n');
    line
}

/// Sends lines until one of them closes the connection, and returns their number. Each line gets one answer.
fn torment(client: &mut Client, rng: &mut Rng, most: usize) -> usize {
    for count in 1..=most {
        client.send_line(&mutated(rng)).unwrap();
        let answer = client.next_message().unwrap();
        assert!(answer["success"].is_boolean(), "{answer}");
        let closing = ["Missing action or machine name", "No such action", "Machinery manager is disabled"];
        if answer["reason"].as_str().is_some_and(|reason| closing.contains(&reason)) {
            assert!(client.wait_for_close_after_refusal());
            return count;
        }
    }
    most
}

fn lines(host: &RunningHost, rng: &mut Rng, count: usize) {
    let mut sent = 0;
    while sent < count {
        sent += torment(&mut host.client().unwrap(), rng, 100);
    }
}

#[test]
fn mutated_lines_are_answered_and_resources_do_not_grow() {
    let served = served(3, "");
    let seed = 0x9e37_79b9_7f4a_7c15;
    let mut rng = Rng(seed);
    lines(&served.host, &mut rng, 2_000);
    let before = served.host.resources().unwrap();
    lines(&served.host, &mut rng, 20_000);
    served.host.resources().unwrap().assert_no_growth_since(&before);
    let mut client = served.host.client().unwrap();
    for machine in ["m0", "m1", "m2"] {
        client.act("enable_machine", machine).unwrap();
        assert_served(&mut client, machine);
    }
    assert!(!served.host.log().contains("panicked"));
}
