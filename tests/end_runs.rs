//! `cuckoo-machinery end-runs`: the runs of a host that is gone end, and those of a host that serves go on.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::lab::{KvmFixture, Lab};
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::json;

const SOON: Duration = Duration::from_secs(60);

fn running(lab: &Lab) -> (RunningHost, Client) {
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), json!({"success": true}));
    (host, client)
}

#[test]
fn end_runs_ends_the_guest_of_a_killed_host_and_no_guest_of_a_host_that_serves() {
    let lab = Lab::new(&[("m", Guest::Micro, SnapshotFormat::Lz4)]).unwrap();
    let (mut host, mut client) = running(&lab);
    let lock = json!({"action": "lock", "machine": "m", "task_id": "t"});
    assert_eq!(client.ask(lock).unwrap()["success"], true);
    let serves = lab.run(&["end-runs"]).unwrap();
    assert!(serves.code == Some(0) && serves.stdout.contains("a host serves"), "{serves:?}");
    lab.folder("m").wait_for_next_count(SOON).unwrap();
    host.kill().unwrap();
    let ended = lab.run(&["--json", "end-runs"]).unwrap();
    assert_eq!((ended.code, ended.stdout.trim()), (Some(0), r#"{"ended":true,"success":true}"#), "{ended:?}");
    lab.assert_clean();
    // The next host finds the lock of the task.
    let (mut host, mut client) = running(&lab);
    assert_eq!(client.machine("m").unwrap()["locked_by"], "t");
    assert!(host.terminate().unwrap().success());
    // Nothing is left to do.
    assert_eq!(lab.run(&["end-runs"]).unwrap().code, Some(0));
}

#[test]
fn end_runs_ends_the_domain_of_a_killed_host() {
    let mut fixture = KvmFixture::new(&[("m", Guest::Micro)], "");
    fixture.restore();
    fixture.host.kill().unwrap();
    let ended = fixture.lab.run(&["end-runs"]).unwrap();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    fixture.lab.assert_clean();
}

#[test]
fn end_runs_fails_when_the_configuration_is_wrong() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    cwd.write_yaml("double", "machines: [").unwrap();
    let failed = host::run(&cwd, &["end-runs"]).unwrap();
    assert!(failed.code == Some(2) && failed.stderr.contains("double.yaml"), "{failed:?}");
}
