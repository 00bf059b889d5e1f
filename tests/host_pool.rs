//! Allocation of machines: locks, reservations, acquire, and the order of restores.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use machinery_testkit::client::Client;
use machinery_testkit::host::RunningHost;
use machinery_testkit::scratch::ScratchCwd;
use rustix::process::{Signal, getuid};
use serde_json::{Value, json};

/// A host of double machines with its CWD; dropped in this order.
struct Served {
    host: RunningHost,
    cwd: ScratchCwd,
}

fn served(machines: &[(&str, &str)]) -> Served {
    let cwd = ScratchCwd::double(machines).unwrap();
    Served { host: RunningHost::start(&cwd).unwrap(), cwd }
}

impl Served {
    fn client(&self) -> Client {
        self.host.client().unwrap()
    }
}

fn success() -> Value {
    json!({"success": true})
}

fn failure(reason: &str) -> Value {
    json!({"success": false, "reason": reason})
}

fn lock(client: &mut Client, machine: &str, task: &str) -> Value {
    client.ask(json!({"action": "lock", "machine": machine, "task_id": task})).unwrap()
}

fn assert_reason(answer: &Value, part: &str) {
    let reason = answer["reason"].as_str().unwrap_or_else(|| panic!("{answer} is no failure"));
    assert!(reason.contains(part), "{reason}");
}

#[test]
fn lock_is_exclusive_until_it_is_released() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    let locked = lock(&mut client, "m", "t1");
    assert_eq!(locked["success"], true);
    assert_eq!(locked["machine"], client.machine("m").unwrap());
    assert_eq!((&locked["machine"]["locked"], &locked["machine"]["locked_by"]), (&json!(true), &json!("t1")));
    let taken = "Machine m is unavailable and cannot be locked. Machine is locked by: t1";
    assert_eq!(lock(&mut served.client(), "m", "t2"), failure(taken));
    // A client repeats a request whose answer was lost, so a repeated lock succeeds.
    assert_eq!(lock(&mut client, "m", "t1"), locked);
    let wrong = json!({"action": "unlock", "machine": "m", "task_id": "t2"});
    assert_reason(&client.ask(wrong).unwrap(), "Machine is locked by: t1");
    let unlock = json!({"action": "unlock", "machine": "m", "task_id": "t1"});
    assert_eq!(client.ask(unlock.clone()).unwrap(), success());
    assert_eq!(client.ask(unlock).unwrap(), failure("Cannot unlock machine m. Machine is not locked."));
    assert_eq!(lock(&mut client, "m", "t2")["success"], true);
    assert_eq!(client.act("unlock", "m").unwrap(), success());
}

#[test]
fn lock_is_refused_when_task_or_paths_are_invalid() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    let mut refused = |more: Value, part: &str| {
        let mut request = json!({"action": "lock", "machine": "m"});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_reason(&client.ask(request).unwrap(), part);
    };
    refused(json!({}), "Missing task_id");
    refused(json!({"task_id": ""}), "Missing task_id");
    refused(json!({"task_id": 7}), "'task_id' must be a text");
    refused(json!({"task_id": "x".repeat(300)}), "longer than 256");
    refused(json!({"task_id": "t", "pcap_path": "dump.pcap"}), "'pcap_path' must be an absolute path");
    refused(json!({"task_id": "t", "memory_dump_path": ["/x"]}), "'memory_dump_path' must be a text");
    assert_eq!(client.machine("m").unwrap()["locked"], false);
}

#[test]
fn reserved_machine_is_refused_to_other_tasks() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    let reserve = |task: &str| json!({"action": "reserve", "machine": "m", "task_id": task});
    assert_eq!(client.ask(reserve("t1")).unwrap(), success());
    assert_reason(&client.ask(reserve("t2")).unwrap(), "cannot be reserved. Machine is reserved by t1");
    let machine = client.machine("m").unwrap();
    assert_eq!((&machine["reserved"], &machine["reserved_by"]), (&json!(true), &json!("t1")));
    let taken = "Machine m is unavailable and cannot be locked. Machine is reserved by t1";
    assert_eq!(lock(&mut client, "m", "t2"), failure(taken));
    assert_eq!(lock(&mut client, "m", "t1")["success"], true);
    assert_eq!(client.act("unlock", "m").unwrap(), success());
    assert_eq!(client.act("unreserve", "m").unwrap(), success());
    assert_reason(&client.act("unreserve", "m").unwrap(), "Machine is not reserved");
    assert_eq!(lock(&mut client, "m", "t2")["success"], true);
}

#[test]
fn disabled_machine_cannot_be_locked() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    let disable = json!({"action": "disable_machine", "machine": "m", "reason": "its disk is full"});
    assert_eq!(client.ask(disable).unwrap(), success());
    let machine = client.machine("m").unwrap();
    assert_eq!(
        (&machine["disabled"], &machine["disabled_reason"]),
        (&json!(true), &json!("its disk is full"))
    );
    let taken =
        "Machine m is unavailable and cannot be locked. Machine is disabled. Reason: its disk is full";
    assert_eq!(lock(&mut client, "m", "t"), failure(taken));
    assert_eq!(client.act("enable_machine", "m").unwrap(), success());
    assert_eq!(lock(&mut client, "m", "t")["success"], true);
}

/// The machines of a lab.
const LAB: &str = "
interface: lo
machines:
  seven: {label: seven, ip: 10.0.0.1, platform: windows, os_version: 7, tags: [office]}
  ten: {label: ten, ip: 10.0.0.2, platform: windows, os_version: 10, tags: [office, dotnet]}
  eleven: {label: eleven, ip: 10.0.0.3, platform: windows, os_version: 11, architecture: arm64}
  deb: {label: deb, ip: 10.0.0.4, platform: linux, os_version: 12}
";

fn lab() -> Served {
    let cwd = ScratchCwd::new(&[("double", LAB)]).unwrap();
    Served { host: RunningHost::start(&cwd).unwrap(), cwd }
}

/// Returns the name of the acquired machine, or the reason of the failure.
fn acquire(client: &mut Client, task: &str, wanted: &Value) -> Result<String, String> {
    let mut request = json!({"action": "acquire", "task_id": task});
    request.as_object_mut().unwrap().extend(wanted.as_object().unwrap().clone());
    let answer = client.ask(request).unwrap();
    match answer["machine"]["name"].as_str() {
        Some(name) => {
            assert_eq!((&answer["success"], &answer["machine"]["locked_by"]), (&json!(true), &json!(task)));
            Ok(name.to_owned())
        }
        None => Err(answer["reason"].as_str().unwrap().to_owned()),
    }
}

#[test]
fn acquire_returns_the_first_available_match() {
    for (wanted, expected) in [
        (json!({}), "seven"),
        (json!({"name": "", "platform": null, "tags": null}), "seven"),
        (json!({"platform": "windows"}), "seven"),
        (json!({"platform": "linux"}), "deb"),
        (json!({"platform": "windows", "os_version": "10"}), "ten"),
        (json!({"os_version": "10"}), "seven"),
        (json!({"architecture": "arm64"}), "eleven"),
        (json!({"tags": ["dotnet"]}), "ten"),
        (json!({"platform": "windows", "tags": ["office", "dotnet"]}), "ten"),
        (json!({"name": "deb", "platform": "windows", "tags": ["none"]}), "deb"),
    ] {
        let served = lab();
        assert_eq!(acquire(&mut served.client(), "t", &wanted).as_deref(), Ok(expected), "{wanted}");
    }
}

#[test]
fn acquire_fails_when_all_matches_are_locked() {
    let served = lab();
    let mut client = served.client();
    let wanted = json!({"platform": "windows"});
    client.ask(json!({"action": "disable_machine", "machine": "ten"})).unwrap();
    let mut next = |task: &str| acquire(&mut client, task, &wanted);
    assert_eq!(next("t1").as_deref(), Ok("seven"));
    assert_eq!(next("t2").as_deref(), Ok("eleven"));
    assert!(next("t3").unwrap_err().starts_with("No machine is available"));
    assert_eq!(served.client().act("unlock", "seven").unwrap(), success());
    assert_eq!(next("t3").as_deref(), Ok("seven"));
}

#[test]
fn acquire_gives_distinct_reasons_when_it_fails() {
    let served = lab();
    let mut client = served.client();
    let mut refused = |wanted: Value| acquire(&mut client, "t2", &wanted).unwrap_err();
    assert_eq!(refused(json!({"name": "xp"})), "Machine with name xp does not exist");
    assert!(refused(json!({"platform": "macos"})).starts_with("No machine is as wanted"));
    assert_eq!(refused(json!({"tags": "office"})), "'tags' must be a list of texts");
    assert_eq!(refused(json!({"os_version": 10})), "'os_version' must be a text");
    lock(&mut served.client(), "deb", "t1");
    let taken = "Machine deb is unavailable and cannot be locked. Machine is locked by: t1";
    assert_eq!(refused(json!({"name": "deb"})), taken);
    assert_eq!(served.client().ask(json!({"action": "acquire"})).unwrap()["success"], false);
}

#[test]
fn acquire_prefers_the_locked_then_the_reserved_machine_of_a_task() {
    let served = lab();
    let mut client = served.client();
    lock(&mut client, "seven", "other");
    let mut next = |task: &str| acquire(&mut client, task, &json!({"platform": "windows"}));
    assert_eq!(next("t").as_deref(), Ok("ten"));
    assert_eq!(served.client().act("unlock", "seven").unwrap(), success());
    assert_eq!(next("t").as_deref(), Ok("ten"));
    let reserve = json!({"action": "reserve", "machine": "eleven", "task_id": "t2"});
    assert_eq!(served.client().ask(reserve).unwrap(), success());
    assert_eq!(next("t2").as_deref(), Ok("eleven"));
}

#[test]
fn lock_is_refused_when_another_lock_has_its_pcap_path() {
    let served = lab();
    let mut client = served.client();
    let lock = |machine: &str, task: &str| json!({"action": "lock", "machine": machine, "task_id": task, "pcap_path": "/tmp/none.pcap"});
    assert_eq!(client.ask(lock("ten", "t1")).unwrap()["success"], true);
    assert_reason(&client.ask(lock("seven", "t2")).unwrap(), "Machine ten is locked with the same pcap_path");
    client.act("unlock", "ten").unwrap();
    assert_eq!(client.ask(lock("seven", "t2")).unwrap()["success"], true);
}

#[test]
fn shutdown_all_stops_a_machine_when_its_start_was_just_requested() {
    let served = served(&[("m", "")]);
    for round in 0..30 {
        let mut client = served.client();
        let start = json!({"action": "restore_start", "machine": "m", "id": "start"});
        let both = format!("{start}\n{}\n", json!({"action": "shutdown_all", "id": "all"}));
        client.send_bytes(both.as_bytes()).unwrap();
        for _ in 0..2 {
            client.next_message().unwrap();
        }
        assert_eq!(client.machine("m").unwrap()["state"], "poweroff", "{round}");
    }
}

#[test]
fn acquire_gives_distinct_machines_to_concurrent_clients() {
    let names: Vec<String> = (0..20).map(|index| format!("m{index}")).collect();
    let machines: Vec<_> = names.iter().map(|name| (name.as_str(), "")).collect();
    let served = served(&machines);
    let mut got: Vec<String> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..40)
            .map(|task| {
                let mut client = served.client();
                scope.spawn(move || acquire(&mut client, &format!("t{task}"), &json!({})).ok())
            })
            .collect();
        clients.into_iter().filter_map(|client| client.join().unwrap()).collect()
    });
    got.sort();
    let mut expected = names;
    expected.sort();
    assert_eq!(got, expected);
}

#[test]
fn subscribers_receive_lock_and_availability_events() {
    let served = served(&[("m", "")]);
    let mut subscriber = served.client();
    subscriber.subscribe().unwrap();
    let mut client = served.client();
    client.ask(json!({"action": "reserve", "machine": "m", "task_id": "t"})).unwrap();
    lock(&mut client, "m", "t");
    client.act("unlock", "m").unwrap();
    client.act("unreserve", "m").unwrap();
    client.ask(json!({"action": "disable_machine", "machine": "m", "reason": "why"})).unwrap();
    client.act("enable_machine", "m").unwrap();
    for expected in [
        json!({"event": "reserved", "machine": "m", "task_id": "t"}),
        json!({"event": "locked", "machine": "m", "task_id": "t", "uid": getuid().as_raw()}),
        json!({"event": "unlocked", "machine": "m"}),
        json!({"event": "unreserved", "machine": "m"}),
        json!({"event": "disabled", "machine": "m", "reason": "why"}),
        json!({"event": "enabled", "machine": "m"}),
    ] {
        assert_eq!(subscriber.next_message().unwrap(), expected);
    }
}

#[test]
fn release_works_and_lock_is_refused_when_the_manager_is_disabled() {
    let served = served(&[("m", ""), ("other", "")]);
    let mut client = served.client();
    lock(&mut client, "m", "t");
    client.ask(json!({"action": "reserve", "machine": "other", "task_id": "t"})).unwrap();
    client.ask(json!({"action": "disable"})).unwrap();
    let disabled = failure("Machinery manager is disabled");
    for request in [
        json!({"action": "lock", "machine": "other", "task_id": "t"}),
        json!({"action": "reserve", "machine": "other", "task_id": "t"}),
        json!({"action": "acquire", "task_id": "t"}),
    ] {
        let mut client = served.client();
        assert_eq!(client.ask(request.clone()).unwrap(), disabled, "{request}");
        assert!(client.wait_for_close_after_refusal(), "{request}");
    }
    assert_eq!(client.act("unlock", "m").unwrap(), success());
    assert_eq!(client.act("unreserve", "other").unwrap(), success());
    assert_eq!(client.ask(json!({"action": "wait_idle"})).unwrap(), success());
    client.ask(json!({"action": "enable"})).unwrap();
    assert_eq!(lock(&mut client, "m", "t2")["success"], true);
}

#[test]
fn wait_idle_returns_when_no_action_runs_or_is_queued() {
    let served = served(&[("m", "delays_ms: {restore_start: 300, stop: 300}"), ("other", "")]);
    let mut client = served.client();
    assert_eq!(client.ask(json!({"action": "wait_idle"})).unwrap(), success());
    for (id, action) in ["restore_start", "stop", "wait_idle"].iter().enumerate() {
        client.send(&json!({"action": action, "machine": "m", "id": id})).unwrap();
    }
    for id in 0..3 {
        assert_eq!(client.next_message().unwrap(), json!({"success": true, "id": id}));
    }
}

#[test]
fn dump_memory_uses_the_path_of_the_lock_when_none_is_given() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    let path = served.cwd.root().join("memory.dmp");
    client.act("restore_start", "m").unwrap();
    assert_reason(&client.act("dump_memory", "m").unwrap(), "Missing path");
    client.ask(json!({"action": "lock", "machine": "m", "task_id": "t", "memory_dump_path": path})).unwrap();
    assert_eq!(client.act("dump_memory", "m").unwrap(), success());
    assert!(path.is_file());
}

/// Returns the names of the machines that start, in their order.
fn beginnings(subscriber: &mut Client, count: usize) -> Vec<String> {
    let mut begun = Vec::new();
    let mut starting = 0;
    while begun.len() < count {
        let event = subscriber.next_message().unwrap();
        match event["state"].as_str() {
            Some("starting") => starting += 1,
            Some("running") => {
                begun.push(event["machine"].as_str().unwrap().to_owned());
                starting -= 1;
            }
            _ => {}
        }
        assert!(starting <= 1, "two at a time: {event}");
    }
    begun
}

#[test]
fn restores_get_permits_in_the_order_of_their_requests() {
    let names = ["a", "b", "c", "d"];
    let cwd = ScratchCwd::double(&names.map(|name| (name, "delays_ms: {restore_start: 150}"))).unwrap();
    cwd.host_yaml("max_parallel_restores: 1\n").unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut subscriber = host.client().unwrap();
    subscriber.subscribe().unwrap();
    let mut client = host.client().unwrap();
    client.send(&json!({"action": "restore_start", "machine": "a"})).unwrap();
    let first = subscriber.next_message().unwrap();
    assert_eq!((&first["machine"], &first["state"]), (&json!("a"), &json!("starting")));
    for name in &names[1..] {
        client.send(&json!({"action": "restore_start", "machine": name})).unwrap();
    }
    assert_eq!(client.next_message().unwrap(), success());
    // All others wait by now. A later request is queued behind them.
    client.send(&json!({"action": "restore_start", "machine": "a", "id": "again"})).unwrap();
    while client.next_message().unwrap().get("id").is_none() {}
    client.ask(json!({"action": "shutdown_all"})).unwrap();
    // The first `starting` event was received above.
    let mut heard = vec![subscriber.wait_for_state("a", "running").map(|_| "a".to_owned()).unwrap()];
    heard.extend(beginnings(&mut subscriber, 4));
    assert_eq!((heard.first(), heard.last()), (Some(&"a".to_owned()), Some(&"a".to_owned())), "{heard:?}");
    heard.sort();
    assert_eq!(heard, ["a", "a", "b", "c", "d"]);
}

#[test]
fn queued_restore_is_refused_when_the_host_shuts_down() {
    let cwd = ScratchCwd::double(&[("a", "delays_ms: {restore_start: 500}"), ("b", "")]).unwrap();
    cwd.host_yaml("max_parallel_restores: 1\n").unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut subscriber = host.client().unwrap();
    subscriber.subscribe().unwrap();
    let mut client = host.client().unwrap();
    client.send(&json!({"action": "restore_start", "machine": "a", "id": "a"})).unwrap();
    subscriber.wait_for_state("a", "starting").unwrap();
    client.send(&json!({"action": "restore_start", "machine": "b", "id": "b"})).unwrap();
    // The same reader answers this request, so the host has read the one before.
    client.send(&json!({"action": "version", "id": "read"})).unwrap();
    assert_eq!(client.next_message().unwrap()["id"], "read");
    let mut late = host.client().unwrap();
    late.ask(json!({"action": "version"})).unwrap();
    host.signal(Signal::TERM).unwrap();
    host.wait_for_notification("STOPPING=1").unwrap();
    assert_reason(&lock(&mut late, "b", "t"), "shutting down");
    assert!(host.wait().unwrap().success());
    let mut answers: Vec<Value> = (0..2).map(|_| client.next_message().unwrap()).collect();
    answers.sort_by_key(|answer| answer["id"].to_string());
    assert_eq!(answers[0], json!({"success": true, "id": "a"}));
    assert_reason(&answers[1], "shutting down");
}
