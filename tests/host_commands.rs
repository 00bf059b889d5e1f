//! The commands for a running host, and for what it leaves: `status`, `shutdown`, `clean`.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::process;

use machinery_testkit::guest::Guest;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::lab::Lab;
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::snapshot::SnapshotFormat;
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
