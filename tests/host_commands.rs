//! The commands for a running host, and for what it leaves: `status`, `shutdown`, `clean`.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::io;
use std::process::{self, Command};

use machinery_testkit::artifacts;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::lab::Lab;
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::snapshot::SnapshotFormat;
use machinery_testkit::terminal::Terminal;
use serde_json::{Value, json};

#[test]
fn status_has_the_process_its_starter_and_its_machines() {
    let cwd = ScratchCwd::double(&[("m", ""), ("n", "")]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), json!({"success": true}));
    let status = host::run(&cwd, &["status"]).unwrap();
    assert_eq!(status.code, Some(0), "{status:?}");
    let starter = format!("(process {})", process::id());
    for words in [&host.pid().to_string(), &starter, "2 configured, 1 on, 0 locked", "templates"] {
        assert!(status.stdout.contains(words), "{words}: {}", status.stdout);
    }
    let status = host::run(&cwd, &["--json", "status"]).unwrap().stdout;
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!((&status["pid"], &status["machines"]["on"]), (&json!(host.pid()), &json!(1)));
}

#[test]
fn print_ends_quietly_when_its_reader_has_closed_the_pipe() {
    let folder = artifacts::folder().unwrap();
    for (program, arguments) in
        [("cuckoo-machinery", ["conformance", "--list"]), ("xtask", ["prose", "--counts"])]
    {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(folder.join(program));
        let ran = command.args(arguments).stdout(writer).output().unwrap();
        assert!(!ran.status.success() && ran.stderr.is_empty(), "{program}: {ran:?}");
    }
}

#[test]
fn command_fails_with_advice_when_no_host_serves() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    for command in ["status", "shutdown"] {
        let failed = host::run(&cwd, &[command]).unwrap();
        assert_eq!(failed.code, Some(1), "{command}: {failed:?}");
        assert!(failed.stderr.contains("no machinery host answers"), "{}", failed.stderr);
        assert!(failed.stderr.contains("cuckoo-machinery serve"), "{}", failed.stderr);
    }
}

#[test]
fn shutdown_returns_when_the_host_has_ended_with_its_machines() {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), json!({"success": true}));
    let ended = lab.run(&["shutdown"]).unwrap();
    assert_eq!((ended.code, ended.stdout.trim()), (Some(0), "the host has ended, with its machines"));
    assert!(!lab.cwd().root().join("operational/sockets/machinerymanager.sock").exists());
    lab.assert_clean();
    assert_eq!(host.wait().unwrap().code(), Some(0), "{}", host.log());
}

#[test]
fn second_host_is_refused_with_the_process_of_the_first() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let refused = host::run(&cwd, &["serve"]).unwrap();
    let expected = format!("already serves this CWD as process {}", host.pid());
    assert!(refused.code == Some(2) && refused.stderr.contains(&expected), "{refused:?}");
}

#[test]
fn clean_is_refused_while_a_machine_is_on() {
    let cwd = ScratchCwd::double(&[("m", "runs_at_load: true"), ("n", "")]).unwrap();
    drop(RunningHost::start(&cwd).unwrap());
    let refused = host::run(&cwd, &["clean"]).unwrap();
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(
        refused.stderr.contains("machines are on, and the host could not end them: m"),
        "{}",
        refused.stderr
    );
    assert!(cwd.root().join("operational/generated/machinery-host/lock").exists());
}

#[test]
fn clean_removes_the_state_of_a_host_that_has_ended_and_names_other_folders() {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    let templates = lab.cwd().root().join("templates");
    lab.ahead(&format!("instant: auto, instant_dir: {}", templates.display())).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let lock = json!({"action": "lock", "machine": "m", "task_id": "t"});
    assert_eq!(client.ask(lock).unwrap()["success"], true);
    assert_eq!(client.act("restore_start", "m").unwrap(), json!({"success": true}));
    let refused = lab.run(&["clean"]).unwrap();
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("cuckoo-machinery shutdown"), "{}", refused.stderr);
    // Its machine is left running.
    host.kill().unwrap();
    let cleaned = lab.run(&["clean"]).unwrap();
    assert_eq!(cleaned.code, Some(0), "{cleaned:?}");
    assert!(!lab.cwd().root().join("operational/generated/machinery-host").exists());
    assert!(cleaned.stdout.contains(&format!("remaining  {}", templates.display())), "{}", cleaned.stdout);
    lab.assert_clean();
    // Another host starts with nothing.
    let host = lab.host().unwrap();
    assert_eq!(host.client().unwrap().machine("m").unwrap()["locked"], false);
}

#[test]
fn check_of_a_large_lab_has_its_problems_first_and_folds_equal_findings() {
    let names: Vec<String> = (1..=20).map(|number| format!("m{number}")).collect();
    let machines: Vec<_> =
        names.iter().map(|name| (name.as_str(), Guest::Micro, SnapshotFormat::Plain)).collect();
    let lab = Lab::new(&machines).unwrap();
    for name in ["m7", "m8", "m9", "m20"] {
        lab.cwd().change_yaml("qemu", &format!("{name}/memory"), &format!("none-{name}/memory")).unwrap();
    }
    let check = lab.run(&["check"]).unwrap();
    assert_eq!(check.code, Some(2), "{check:?}");
    let lines: Vec<&str> = check.stdout.lines().collect();
    assert!(lines.len() < 15, "{}", check.stdout);
    assert!(
        lines[0].starts_with("PROBLEM  4 machines: ") && lines[1].trim() == "m7 … m9, m20 (-v shows each)",
        "{}",
        check.stdout
    );
    assert!(
        lines.iter().any(|line| line.starts_with("ok ") && line.ends_with("-v shows them")),
        "{}",
        check.stdout
    );
    let all = lab.run(&["-v", "check"]).unwrap();
    assert!(all.stdout.lines().count() > 40, "{}", all.stdout);
    let json = lab.run(&["--json", "check"]).unwrap();
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    // The last two lines of the text are an empty one and the counts.
    assert_eq!(json["findings"].as_array().unwrap().len(), all.stdout.lines().count() - 2);
}

#[test]
fn slow_command_shows_its_progress_on_a_terminal_and_removes_it() {
    let cwd = ScratchCwd::double(&[("m", "delays_ms: {state: 3000}")]).unwrap();
    let _host = RunningHost::start(&cwd).unwrap();
    let mut command = host::command(&cwd).unwrap();
    command.args(["state", "m"]);
    let mut terminal = Terminal::start(command, (24, 80)).unwrap();
    terminal.wait_until("the progress", |screen| screen.contents().contains("state ")).unwrap();
    assert_eq!(terminal.wait().unwrap().code(), Some(0));
    assert_eq!(terminal.text().trim(), "poweroff");
}
