//! Faults of a plugin that no plugin should have. The misbehaving machinery is configured with them; the
//! double machinery beside it must stay usable.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fmt::Write;
use std::time::{Duration, Instant};

use machinery_testkit::client::Client;
use machinery_testkit::host::{self, CommandOutput, RunningHost};
use machinery_testkit::scratch::{ScratchCwd, double};
use serde_json::{Value, json};

/// Short timeouts keep the tests short. A machine that has failed is left as it is; `host_heal.rs` is about the rest.
const LIMITS: &str = "heal: off\ntimeouts: {restore_start: 1, norestore_start: 1, stop: 1, acpi_stop: 1, \
                      dump_memory: 1, screenshot: 1, prepare: 1, state: 1, shutdown: 1, reload: 1, load: 20}\n";

/// The methods that a client can request for a machine; true if the machine has to run.
const METHODS: [(&str, bool); 8] = [
    ("state", false),
    ("restore_start", false),
    ("norestore_start", false),
    ("prepare", false),
    ("stop", true),
    ("acpi_stop", true),
    ("dump_memory", true),
    ("screenshot", true),
];

/// Returns the text of `misbehaving.yaml`, with keys of the machinery and of its machines.
fn misbehaving(keys: &str, machines: &[(&str, &str)]) -> String {
    let mut text = format!("{keys}\nmachines:\n");
    for (index, (name, keys)) in machines.iter().enumerate() {
        let comma = if keys.is_empty() { "" } else { ", " };
        writeln!(text, "  {name}: {{ip: 10.9.0.{index}, platform: linux, os_version: 1{comma}{keys}}}")
            .unwrap();
    }
    text
}

/// Creates a CWD of the misbehaving machinery, and of the double with the machine `fine`.
fn cwd(misbehaving: &str) -> ScratchCwd {
    ScratchCwd::new(&[("double", &double(&[("fine", "")])), ("misbehaving", misbehaving)]).unwrap()
}

/// A host with its CWD; dropped in this order.
struct Served {
    host: RunningHost,
    cwd: ScratchCwd,
}

/// Starts a host with short timeouts.
fn serve(misbehaving: &str) -> Served {
    let cwd = cwd(misbehaving);
    cwd.host_yaml(LIMITS).unwrap();
    Served { host: RunningHost::start(&cwd).unwrap(), cwd }
}

/// Starts a host with default timeouts.
fn serve_patiently(misbehaving: &str) -> Served {
    let cwd = cwd(misbehaving);
    Served { host: RunningHost::start(&cwd).unwrap(), cwd }
}

impl Served {
    fn client(&self) -> Client {
        self.host.client().unwrap()
    }

    fn act(&self, client: &mut Client, action: &str, machine: &str) -> Value {
        let path = self.cwd.root().join("file");
        client.ask(json!({"action": action, "machine": machine, "path": path})).unwrap()
    }

    /// Asserts that the host and these machines work, and that the host exits with code 0.
    #[track_caller]
    fn assert_well(mut self, machines: &[&str]) {
        let mut client = self.client();
        for machine in machines.iter().chain(&["fine"]) {
            for action in ["restore_start", "stop", "norestore_start", "acpi_stop"] {
                assert_eq!(client.act(action, machine).unwrap(), success(), "{action} of {machine}");
            }
            assert_eq!(client.act("state", machine).unwrap()["state"], "poweroff");
            assert_eq!(client.machine(machine).unwrap()["disabled"], false);
        }
        drop(client);
        assert_eq!(self.host.terminate().unwrap().code(), Some(0), "{}", self.host.log());
        assert!(!self.cwd.socket().exists());
    }
}

fn success() -> Value {
    json!({"success": true})
}

#[track_caller]
fn assert_fails(answer: &Value, words: &[&str]) {
    assert_eq!(answer["success"], false, "{answer}");
    assert_contains(answer["reason"].as_str().unwrap(), words);
}

#[track_caller]
fn assert_contains(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {}", text.chars().take(5000).collect::<String>());
    }
}

/// Asserts that the machine is disabled, for the reason that was answered.
#[track_caller]
fn assert_disabled(client: &mut Client, machine: &str, answer: &Value) {
    let listed = client.machine(machine).unwrap();
    assert_eq!(listed["disabled"], true, "{listed}");
    assert_eq!(listed["disabled_reason"], answer["reason"]);
    assert_eq!(listed["errors"].as_array().unwrap().last(), Some(&answer["reason"]));
}

/// Asserts that each machine with this fault in one method is disabled, for a reason with `words`.
fn assert_each_method_disables_its_machine(fault: &str, words: &[&str]) {
    // The host reads each state at startup; another test has that fault.
    let methods: Vec<_> = METHODS.into_iter().filter(|(method, _)| *method != "state").collect();
    let keys: Vec<_> =
        methods.iter().map(|(method, _)| (*method, format!("faults: {{{method}: {fault}}}"))).collect();
    let mut machines: Vec<_> = keys.iter().map(|(name, keys)| (*name, keys.as_str())).collect();
    machines.push(("tame", ""));
    let served = serve(&misbehaving("prepare: true", &machines));
    let mut client = served.client();
    for (method, needs_running) in methods {
        if needs_running {
            assert_eq!(client.act("restore_start", method).unwrap(), success());
        }
        let answer = served.act(&mut client, method, method);
        if method == "prepare" && fault == "hang" {
            // The host's own preparation of the machine hangs already.
            assert_fails(&answer, &["earlier call"]);
            assert_contains(client.machine(method).unwrap()["disabled_reason"].as_str().unwrap(), words);
            continue;
        }
        assert_fails(&answer, words);
        assert_fails(&answer, &[&format!("{method} of machine '{method}' failed")]);
        assert_disabled(&mut client, method, &answer);
    }
    served.assert_well(&["tame"]);
}

#[test]
fn machine_is_disabled_when_a_method_panics() {
    assert_each_method_disables_its_machine(
        "panic",
        &["the plugin 'misbehaving' panicked: configured to panic in "],
    );
    assert_each_method_disables_its_machine(
        "panic_str",
        &["the plugin 'misbehaving' panicked: configured to panic."],
    );
    assert_each_method_disables_its_machine(
        "panic_bomb",
        &["the plugin 'misbehaving' panicked: (no message)"],
    );
}

#[test]
fn machine_is_disabled_when_a_method_hangs() {
    assert_each_method_disables_its_machine("hang", &["did not return from the plugin"]);
}

#[test]
fn machine_is_disabled_when_an_error_is_not_utf8() {
    let methods = ["restore_start", "norestore_start"];
    let keys: Vec<_> = methods.map(|method| (method, format!("faults: {{{method}: invalid_utf8}}"))).into();
    let machines: Vec<_> = keys.iter().map(|(name, keys)| (*name, keys.as_str())).collect();
    let served = serve(&misbehaving("", &machines));
    let mut client = served.client();
    for method in methods {
        let answer = client.act(method, method).unwrap();
        assert_fails(&answer, &["the plugin's error makes no sense", r"bad \xff\xfe text"]);
        assert_disabled(&mut client, method, &answer);
    }
    served.assert_well(&[]);
}

#[test]
fn machine_is_disabled_when_its_state_cannot_be_read() {
    let faults = [("panic", "panicked: configured to panic in State"), ("hang", "did not return")];
    let keys = faults.map(|(fault, _)| (fault, format!("faults: {{state: {fault}}}")));
    let mut machines: Vec<_> = keys.iter().map(|(name, keys)| (*name, keys.as_str())).collect();
    machines.push(("tame", ""));
    let served = serve(&misbehaving("", &machines));
    let mut client = served.client();
    for (fault, words) in faults {
        // The host has read the state at startup.
        let listed = client.machine(fault).unwrap();
        assert_eq!((&listed["disabled"], &listed["state"]), (&json!(true), &json!("error")), "{listed}");
        assert_contains(listed["disabled_reason"].as_str().unwrap(), &[words]);
        client.act("enable_machine", fault).unwrap();
        let answer = client.act("state", fault).unwrap();
        assert_fails(&answer, &[words, &format!("querying the state of machine '{fault}' failed")]);
        assert_disabled(&mut client, fault, &answer);
    }
    served.assert_well(&["tame"]);
}

#[test]
fn thread_panic_is_logged_and_the_machine_stays_enabled() {
    let served = serve(&misbehaving("", &[("m", "faults: {restore_start: thread_panic}")]));
    assert_eq!(served.client().act("restore_start", "m").unwrap(), success());
    let log = served.host.log();
    let line = log.lines().find(|line| line.contains("a thread panics in RestoreStart")).unwrap();
    assert_contains(line, &["machinery=\"misbehaving\"", "faulty-panic", "faults.rs:"]);
    served.assert_well(&["m"]);
}

/// Asserts that `serve` fails because of this fault, with one error.
#[track_caller]
fn assert_no_start(keys: &str, words: &[&str]) -> CommandOutput {
    let cwd = cwd(&misbehaving(keys, &[("m", "")]));
    if keys.contains("hang") {
        cwd.host_yaml("timeouts: {load: 2, shutdown: 1}\n").unwrap();
    }
    let ran = host::run(&cwd, &["serve"]).unwrap();
    assert_eq!(ran.code, Some(2), "{keys}: {}", ran.stderr);
    assert_contains(&ran.stderr, words);
    assert_eq!(ran.stderr.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{}", ran.stderr);
    assert!(!cwd.socket().exists());
    ran
}

#[test]
fn serve_fails_with_the_panic_when_a_plugin_panics_during_startup() {
    for fault in ["panic", "panic_str", "panic_bomb"] {
        let what = if fault == "panic_bomb" { "(no message)" } else { "configured to panic" };
        let words = ["'misbehaving'", "the plugin 'misbehaving' panicked: ", what];
        for method in ["load", "machines", "capabilities", "version"] {
            let ran = assert_no_start(&format!("faults: {{{method}: {fault}}}"), &words);
            let reported = if method == "load" { "loading the machinery 'misbehaving'" } else { method };
            assert_contains(&ran.stderr, &[reported, "failed: "]);
        }
    }
}

#[test]
fn serve_fails_with_a_timeout_when_a_plugin_hangs_during_startup() {
    for method in ["load", "machines", "capabilities", "version"] {
        let words = [&format!("{method} of 'misbehaving'"), "did not return within", "`timeouts`"];
        assert_no_start(&format!("faults: {{{method}: hang}}"), &words.map(|word| word as &str));
    }
}

#[test]
fn serve_fails_with_a_timeout_when_a_library_initialiser_hangs() {
    let cwd = ScratchCwd::new(&[("double", &double(&[("fine", "")])), ("hangs_on_load", "")]).unwrap();
    cwd.host_yaml("timeouts: {load: 2}\n").unwrap();
    for command in ["serve", "check", "plugins"] {
        let ran = host::run(&cwd, &[command]).unwrap();
        assert_eq!(ran.code, Some(2), "{command}: {ran:?}");
        let output = format!("{}{}", ran.stdout, ran.stderr);
        assert_contains(
            &output,
            &["opening ", "libmachinery_hangs_on_load.so", "did not return within", "`timeouts`"],
        );
    }
}

#[test]
fn host_exits_when_dropping_a_machinery_fails() {
    for (fault, words) in [("panic", "configured to panic in Drop"), ("panic_bomb", ""), ("hang", "")] {
        let ran = assert_no_start(
            &format!("faults: {{version: panic, drop: {fault}}}"),
            &["version of 'misbehaving'"],
        );
        assert_contains(&ran.stderr, &["the misbehaving machinery is dropped", words]);
    }
    let both = "faults: {version: panic, shutdown: hang}";
    assert_no_start(
        both,
        &["version of 'misbehaving'", "shutdown of 'misbehaving': the plugin did not return"],
    );
}

#[test]
fn host_exits_when_a_plugins_shutdown_fails() {
    for (fault, words) in [
        ("panic", "the plugin 'misbehaving' panicked: configured to panic in Shutdown"),
        ("panic_bomb", "the plugin 'misbehaving' panicked"),
        ("hang", "shutdown: the plugin did not return within"),
        ("invalid_utf8", r"bad \xff\xfe text"),
    ] {
        let mut served = serve(&misbehaving(&format!("faults: {{shutdown: {fault}}}"), &[("m", "")]));
        served.client().act("restore_start", "m").unwrap();
        assert_eq!(served.host.terminate().unwrap().code(), Some(0), "{}", served.host.log());
        assert_contains(&served.host.log(), &[words, "machinery=\"misbehaving\""]);
        assert!(!served.cwd.socket().exists());
    }
}

#[test]
fn check_reports_a_problem_when_a_plugins_check_fails() {
    for (fault, words) in [
        ("panic", "the plugin 'misbehaving' panicked: configured to panic in Check"),
        ("panic_bomb", "the plugin 'misbehaving' panicked"),
        ("hang", "did not return within"),
        ("invalid_utf8", r"\xff\xfe"),
    ] {
        let cwd = cwd(&misbehaving(&format!("faults: {{check: {fault}}}"), &[("m", "")]));
        cwd.host_yaml("timeouts: {load: 2}\n").unwrap();
        let ran = host::run(&cwd, &["-v", "check"]).unwrap();
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert_contains(&ran.stdout, &["PROBLEM", "checking 'misbehaving'", words, "1 machines in memory"]);
    }
}

#[test]
fn host_exits_when_stops_and_preparations_hang() {
    let machines = [
        ("prepared", "faults: {prepare: hang}"),
        ("stuck", "faults: {stop: hang, prepare: hang}"),
        ("m", ""),
    ];
    let cwd = cwd(&misbehaving("prepare: true", &machines));
    // The preparation would take an hour.
    cwd.host_yaml(&LIMITS.replace("prepare: 1", "prepare: 3600")).unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    let begun = Instant::now();
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    assert!(host.log().contains("machine=\"m\" action=\"stop\""), "{}", host.log());
}

#[test]
fn stop_fails_when_a_preparation_hangs() {
    let cwd = cwd(&misbehaving("prepare: true", &[("m", "faults: {prepare: hang}")]));
    cwd.host_yaml(&LIMITS.replace("prepare: 1", "prepare: 3600")).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    client.send(&json!({"action": "prepare", "machine": "m", "id": "hangs"})).unwrap();
    assert_fails(&client.act("stop", "m").unwrap(), &["earlier call"]);
    assert_eq!(client.machine("m").unwrap()["disabled"], true);
    Served { host, cwd }.assert_well(&[]);
}

#[test]
fn reload_changes_nothing_when_a_plugins_reload_fails() {
    for (fault, words) in [
        ("panic", "the plugin 'misbehaving' panicked: configured to panic in Reload"),
        ("panic_bomb", "the plugin 'misbehaving' panicked"),
        ("invalid_utf8", r"bad \xff\xfe text"),
        ("hang", "did not return from the plugin"),
    ] {
        let served = serve(&misbehaving(&format!("faults: {{reload: {fault}}}"), &[("m", "")]));
        let mut client = served.client();
        assert_eq!(client.act("restore_start", "m").unwrap(), success());
        // The other machinery applies its change, and has to roll back.
        served.cwd.write_yaml("double", &double(&[("fine", ""), ("more", "")])).unwrap();
        for words in [words, if fault == "hang" { "earlier reload" } else { words }] {
            let answer = client.ask(json!({"action": "reload"})).unwrap();
            assert_fails(&answer, &["reloading the machinery 'misbehaving'", words]);
            let list = client.ask(json!({"action": "list"})).unwrap();
            assert_eq!(list["machines"].as_array().unwrap().len(), 2, "{list}");
        }
        assert_eq!(client.act("stop", "m").unwrap(), success());
        served.assert_well(&["m"]);
    }
}

#[test]
fn host_exits_when_a_reload_hangs() {
    let mut served = serve(&misbehaving("faults: {reload: hang}", &[("m", "")]));
    let mut client = served.client();
    assert_eq!(client.act("restore_start", "m").unwrap(), success());
    client.subscribe().unwrap();
    client.send(&json!({"action": "reload"})).unwrap();
    client.wait_for_event("progress", "m").unwrap();
    assert_eq!(served.host.terminate().unwrap().code(), Some(0), "{}", served.host.log());
    assert_contains(&served.host.log(), &["nothing has changed", "machine=\"m\" action=\"stop\""]);
    assert!(!served.cwd.socket().exists());
}

#[test]
fn reload_ignores_machines_that_do_not_exist() {
    for reported in ["terminal_commands", "zero_byte"] {
        let cwd = cwd(&misbehaving(&format!("reload_reports: {reported}"), &[("m", "")]));
        // A debug build on a busy machine takes seconds to read two hundred thousand names.
        cwd.host_yaml(&LIMITS.replace("reload: 1", "reload: 30")).unwrap();
        let served = Served { host: RunningHost::start(&cwd).unwrap(), cwd };
        let mut client = served.client();
        let answer = client.ask(json!({"action": "reload"})).unwrap();
        let nothing = json!([]);
        assert_eq!((&answer["changed"], &answer["deferred"]), (&nothing, &nothing), "{reported}");
        let log = served.host.log();
        assert!(log.lines().all(|line| line.len() < 10_000 && !line.starts_with("ERROR")), "{reported}");
        served.assert_well(&["m"]);
    }
}

#[test]
fn added_machine_is_disabled_when_its_state_cannot_be_read() {
    let cwd = cwd(&misbehaving("", &[("m", "")]));
    // The hanging machine must leave time for those behind it.
    cwd.host_yaml(&LIMITS.replace("reload: 1", "reload: 30")).unwrap();
    let served = Served { host: RunningHost::start(&cwd).unwrap(), cwd };
    let mut client = served.client();
    let machines = [
        ("fine", ""),
        ("panics", "faults: {state: panic}"),
        ("hangs", "faults: {state: hang}"),
        ("more", ""),
    ];
    served.cwd.write_yaml("double", &double(&machines)).unwrap();
    let answer = client.ask(json!({"action": "reload"})).unwrap();
    assert_eq!(answer["added"], json!(["panics", "hangs", "more"]), "{answer}");
    for (machine, words) in [("panics", "the plugin 'double' panicked"), ("hangs", "did not return")] {
        let listed = client.machine(machine).unwrap();
        assert_eq!((&listed["disabled"], &listed["state"]), (&json!(true), &json!("error")), "{listed}");
        let reported = format!("querying the state of machine '{machine}' failed");
        assert_contains(listed["disabled_reason"].as_str().unwrap(), &[words, &reported]);
    }
    served.assert_well(&["m", "more"]);
}

#[test]
fn events_are_dropped_when_a_plugin_sends_them_after_shutdown() {
    let mut served = serve(&misbehaving("reports_after_shutdown: true", &[("m", ""), ("n", "")]));
    let mut client = served.client();
    client.subscribe().unwrap();
    assert_eq!(served.host.terminate().unwrap().code(), Some(0), "{}", served.host.log());
    assert!(client.wait_for_close(), "an event of a host that has ended");
    assert_contains(&served.host.log(), &["after the end"]);
}

#[test]
fn plugin_events_are_sanitised_and_cut() {
    let faults = ["invalid_utf8", "zero_byte", "terminal_commands", "ten_megabytes"];
    let keys = faults.map(|fault| (fault, format!("reports: {fault}")));
    let machines: Vec<_> = keys.iter().map(|(name, keys)| (*name, keys.as_str())).collect();
    let served = serve_patiently(&misbehaving("", &machines));
    let before = served.host.resources().unwrap().resident_kib;
    let mut client = served.client();
    client.subscribe().unwrap();
    for (fault, expected) in [
        ("invalid_utf8", r#""bad \xff\xfe text""#),
        ("zero_byte", "zero \0 byte"),
        ("terminal_commands", "forged"),
        ("ten_megabytes", "xxx… (cut, it had 10000000 bytes)"),
    ] {
        assert_eq!(client.act("restore_start", fault).unwrap(), success(), "{fault}");
        assert_eq!(client.wait_for_state(fault, "starting").unwrap(), "");
        let reason = client.wait_for_state(fault, "paused").unwrap();
        assert!(reason.contains(expected) && reason.len() < 10_000, "{fault}: {} bytes", reason.len());
        let why = client.wait_for_event("ready", fault).unwrap()["reason"].as_str().unwrap().to_owned();
        // Invalid UTF-8 makes the whole record invalid.
        let expected = if fault == "invalid_utf8" { r"bad \xff\xfe text" } else { expected };
        assert!(why.contains(expected) && why.len() < 10_000, "{fault}: {} bytes", why.len());
        let listed = client.machine(fault).unwrap();
        assert_eq!((&listed["disabled"], &listed["state"]), (&json!(false), &json!("running")));
    }
    let log = served.host.log();
    assert!(!log.lines().any(|line| line.starts_with("ERROR")), "a plugin has forged a line");
    assert!(!log.contains(['\x1b', '\x07', '\r', '\u{9b}', '\0']), "a plugin commands the terminal");
    assert!(log.lines().all(|line| line.len() < 30_000));
    assert_contains(&log, &[r"\u{1b}[2J", "the log record makes no sense"]);
    let list = host::run(&served.cwd, &["list"]).unwrap();
    assert_eq!(list.code, Some(0));
    assert!(!list.stdout.contains(['\x1b', '\x07', '\r', '\u{9b}', '\0']), "{}", list.stdout);
    let after = served.host.resources().unwrap().resident_kib;
    assert!(after < before + 300 * 1024, "{before} KiB, then {after} KiB");
    served.assert_well(&faults);
}

#[test]
fn plugin_errors_are_sanitised_and_cut() {
    let faults = ["fifty_megabytes", "terminal_commands", "zero_byte"];
    let keys = faults.map(|fault| (fault, format!("faults: {{restore_start: {fault}}}")));
    let machines: Vec<_> = keys.iter().map(|(name, keys)| (*name, keys.as_str())).collect();
    let served = serve_patiently(&misbehaving("", &machines));
    let mut client = served.client();
    for (fault, expected) in [
        ("fifty_megabytes", "xxx… (cut, it had 50000000 bytes)"),
        ("terminal_commands", "\nERROR forged line"),
        ("zero_byte", "\0"),
    ] {
        for _ in 0..3 {
            client.act("enable_machine", fault).unwrap();
            let answer = client.act("restore_start", fault).unwrap();
            assert_fails(&answer, &[expected]);
            assert!(answer.to_string().len() < 10_000);
            assert_disabled(&mut client, fault, &answer);
        }
    }
    client.act("enable_machine", "terminal_commands").unwrap();
    let shown = host::run(&served.cwd, &["restore-start", "terminal_commands"]).unwrap();
    assert_eq!(shown.code, Some(1));
    assert_contains(&shown.stderr, &[r"\u{1b}[2J"]);
    assert!(!shown.stderr.contains(['\x1b', '\x07', '\r', '\u{9b}']), "{}", shown.stderr);
    let log = served.host.log();
    assert!(!log.lines().any(|line| line.starts_with("ERROR")), "a plugin has forged a line");
    served.assert_well(&[]);
}

#[test]
fn version_is_sanitised_and_cut() {
    assert_no_start(
        "faults: {version: invalid_utf8}",
        &["version of 'misbehaving'", r#""bad \xff\xfe text""#],
    );
    for (fault, expected) in
        [("ten_megabytes", "xxx… (cut, it had 10000000 bytes)"), ("zero_byte", "zero \0 byte")]
    {
        let served = serve_patiently(&misbehaving(&format!("faults: {{version: {fault}}}"), &[("m", "")]));
        let answer = served.client().ask(json!({"action": "version"})).unwrap();
        let version = answer["machineries"]["misbehaving"].as_str().unwrap();
        assert!(version.contains(expected) && version.len() < 10_000, "{} bytes", version.len());
        served.assert_well(&["m"]);
    }
}

#[test]
fn serve_fails_when_a_machine_name_is_invalid() {
    for (fault, expected) in [
        ("invalid_utf8", r"\xff\xfe"),
        ("zero_byte", r#""zero \0 byte""#),
        ("terminal_commands", r"\u{1b}[2J"),
        ("fifty_megabytes", "xxx… (cut, it had 50000000 bytes)"),
    ] {
        let ran = assert_no_start(
            &format!("faults: {{machines: {fault}}}"),
            &["machines of 'misbehaving'", expected],
        );
        assert!(ran.stderr.len() < 10_000 && !ran.stderr.contains('\x1b'), "{}", ran.stderr);
    }
}

#[test]
fn load_error_is_cut_when_it_is_too_long() {
    let ran = assert_no_start("faults: {load: fifty_megabytes}", &["(cut, it had 50000000 bytes)"]);
    assert!(ran.stderr.len() < 200_000);
}

#[test]
fn request_is_refused_when_it_is_no_text_or_no_path() {
    let served = serve(&misbehaving("", &[("m", "")]));
    let mut client = served.client();
    for line in [
        &b"{\"action\": \"stop\", \"machine\": \"\xff\xfe\"}"[..],
        b"{\"action\": \"list\", \"ignored\": \"\xc3\"}",
        b"\x00\x00\x00",
        b"{\"action\": \"list\"\x00}",
    ] {
        client.send_line(line).unwrap();
        assert_fails(&client.next_message().unwrap(), &["the line is not JSON"]);
    }
    assert_fails(&client.act("stop", "m\0").unwrap(), &["Machine with name m\0 does not exist"]);
    for action in ["dump_memory", "screenshot"] {
        let request = json!({"action": action, "machine": "m", "path": "/tmp/a\0b"});
        assert_fails(&client.ask(request).unwrap(), &["'path' is no path", "zero byte"]);
    }
    for key in ["pcap_path", "memory_dump_path"] {
        let request = json!({"action": "lock", "machine": "m", "task_id": "t", key: "/tmp/a\0b"});
        assert_fails(&client.ask(request).unwrap(), &["is no path"]);
    }
    let odd = "t\0\u{1b}[2J\n";
    let lock = json!({"action": "lock", "machine": "m", "task_id": odd});
    assert_eq!(client.ask(lock).unwrap()["success"], true);
    let list = host::run(&served.cwd, &["list"]).unwrap();
    assert_contains(&list.stdout, &[r"locked by t\0\u{1b}[2J"]);
    let disable = json!({"action": "disable_machine", "machine": "m", "reason": odd});
    assert_eq!(client.ask(disable).unwrap(), success());
    assert_eq!(client.machine("m").unwrap()["disabled_reason"], odd);
    assert_eq!(client.act("enable_machine", "m").unwrap(), success());
    let unlock = json!({"action": "unlock", "machine": "m", "task_id": odd});
    assert_eq!(client.ask(unlock).unwrap(), success());
    assert!(!served.host.log().contains(['\x1b', '\0']));
    served.assert_well(&["m"]);
}

#[test]
fn host_serves_a_hundred_thousand_machines() {
    let mut served = serve_patiently(&misbehaving("extra_machines: 100000", &[("m", "")]));
    let mut client = served.client();
    let list = client.ask(json!({"action": "list"})).unwrap();
    assert_eq!(list["machines"].as_array().unwrap().len(), 100_002);
    assert_eq!(client.act("restore_start", "extra_99999").unwrap(), success());
    assert_eq!(client.act("state", "extra_99999").unwrap()["state"], "running");
    assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true);
    let held = served.host.resources().unwrap();
    assert!(held.resident_kib < 2 * 1024 * 1024 && held.threads < 300, "{held:?}");
    // A list takes a debug build seconds, so the test requests no more of them.
    assert_eq!(client.act("restore_start", "fine").unwrap(), success());
    assert_eq!(served.host.terminate().unwrap().code(), Some(0));
}

#[test]
fn host_memory_is_bounded_when_a_plugin_sends_a_million_events() {
    let served = serve_patiently(&misbehaving("", &[("m", "progress: 1000000")]));
    let before = served.host.resources().unwrap().resident_kib;
    let mut subscriber = served.client();
    subscriber.subscribe().unwrap();
    let mut client = served.client();
    client.act("restore_start", "m").unwrap();
    let path = served.cwd.root().join("file");
    client.send(&json!({"action": "dump_memory", "machine": "m", "path": path, "id": "dumps"})).unwrap();
    let list = client.ask(json!({"action": "list"})).unwrap();
    assert_eq!(list["machines"].as_array().unwrap().len(), 2);
    assert_eq!(client.next_message().unwrap()["id"], "dumps");
    let after = served.host.resources().unwrap().resident_kib;
    assert!(after < before + 100 * 1024, "{before} KiB, then {after} KiB");
    while subscriber.next_message().unwrap()["event"] != "lagged" {}
    drop(subscriber);
    served.assert_well(&["m"]);
}
