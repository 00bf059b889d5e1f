//! Reload of the configuration: immediate changes, deferred changes, and refused configurations.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;

use machinery_testkit::artifacts;
use machinery_testkit::client::Client;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::scratch::{ScratchCwd, double};
use rustix::process::Signal;
use serde_json::{Value, json};

fn served(machines: &[(&str, &str)]) -> (RunningHost, ScratchCwd) {
    let cwd = ScratchCwd::double(machines).unwrap();
    (RunningHost::start(&cwd).unwrap(), cwd)
}

fn subscribed(host: &RunningHost) -> Client {
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    client
}

fn reload(client: &mut Client) -> Value {
    client.ask(json!({"action": "reload"})).unwrap()
}

/// Returns the answer of a successful reload.
fn taken(added: &[&str], changed: &[&str], removed: &[&str], later: &[&str]) -> Value {
    let machines =
        json!({"added": added, "changed": changed, "removed": removed, "deferred": later, "later": later});
    let mut taken = json!({"success": true, "settings": [], "restart_required": [], "notes": []});
    taken.as_object_mut().unwrap().extend(machines.as_object().unwrap().clone());
    taken
}

fn done() -> Value {
    json!({"success": true})
}

fn names(client: &mut Client) -> Vec<String> {
    let list = client.ask(json!({"action": "list"})).unwrap();
    let machines = list["machines"].as_array().unwrap().iter();
    machines.map(|machine| machine["name"].as_str().unwrap().to_owned()).collect()
}

fn hear_reloaded(client: &mut Client) -> Value {
    loop {
        let message = client.next_message().unwrap();
        if message["event"] == "reloaded" {
            return message;
        }
    }
}

#[test]
fn reload_adds_changes_and_removes_machines_when_another_runs() {
    let (mut host, cwd) = served(&[("runs", ""), ("stays", ""), ("changes", ""), ("goes", "")]);
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "runs").unwrap(), done());
    let text = cwd.yaml("double").unwrap();
    let changed = text.replace("goes", "comes").replace("label: changes-label", "label: other, tags: [new]");
    cwd.write_yaml("double", &changed).unwrap();
    assert_eq!(reload(&mut client), taken(&["comes"], &["changes"], &["goes"], &[]));
    assert_eq!(names(&mut client), ["runs", "stays", "changes", "comes"]);
    assert_eq!(client.machine("changes").unwrap()["tags"], json!(["new"]));
    for machine in ["stays", "changes", "comes"] {
        assert_eq!(client.act("restore_start", machine).unwrap(), done(), "{machine}");
    }
    let gone = client.act("restore_start", "goes").unwrap();
    assert_eq!(gone["reason"], "Machine with name goes does not exist");
    assert_eq!(client.act("stop", "runs").unwrap(), done());
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
}

#[test]
fn change_is_deferred_when_the_machine_is_in_use() {
    let (host, cwd) = served(&[("m", ""), ("gone", "")]);
    let mut client = subscribed(&host);
    let locked = json!({"action": "lock", "machine": "m", "task_id": "task"});
    assert_eq!(client.ask(locked).unwrap()["success"], true);
    assert_eq!(client.act("restore_start", "gone").unwrap(), done());
    let text = double(&[("m", "tags: [new]")]);
    cwd.write_yaml("double", &text).unwrap();
    assert_eq!(reload(&mut client), taken(&[], &[], &[], &["m", "gone"]));
    assert_eq!(names(&mut client), ["m", "gone"]);
    for machine in ["m", "gone"] {
        assert_eq!(client.machine(machine).unwrap()["change_pending"], true, "{machine}");
    }
    let listed = host::run(&cwd, &["list"]).unwrap();
    assert!(listed.stdout.contains("its new configuration applies once it is idle"), "{}", listed.stdout);
    // The task's machine is unchanged.
    assert_eq!(client.act("restore_start", "m").unwrap(), done());
    assert_eq!(client.act("stop", "m").unwrap(), done());
    assert_eq!(client.machine("m").unwrap()["tags"], json!([]));
    // The host applies the configuration that it read before, not this invalid file.
    cwd.write_yaml("double", "machines: [").unwrap();
    assert_eq!(hear_reloaded(&mut client)["deferred"], json!(["m", "gone"]));
    assert_eq!(client.ask(json!({"action": "unlock", "machine": "m"})).unwrap(), done());
    let reloaded = hear_reloaded(&mut client);
    assert_eq!((&reloaded["changed"], &reloaded["deferred"]), (&json!(["m"]), &json!(["gone"])));
    let machine = client.machine("m").unwrap();
    assert_eq!((&machine["tags"], &machine["change_pending"]), (&json!(["new"]), &json!(false)));
    assert_eq!(client.act("stop", "gone").unwrap(), done());
    assert_eq!(hear_reloaded(&mut client)["removed"], json!(["gone"]));
    assert_eq!(names(&mut client), ["m"]);
}

#[test]
fn reload_changes_nothing_when_the_configuration_is_invalid() {
    let (host, cwd) = served(&[("m", ""), ("n", "")]);
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), done());
    let good = cwd.yaml("double").unwrap();
    let before = client.ask(json!({"action": "list"})).unwrap();
    for (file, text, words) in [
        (
            "conf/machineries/double.yaml",
            good.replace("10.0.0.2", "10.0.0.1"),
            vec!["double.yaml:4", "10.0.0.1"],
        ),
        ("conf/machineries/double.yaml", "machines: [".to_owned(), vec!["double.yaml"]),
        ("conf/cuckoo.yaml", "machineries: [Double]\n".to_owned(), vec!["cuckoo.yaml:1", "Write 'double'"]),
        (
            "conf/cuckoo.yaml",
            "machineries: [double, minimal]\n".to_owned(),
            vec!["double, minimal", "Restart the host"],
        ),
        (
            "conf/machinery-host.yaml",
            "timeouts: {stop: 0}\n".to_owned(),
            vec!["machinery-host.yaml:1", "timeouts.stop"],
        ),
    ] {
        let old = fs::read_to_string(cwd.root().join(file)).ok();
        cwd.write(file, &text).unwrap();
        let refused = reload(&mut client);
        assert_eq!(refused["success"], false, "{text}");
        let reason = refused["reason"].as_str().unwrap();
        for word in words {
            assert!(reason.contains(word), "{word}: {reason}");
        }
        let command = host::run(&cwd, &["reload"]).unwrap();
        assert_eq!((command.code, command.stderr.contains("error: ")), (Some(1), true), "{command:?}");
        assert_eq!(client.ask(json!({"action": "list"})).unwrap()["machines"], before["machines"]);
        match old {
            Some(old) => cwd.write(file, old).unwrap(),
            None => fs::remove_file(cwd.root().join(file)).unwrap(),
        }
    }
    assert_eq!(reload(&mut client), taken(&[], &[], &[], &[]));
    assert_eq!(client.act("stop", "m").unwrap(), done());
}

#[test]
fn reload_changes_nothing_when_one_machinery_refuses() {
    let other = "machines: {next: {ip: 10.9.0.1, platform: linux, os_version: 12}}\n";
    let cwd = ScratchCwd::new(&[("double", &double(&[("m", "")])), ("minimal", other)]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    // The second machinery refuses, so the first one must roll back.
    cwd.write_yaml("double", &double(&[("other", "")])).unwrap();
    cwd.write_yaml("minimal", &other.replace("next", "last")).unwrap();
    let refused = reload(&mut client);
    assert!(refused["reason"].as_str().unwrap().contains("'minimal'"), "{refused}");
    assert_eq!(names(&mut client), ["m", "next"]);
    assert_eq!(client.act("restore_start", "m").unwrap(), done());
    // Machine names are unique over all machineries.
    cwd.write_yaml("minimal", other).unwrap();
    cwd.write_yaml("double", &double(&[("m", ""), ("next", "")])).unwrap();
    let refused = reload(&mut client);
    assert!(refused["reason"].as_str().unwrap().contains("'next'"), "{refused}");
    assert_eq!(names(&mut client), ["m", "next"]);
    cwd.write_yaml("double", &double(&[("m", ""), ("more", "")])).unwrap();
    assert_eq!(reload(&mut client), taken(&["more"], &[], &[], &[]));
}

#[test]
fn plugin_applies_the_old_configuration_again_when_its_reload_fails_halfway() {
    let other = "machines: {next: {ip: 10.9.0.1, platform: linux, os_version: 12}}\n";
    for machineries in [["double", "minimal"], ["minimal", "double"]] {
        let texts = machineries
            .map(|name| (name, if name == "double" { double(&[("m", "")]) } else { other.into() }));
        let cwd = ScratchCwd::new(&texts.each_ref().map(|(name, text)| (*name, text.as_str()))).unwrap();
        let host = RunningHost::start(&cwd).unwrap();
        let mut client = host.client().unwrap();
        // The double has applied this configuration when it fails.
        cwd.write_yaml("double", &format!("reload_fails: true\n{}", double(&[("other", "")]))).unwrap();
        let refused = reload(&mut client);
        assert!(refused["reason"].as_str().unwrap().contains("fail after a part"), "{refused}");
        assert_eq!(client.act("restore_start", "m").unwrap(), done(), "{machineries:?}");
        assert_eq!(client.act("restore_start", "other").unwrap()["success"], false);
    }
}

#[test]
fn settings_are_unchanged_when_the_reload_is_refused() {
    let (host, cwd) = served(&[("m", "faults: {restore_start: timeout}")]);
    let mut client = host.client().unwrap();
    cwd.host_yaml("timeouts: {restore_start: 0.2}\n").unwrap();
    assert_eq!(reload(&mut client)["settings"], json!(["timeouts"]));
    let good = cwd.yaml("double").unwrap();
    cwd.write_yaml("double", "machines: [").unwrap();
    cwd.host_yaml("timeouts: {restore_start: 0.4}\nheal: off\nmax_run: 3600\n").unwrap();
    cwd.change_cuckoo_yaml("enabled: false", "enabled: true").unwrap();
    let refused = reload(&mut client);
    assert!(refused["reason"].as_str().unwrap().contains("double.yaml"), "{refused}");
    let failed = client.act("restore_start", "m").unwrap();
    assert!(failed["reason"].as_str().unwrap().contains("waited 0.2 s"), "{failed}");
    // The same settings are news to the host when the plugin accepts its part.
    cwd.write_yaml("double", &good).unwrap();
    assert_eq!(reload(&mut client)["settings"], json!(["timeouts", "tcpdump.enabled", "heal", "max_run"]));
}

#[test]
fn readiness_is_unknown_when_the_reload_changes_the_machine() {
    let text = |keys: &str| format!("capabilities: {{prepare: true}}\n{}", double(&[("m", keys), ("n", "")]));
    let cwd = ScratchCwd::new(&[("double", &text(""))]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    for machine in ["m", "n"] {
        assert_eq!(client.act("prepare", machine).unwrap(), done());
    }
    // The next preparation does not end.
    cwd.write_yaml("double", &text("delays_ms: {prepare: 600000}")).unwrap();
    assert_eq!(reload(&mut client), taken(&[], &["m"], &[], &[]));
    assert_eq!(client.machine("m").unwrap()["ready"]["mode"], "plain");
    assert_eq!(client.machine("n").unwrap()["ready"]["mode"], "standby");
}

#[test]
fn sighup_reloads_and_logs_the_outcome() {
    let (host, cwd) = served(&[("m", "")]);
    let mut client = subscribed(&host);
    cwd.write_yaml("double", &double(&[("m", ""), ("n", "")])).unwrap();
    host.signal(Signal::HUP).unwrap();
    assert_eq!(hear_reloaded(&mut client)["added"], json!(["n"]));
    assert_eq!(client.act("restore_start", "n").unwrap(), done());
    cwd.write_yaml("double", "machines: [").unwrap();
    host.signal(Signal::HUP).unwrap();
    // This reload waits for the one before it.
    assert_eq!(reload(&mut client)["success"], false);
    assert!(host.log().contains("not reloaded: nothing has changed"), "{}", host.log());
    let command = host::run(&cwd, &["reload", "--json"]).unwrap();
    assert!(command.stdout.contains("double.yaml"), "{command:?}");
}

#[test]
fn availability_is_kept_when_a_machine_is_removed_and_added_again() {
    let (host, cwd) = served(&[("m", ""), ("n", "")]);
    let mut client = host.client().unwrap();
    let disabled = json!({"action": "disable_machine", "machine": "n", "reason": "smells"});
    assert_eq!(client.ask(disabled).unwrap(), done());
    let both = cwd.yaml("double").unwrap();
    cwd.write_yaml("double", &double(&[("m", "")])).unwrap();
    assert_eq!(reload(&mut client), taken(&[], &[], &["n"], &[]));
    let locked = client.ask(json!({"action": "lock", "machine": "n", "task_id": "t"})).unwrap();
    assert_eq!(locked["success"], false);
    cwd.write_yaml("double", &both).unwrap();
    assert_eq!(reload(&mut client), taken(&["n"], &[], &[], &[]));
    assert_eq!(client.machine("n").unwrap()["disabled_reason"], "smells");
}

#[test]
fn reload_applies_timeouts_and_reports_settings_that_need_a_restart() {
    let (host, cwd) = served(&[("m", "delays_ms: {restore_start: 600000}")]);
    let mut client = host.client().unwrap();
    cwd.host_yaml("timeouts: {restore_start: 0.1}\nmax_parallel_restores: 7\n").unwrap();
    let taken = reload(&mut client);
    let notes = taken["restart_required"].to_string();
    assert!(notes.contains("max_parallel_restores") && notes.contains("next start"), "{taken}");
    let failed = client.act("restore_start", "m").unwrap();
    assert!(failed["reason"].as_str().unwrap().contains("waited 0.1 s"), "{failed}");
}

#[test]
fn reload_names_changed_settings_when_no_machine_has_changed() {
    let (host, cwd) = served(&[("m", "")]);
    let mut client = host.client().unwrap();
    let mut subscriber = subscribed(&host);
    let settings = |client: &mut Client| reload(client)["settings"].clone();
    assert_eq!(settings(&mut client), json!([]));
    cwd.change_cuckoo_yaml("enabled: false", "enabled: true").unwrap();
    assert_eq!(settings(&mut client), json!(["tcpdump.enabled"]));
    cwd.change_cuckoo_yaml("path: /usr/bin/tcpdump", "path: /opt/tcpdump").unwrap();
    cwd.host_yaml("timeouts: {stop: 7}\n").unwrap();
    let ran = host::run(&cwd, &["reload"]).unwrap();
    assert!(ran.stdout.contains("tcpdump.path: the next actions use it"), "{ran:?}");
    assert!(!ran.stdout.contains("nothing has changed"), "{ran:?}");
    let heard: Vec<Value> = (0..3).map(|_| hear_reloaded(&mut subscriber)["settings"].clone()).collect();
    assert_eq!(heard, [json!([]), json!(["tcpdump.enabled"]), json!(["timeouts", "tcpdump.path"])]);
    cwd.host_yaml("timeouts: {stop: 7}\n").unwrap();
    let ran = host::run(&cwd, &["reload"]).unwrap();
    assert!(ran.stdout.contains("nothing has changed"), "{ran:?}");
    cwd.host_yaml("timeouts: {stop: 7}\nweb_listen: 127.0.0.1:0\n").unwrap();
    let ran = host::run(&cwd, &["reload"]).unwrap();
    assert_eq!(ran.stdout, "changed   web_listen: applied\n", "{ran:?}");
}

#[test]
fn manager_switch_is_logged_only_when_it_changes() {
    let (host, _cwd) = served(&[("m", "")]);
    let mut client = host.client().unwrap();
    let mut switch = |action: &str| client.ask(json!({"action": action})).unwrap();
    assert_eq!(switch("enable"), done());
    assert!(!host.log().contains("manager was switched"), "{}", host.log());
    assert_eq!(switch("disable"), done());
    assert!(host.log().contains("manager was switched"), "{}", host.log());
}

#[test]
fn reload_reports_a_restart_when_a_plugin_file_has_changed() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let file = cwd.install_plugin("double").unwrap();
    let from_cwd = |command: &mut std::process::Command| {
        command.arg("--plugin-dir").arg(cwd.root().join("machineries"));
    };
    // The build folder would be searched first.
    let mut command = std::process::Command::new(artifacts::program().unwrap());
    command.arg("--cwd").arg(cwd.root());
    let host = RunningHost::start_with(&cwd, |given| {
        from_cwd(&mut command);
        command.arg("serve");
        std::mem::swap(given, &mut command);
    });
    let host = host.unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(reload(&mut client)["restart_required"], json!([]));
    // A copy with the same content is not reported.
    let (copy, mut content) = (file.with_extension("new"), fs::read(&file).unwrap());
    let replace = |content: &[u8]| {
        fs::write(&copy, content).unwrap();
        fs::rename(&copy, &file).unwrap();
    };
    replace(&content);
    assert_eq!(reload(&mut client)["restart_required"], json!([]));
    content.push(0);
    replace(&content);
    let notes = reload(&mut client)["restart_required"].to_string();
    for word in ["'double'", file.to_str().unwrap(), "next start"] {
        assert!(notes.contains(word), "{word}: {notes}");
    }
    assert_eq!(client.act("restore_start", "m").unwrap(), done());
}

#[test]
fn reload_cancels_preparation_when_the_machine_changes() {
    let able = "capabilities: {prepare: true}\n";
    let cwd = ScratchCwd::new(&[(
        "double",
        &format!("{able}{}", double(&[("m", "delays_ms: {prepare: 600000}")])),
    )]);
    let cwd = cwd.unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = subscribed(&host);
    // The preparation would take ten minutes, and is cancelled.
    cwd.write_yaml("double", &format!("{able}{}", double(&[("m", "tags: [new]")]))).unwrap();
    assert_eq!(reload(&mut client), taken(&[], &["m"], &[], &[]));
    while client.wait_for_event("ready", "m").unwrap()["mode"] != "standby" {}
    assert_eq!(client.act("restore_start", "m").unwrap(), done());
}

#[test]
fn requests_are_answered_when_a_reload_runs() {
    let cwd = ScratchCwd::double(&[("m", ""), ("n", "")]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let (mut asker, mut reloader) = (host.client().unwrap(), host.client().unwrap());
    let texts = [double(&[("m", "tags: [a]"), ("n", "")]), double(&[("m", "tags: [b]"), ("n", "")])];
    for round in 0..50 {
        cwd.write_yaml("double", &texts[round % 2]).unwrap();
        reloader.send(&json!({"action": "reload", "id": round})).unwrap();
        for action in ["restore_start", "stop"] {
            assert_eq!(asker.act(action, "m").unwrap(), done(), "{action} in round {round}");
        }
        let answer = reloader.next_message().unwrap();
        assert_eq!((&answer["success"], &answer["id"]), (&json!(true), &json!(round)), "{answer}");
    }
    let machine = asker.machine("m").unwrap();
    assert_eq!(machine["disabled"], false, "{machine}");
}

#[test]
fn host_resources_do_not_grow_when_reloads_repeat() {
    let cwd = ScratchCwd::double(&[("m", ""), ("a", "")]).unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), done());
    let texts = [double(&[("m", ""), ("b", "")]), double(&[("m", ""), ("a", "")])];
    let round = |client: &mut Client, round: usize| {
        cwd.write_yaml("double", &texts[round % 2]).unwrap();
        assert_eq!(reload(client)["success"], true);
    };
    (0..20).for_each(|number| round(&mut client, number));
    let before = host.resources().unwrap();
    (0..500).for_each(|number| round(&mut client, number));
    host.resources().unwrap().assert_no_growth_since(&before);
    assert_eq!(client.machine("m").unwrap()["state"], "running");
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
}

#[test]
fn deferred_changes_are_applied_together_when_machines_swap_addresses() {
    let (host, cwd) = served(&[("a", ""), ("b", ""), ("c", "")]);
    let mut client = subscribed(&host);
    for machine in ["a", "b", "c"] {
        let locked = client.ask(json!({"action": "lock", "machine": machine, "task_id": "task"})).unwrap();
        assert_eq!(locked["success"], true);
    }
    let text = double(&[("a", ""), ("b", "")]);
    let swapped =
        text.replace("10.0.0.1", "swap").replace("10.0.0.2", "10.0.0.1").replace("swap", "10.0.0.2");
    cwd.write_yaml("double", &swapped).unwrap();
    assert_eq!(reload(&mut client), taken(&[], &[], &[], &["a", "b", "c"]));
    for machine in ["a", "b", "c"] {
        assert_eq!(client.ask(json!({"action": "unlock", "machine": machine})).unwrap(), done());
    }
    while names(&mut client) != ["a", "b"] {
        client.next_message().unwrap();
    }
    assert_eq!(client.machine("a").unwrap()["ip"], "10.0.0.2");
    assert_eq!(client.machine("b").unwrap()["ip"], "10.0.0.1");
    for machine in ["a", "b"] {
        assert_eq!(client.machine(machine).unwrap()["change_pending"], false);
        assert_eq!(client.act("restore_start", machine).unwrap(), done());
    }
}

#[test]
fn command_fails_when_its_output_cannot_be_written() {
    let (_host, cwd) = served(&[("m", "")]);
    for _ in 0..5 {
        let mut command = host::command(&cwd).unwrap();
        let full = || fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        command.arg("list").stdout(full()).stderr(full());
        let mut child = command.spawn().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1));
    }
}
