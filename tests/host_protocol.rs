//! The socket protocol, message by message, over the socket of a running host.
//!
//! Messages that Cuckoo's clients read are compared whole: an additional key is a failure.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery_testkit::client::{self, Client};
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::scratch::ScratchCwd;
use serde_json::{Value, json};

const ACTIONS: [&str; 4] = ["restore_start", "norestore_start", "stop", "acpi_stop"];

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

fn subscribed(served: &Served) -> Client {
    let mut client = served.client();
    assert_eq!(client.ask(json!({"action": "subscribe"})).unwrap(), success());
    client
}

/// Waits for the state event of a machine.
fn hear_state(subscriber: &mut Client, machine: &str, state: &str) {
    let reported = json!({"event": "state", "machine": machine, "state": state});
    while subscriber.next_message().unwrap() != reported {}
}

/// Asserts that the connection is open.
fn assert_open(client: &mut Client) {
    assert_eq!(client.ask(json!({"action": "version"})).unwrap()["success"], true);
}

#[test]
fn cuckoos_actions_answer_only_success_when_they_succeed() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    for action in ["restore_start", "stop", "norestore_start", "acpi_stop"] {
        client.send(&json!({"action": action, "machine": "m"})).unwrap();
        assert_eq!(client.next_line().unwrap(), r#"{"success":true}"#, "{action}");
    }
}

#[test]
fn failed_action_answers_only_success_and_reason() {
    let served = served(&[("m", "faults: {restore_start: fail}")]);
    let mut client = served.client();
    client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
    assert_eq!(
        client.next_message().unwrap(),
        failure("restore_start of machine 'm' failed: configured to fail")
    );
}

#[test]
fn connection_closes_when_action_or_machine_is_missing() {
    let served = served(&[("m", "")]);
    for request in [
        json!({}),
        json!({"action": "stop"}),
        json!({"machine": "m"}),
        json!({"action": "", "machine": "m"}),
        json!({"action": "stop", "machine": ""}),
        json!({"action": null, "machine": "m"}),
        json!({"action": "stop", "machine": 7}),
    ] {
        let mut client = served.client();
        client.send(&request).unwrap();
        assert_eq!(client.next_message().unwrap(), failure("Missing action or machine name"), "{request}");
        assert!(client.wait_for_close_after_refusal(), "{request}");
    }
}

#[test]
fn connection_closes_when_the_action_is_unknown() {
    let served = served(&[("m", "")]);
    for action in ["explode", "Restore_Start", "restore-start", "stop "] {
        let mut client = served.client();
        client.send(&json!({"action": action, "machine": "m"})).unwrap();
        assert_eq!(client.next_message().unwrap(), failure("No such action"), "{action}");
        assert!(client.wait_for_close_after_refusal(), "{action}");
    }
}

#[test]
fn connection_stays_open_when_the_machine_is_unknown() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    for action in ACTIONS {
        let answer = client.act(action, "ghost").unwrap();
        assert_eq!(answer["success"], false);
        assert!(answer["reason"].as_str().unwrap().contains("ghost"), "{answer}");
    }
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
}

#[test]
fn action_runs_when_its_client_disconnects() {
    let served = served(&[("m", "delays_ms: {restore_start: 100}")]);
    let mut subscriber = subscribed(&served);
    let mut hasty = served.client();
    hasty.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
    drop(hasty);
    hear_state(&mut subscriber, "m", "running");
}

#[test]
fn answers_arrive_when_the_client_has_shut_down_its_write_side() {
    let served = served(&[("m", "delays_ms: {restore_start: 100}")]);
    let mut client = served.client();
    client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
    client.shutdown_write().unwrap();
    assert_eq!(client.next_message().unwrap(), success());
    assert!(client.wait_for_close());
}

#[test]
fn stop_is_accepted_when_the_manager_is_disabled() {
    let served = served(&[("m", "")]);
    let mut operator = served.client();
    assert_eq!(operator.act("restore_start", "m").unwrap(), success());
    assert_eq!(operator.ask(json!({"action": "disable"})).unwrap(), success());
    for action in ["restore_start", "norestore_start", "acpi_stop", "dump_memory", "screenshot"] {
        let answer = served.client().act(action, "m").unwrap();
        assert_eq!(answer, failure("Machinery manager is disabled"), "{action}");
    }
    assert_eq!(served.client().act("stop", "m").unwrap(), success());
    assert_eq!(operator.ask(json!({"action": "enable"})).unwrap(), success());
    assert_eq!(operator.act("restore_start", "m").unwrap(), success());
}

#[test]
fn fast_machine_answers_first_when_another_is_slow() {
    let served = served(&[("slow", "delays_ms: {restore_start: 1000}"), ("fast", "")]);
    let mut client = served.client();
    for machine in ["slow", "fast"] {
        client.send(&json!({"action": "restore_start", "machine": machine, "id": machine})).unwrap();
    }
    let mut answered = || client.next_message().unwrap()["id"].clone();
    assert_eq!([answered(), answered()], ["fast", "slow"]);
}

#[test]
fn id_is_returned_unchanged() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    for id in [json!("a"), json!(7), json!(-1.5), json!([1, {"x": null}]), json!({"k": "v"}), json!(false)] {
        client.send(&json!({"action": "stop", "machine": "m", "id": id})).unwrap();
        assert_eq!(client.next_message().unwrap(), json!({"success": true, "id": id}));
        client.send(&json!({"action": "stop", "machine": "ghost", "id": id})).unwrap();
        assert_eq!(client.next_message().unwrap()["id"], id);
    }
    client.send(&json!({"action": "explode", "machine": "m", "id": "last"})).unwrap();
    assert_eq!(
        client.next_message().unwrap(),
        json!({"success": false, "reason": "No such action", "id": "last"})
    );
}

#[test]
fn actions_of_one_machine_run_in_request_order() {
    let served = served(&[("m", "delays_ms: {restore_start: 20, stop: 1}")]);
    let mut subscriber = subscribed(&served);
    let mut client = served.client();
    // A start that overtook its stop would stop the machine once more.
    for (id, action) in ["restore_start", "stop"].iter().cycle().take(20).enumerate() {
        client.send(&json!({"action": action, "machine": "m", "id": id})).unwrap();
    }
    for id in 0..20 {
        assert_eq!(client.next_message().unwrap(), json!({"success": true, "id": id}));
    }
    for state in ["starting", "running", "stopping", "poweroff"].iter().cycle().take(40) {
        let reported = json!({"event": "state", "machine": "m", "state": state});
        assert_eq!(subscriber.next_message().unwrap(), reported);
    }
}

#[test]
fn list_has_all_keys_that_cuckoo_reads() {
    let served =
        served(&[("full", "tags: [dotnet, 7], mac_address: AA:BB:CC:DD:EE:FF, interface: br1"), ("m", "")]);
    let mut client = served.client();
    let list = client.ask(json!({"action": "list"})).unwrap();
    assert_eq!(list["success"], true);
    let names: Vec<_> = list["machines"].as_array().unwrap().iter().map(|machine| &machine["name"]).collect();
    assert_eq!(names, ["full", "m"]);
    let full = json!({
        "name": "full", "label": "full-label", "ip": "10.0.0.1", "platform": "linux", "os_version": "12",
        "tags": ["dotnet", "7"], "snapshot": "1000", "architecture": "amd64", "interface": "br1",
        "agent_port": 8000, "mac_address": "aa:bb:cc:dd:ee:ff", "jail": null, "clone_of": null, "console": null, "machinery_name": "double",
        "state": "poweroff", "locked": false, "locked_by": "", "reserved": false, "reserved_by": "",
        "disabled": false, "disabled_reason": "", "quarantine": null, "locked_since": null, "locked_uid": null,
        "running_since": null,
        "errors": [], "run_errors": [], "run_lost": false, "ready": null, "change_pending": false, "outdated": false, "warnings": [],
    });
    assert_eq!(list["machines"][0], full);
    let plain = &list["machines"][1];
    assert_eq!((&plain["interface"], &plain["mac_address"]), (&json!("lo"), &json!(null)));
}

#[test]
fn list_shows_state_and_errors_when_they_change() {
    let served = served(&[("m", ""), ("bad", "faults: {restore_start: fail}")]);
    let mut client = served.client();
    client.act("restore_start", "m").unwrap();
    let reason = client.act("restore_start", "bad").unwrap()["reason"].clone();
    assert_eq!(client.machine("m").unwrap()["state"], "running");
    let machine = client.machine("bad").unwrap();
    assert_eq!(machine["disabled"], true);
    assert_eq!(machine["disabled_reason"], reason);
    assert_eq!(machine["errors"], json!([reason]));
}

#[test]
fn state_is_answered_when_an_action_runs() {
    let served = served(&[("m", "delays_ms: {restore_start: 1000}")]);
    let mut subscriber = subscribed(&served);
    let mut client = served.client();
    let mut state = || client.act("state", "m").unwrap();
    assert_eq!(state(), json!({"success": true, "state": "poweroff"}));
    let mut starter = served.client();
    starter.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
    hear_state(&mut subscriber, "m", "starting");
    assert_eq!(state(), json!({"success": true, "state": "starting"}));
    assert_eq!(starter.next_message().unwrap(), success());
    assert_eq!(state(), json!({"success": true, "state": "running"}));
    let unknown = client.act("state", "ghost").unwrap();
    assert!(unknown["reason"].as_str().unwrap().contains("ghost"), "{unknown}");
}

#[test]
fn subscribers_receive_state_progress_disabled_and_quarantined_events() {
    let served = served(&[("m", ""), ("bad", "faults: {dump_memory: panic}")]);
    let mut subscriber = subscribed(&served);
    let mut client = served.client();
    let mut hear = || subscriber.next_message().unwrap();
    let state = |machine: &str, state: &str| json!({"event": "state", "machine": machine, "state": state});
    client.act("restore_start", "m").unwrap();
    assert_eq!([hear(), hear()], [state("m", "starting"), state("m", "running")]);

    let path = served.cwd.root().join("memory");
    client.ask(json!({"action": "dump_memory", "machine": "m", "path": path})).unwrap();
    let progress = |fraction: f64| json!({"event": "progress", "machine": "m", "fraction": fraction});
    assert_eq!([hear(), hear()], [progress(0.5), progress(1.0)]);

    let answer = client.ask(json!({"action": "dump_memory", "machine": "bad", "path": path})).unwrap();
    let disabled = json!({"event": "disabled", "machine": "bad", "reason": answer["reason"]});
    assert_eq!(hear(), disabled);
    let quarantined = json!({
        "event": "quarantined", "machine": "bad", "reason": answer["reason"], "tries": 0, "next_try_in": 5,
    });
    assert_eq!(hear(), quarantined);
    client.act("enable_machine", "bad").unwrap();
    assert_eq!(hear(), json!({"event": "enabled", "machine": "bad"}));
}

#[test]
fn second_subscribe_is_refused_and_events_are_not_duplicated() {
    let served = served(&[("m", "")]);
    let mut client = subscribed(&served);
    assert_eq!(client.ask(json!({"action": "subscribe"})).unwrap()["success"], false);
    client.act("restore_start", "m").unwrap();
    client.act("stop", "m").unwrap();
    let reported: Vec<_> = (0..4).map(|_| client.next_message().unwrap()["state"].clone()).collect();
    assert_eq!(reported, ["starting", "running", "stopping", "poweroff"]);
}

#[test]
fn descriptors_are_closed_when_subscribers_disconnect() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    assert_open(&mut client);
    let before = open_files(&served.host);
    for _ in 0..50 {
        drop(subscribed(&served));
    }
    // Some clients have shut down their write side long before.
    let mut silent: Vec<_> = (0..50).map(|_| subscribed(&served)).collect();
    silent.iter_mut().for_each(|subscriber| subscriber.shutdown_write().unwrap());
    (0..100).for_each(|_| assert_open(&mut client));
    drop(silent);
    // No event shows when the host has noticed, so the test allows the time of many requests.
    let noticed = (0..5000).any(|_| {
        assert_open(&mut client);
        open_files(&served.host) <= before
    });
    let now = open_files(&served.host);
    assert!(noticed, "{before} files were open, and with all subscribers gone {now} are");
}

#[test]
fn version_lists_host_interface_and_machineries() {
    let served = served(&[("m", "")]);
    let version = served.client().ask(json!({"action": "version"})).unwrap();
    assert_eq!(version["success"], true);
    assert!(version["version"].is_string() && version["interface"].is_string(), "{version}");
    assert!(version["machineries"]["double"].as_str().unwrap().starts_with("memory"), "{version}");
}

#[test]
fn shutdown_all_stops_all_machines() {
    let served = served(&[("a", ""), ("b", ""), ("off", ""), ("c", "delays_ms: {restore_start: 300}")]);
    let mut subscriber = subscribed(&served);
    let mut client = served.client();
    client.act("restore_start", "a").unwrap();
    client.act("norestore_start", "b").unwrap();
    // One machine is still starting.
    client.send(&json!({"action": "restore_start", "machine": "c", "id": "c"})).unwrap();
    hear_state(&mut subscriber, "c", "starting");
    assert_eq!(client.ask(json!({"action": "shutdown_all"})).unwrap(), success());
    for machine in ["a", "b", "off", "c"] {
        assert_eq!(client.act("state", machine).unwrap()["state"], "poweroff", "{machine}");
    }
}

#[test]
fn shutdown_all_stops_other_machines_when_one_fails() {
    let served = served(&[("a", ""), ("stubborn", "faults: {stop: fail}")]);
    let mut client = served.client();
    client.act("restore_start", "a").unwrap();
    client.act("restore_start", "stubborn").unwrap();
    let answer = client.ask(json!({"action": "shutdown_all"})).unwrap();
    assert_eq!(answer["success"], false);
    assert!(answer["reason"].as_str().unwrap().contains("stubborn"), "{answer}");
    assert_eq!(client.act("state", "a").unwrap()["state"], "poweroff");
}

#[test]
fn enable_machine_makes_a_disabled_machine_usable() {
    let served = served(&[("m", "faults: {restore_start: fail}, fault_times: 1")]);
    let mut client = served.client();
    assert_eq!(client.act("restore_start", "m").unwrap()["success"], false);
    assert_eq!(client.machine("m").unwrap()["disabled"], true);
    assert_eq!(client.act("enable_machine", "m").unwrap(), success());
    let machine = client.machine("m").unwrap();
    assert_eq!((&machine["disabled"], &machine["disabled_reason"]), (&json!(false), &json!("")));
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    assert!(client.act("enable_machine", "ghost").unwrap()["reason"].as_str().unwrap().contains("ghost"));
}

fn write_to(client: &mut Client, action: &str, path: impl AsRef<Path>) -> Value {
    client.ask(json!({"action": action, "machine": "m", "path": path.as_ref()})).unwrap()
}

#[test]
fn dump_and_screenshot_are_written_to_the_requested_path() {
    let served = served(&[("m", "snapshot: 5000")]);
    let mut client = served.client();
    let [memory, screen] = ["memory dump", "screen.png"].map(|name| served.cwd.root().join(name));
    client.act("restore_start", "m").unwrap();
    assert_eq!(write_to(&mut client, "dump_memory", &memory), success());
    assert_eq!(write_to(&mut client, "screenshot", &screen), success());
    let memory = fs::read(&memory).unwrap();
    assert!(memory.starts_with(b"\x7fELF"));
    assert!(String::from_utf8_lossy(&memory).contains("counter 50"));
    assert!(fs::read(&screen).unwrap().starts_with(b"\x89PNG"));
    assert_eq!(client.act("state", "m").unwrap()["state"], "running");
}

#[test]
fn machine_stays_enabled_when_a_dump_cannot_be_written() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    let nowhere: PathBuf = served.cwd.root().join("no/such/folder/file");
    let fails = |answer: Value, why: &str| {
        assert_eq!(answer["success"], false, "{answer}");
        assert!(answer["reason"].as_str().unwrap().contains(why), "{why}: {answer}");
    };
    for action in ["dump_memory", "screenshot"] {
        fails(write_to(&mut client, action, &nowhere), "powered off");
    }
    client.act("restore_start", "m").unwrap();
    for action in ["dump_memory", "screenshot"] {
        fails(client.act(action, "m").unwrap(), "path");
        fails(write_to(&mut client, action, "relative/file"), "path");
        fails(write_to(&mut client, action, &nowhere), "no/such/folder");
    }
    let mut dump = json!({"action": "dump_memory", "machine": "m", "path": served.cwd.root().join("x")});
    dump["format"] = json!("tarball");
    fails(client.ask(dump.clone()).unwrap(), "tarball");
    dump["format"] = json!("win-dmp");
    fails(client.ask(dump).unwrap(), "win-dmp");
    assert_eq!(client.machine("m").unwrap()["disabled"], false);
    assert_eq!(client.act("state", "m").unwrap()["state"], "running");
}

#[test]
fn invalid_line_is_answered_with_an_error() {
    let served = served(&[("m", "")]);
    let mut other = served.client();
    let mut client = served.client();
    let deep = "[".repeat(100_000);
    let lines: [&[u8]; 9] =
        [b"", b"nonsense", b"{\"action\":", b"[1]", b"7", b"\0", b"\xff\xfe", b"\r", deep.as_bytes()];
    for line in lines {
        client.send_line(line).unwrap();
        let answer = client.next_message().unwrap();
        assert_eq!(answer["success"], false, "{line:?}");
        assert!(answer["reason"].as_str().unwrap().contains("JSON"), "{line:?}: {answer}");
    }
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    assert_open(&mut other);
}

#[test]
fn line_is_refused_when_it_exceeds_one_mebibyte() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    let mut request = json!({"action": "stop", "machine": "m", "pad": ""});
    let short = request.to_string().len();
    request["pad"] = json!("x".repeat(1024 * 1024 - short));
    client.send(&request).unwrap();
    assert_eq!(client.next_message().unwrap(), success());

    // The host may close the connection before it has read everything.
    let _ = client.send_bytes(&vec![b' '; 2 * 1024 * 1024]);
    let answer = client.next_message().unwrap();
    assert_eq!(answer["success"], false);
    assert!(answer["reason"].as_str().unwrap().contains("1048576"), "{answer}");
    assert!(client.wait_for_close());
    assert_open(&mut served.client());
}

#[test]
fn incomplete_line_is_ignored_when_the_client_disconnects() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    client.send_bytes(br#"{"action": "restore_start", "machine": "m"}"#).unwrap();
    client.shutdown_write().unwrap();
    assert!(client.wait_for_close());
    assert_eq!(served.client().act("state", "m").unwrap()["state"], "poweroff");
}

#[test]
fn requests_are_parsed_when_split_or_joined() {
    let served = served(&[("m", "")]);
    let mut client = served.client();
    for byte in b"{\"action\":\"restore_start\",\"machine\":\"m\"}\n" {
        client.send_bytes(&[*byte]).unwrap();
    }
    assert_eq!(client.next_message().unwrap(), success());
    let stop = "{\"action\":\"stop\",\"machine\":\"m\"}\n";
    client.send_bytes(stop.repeat(3).as_bytes()).unwrap();
    for _ in 0..3 {
        assert_eq!(client.next_message().unwrap(), success());
    }
}

#[test]
fn host_memory_is_bounded_when_a_client_never_reads() {
    let served = served(&[("m", "")]);
    let resident = || number(&format!("/proc/{}/status", served.host.pid()), "VmRSS:");
    let before = resident();
    let mut unread = UnixStream::connect(served.cwd.socket()).unwrap();
    unread.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    // Until the host's queue is full.
    let full = loop {
        if let Err(error) = unread.write_all(b"{\"action\": \"list\"}\n") {
            break error;
        }
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    let mut client = served.client();
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    assert!(resident() < before + 50_000, "{before} kB before, {} kB now", resident());
}

#[test]
fn actions_are_not_delayed_when_a_subscriber_never_reads() {
    let served = served(&[("m", "")]);
    let _unread = subscribed(&served);
    let mut client = served.client();
    for round in 0..2000 {
        for action in ["restore_start", "stop"] {
            client.send(&json!({"action": action, "machine": "m"})).unwrap();
            assert_eq!(client.next_message().unwrap(), success(), "round {round}");
        }
    }
}

#[test]
fn host_serves_other_processes_when_one_floods_it_with_connections() {
    let served = served(&[("m", "")]);
    client::raise_file_limit().unwrap();
    let mut mine: Vec<_> = (0..600).map(|_| served.client()).collect();
    // Connections beyond the limit of one process are closed; the others stay open.
    let refused = mine.last_mut().unwrap();
    let reported = refused.next_message().unwrap();
    assert!(reported["reason"].as_str().unwrap().contains("too many connections"), "{reported}");
    assert!(refused.wait_for_close_after_refusal());
    assert_open(&mut mine[0]);
    let listed = host::run(&served.cwd, &["list", "--json"]).unwrap();
    assert_eq!(listed.code, Some(0), "{listed:?}");
    // A closed connection frees its permit. No event shows when the host has noticed.
    drop(mine);
    let again = (0..10_000).any(|_| served.client().ask(json!({"action": "version"})).is_ok());
    assert!(again);
}

#[test]
fn connections_count_against_the_limit_until_their_answers_are_sent() {
    let served = served(&[("m", "delays_ms: {restore_start: 5000}")]);
    client::raise_file_limit().unwrap();
    let mut mine: Vec<_> = (0..600).map(|_| served.client()).collect();
    for client in &mut mine {
        // Connections beyond the limit may be closed already.
        let _ = client.send(&json!({"action": "restore_start", "machine": "m"}));
        let _ = client.shutdown_write();
    }
    mine.extend((0..600).map(|_| served.client()));
    // The host accepts connections in order, so it has seen all of these.
    let listed = host::run(&served.cwd, &["list", "--json"]).unwrap();
    assert_eq!(listed.code, Some(0), "{listed:?}");
    let open = open_files(&served.host);
    assert!(open < 560, "one process made the host open {open} files");
}

#[test]
fn socket_is_accessible_to_its_user_only() {
    let served = served(&[("m", "")]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&served.cwd.socket()), 0o600);
    // The users of machines reach their files below it, and see no list of them.
    assert_eq!(mode(&served.cwd.root().join("operational/generated/machinery-host")), 0o711);
}

fn open_files(host: &RunningHost) -> usize {
    fs::read_dir(format!("/proc/{}/fd", host.pid())).unwrap().count()
}

/// Returns the number after `word` in a file of `/proc`.
fn number(path: &str, word: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap();
    let rest = text.lines().find_map(|line| line.strip_prefix(word)).unwrap();
    rest.split_whitespace().next().unwrap().parse().unwrap()
}
