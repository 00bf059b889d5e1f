//! Plugins that end the process: after `exit()` the host shuts down in order; after `_exit()` or an abort the
//! next host recovers.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::scratch::{ScratchCwd, double};
use serde_json::{Value, json};

const LIMITS: &str = "timeouts: {restore_start: 0.5, stop: 5, reload: 0.5, shutdown: 0.5}\n";

fn success() -> Value {
    json!({"success": true})
}

/// Creates a CWD of the double machinery, and of the misbehaving one with the machine `m`.
fn cwd(keys: &str, faults: &str) -> ScratchCwd {
    let machine = format!("{{ip: 10.9.0.1, platform: linux, os_version: 1, faults: {{{faults}}}}}");
    let misbehaving = format!("{keys}\nmachines:\n  m: {machine}\n");
    let cwd =
        ScratchCwd::new(&[("double", &double(&[("fine", "")])), ("misbehaving", &misbehaving)]).unwrap();
    cwd.host_yaml(LIMITS).unwrap();
    cwd
}

/// Asserts that the host has shut down in order, with exit code 1 and the reason in its log.
#[track_caller]
fn assert_ended(mut host: RunningHost, cwd: &ScratchCwd, by: &str) {
    assert_eq!(host.wait().unwrap().code(), Some(1), "{}", host.log());
    let log = host.log();
    let cause = log.lines().find(|line| line.contains("a plugin called exit()"));
    assert!(cause.is_some_and(|line| line.contains("ERROR") && line.contains(by)), "{by:?}: {log}");
    let stopped = |line: &str| line.contains("done") && line.contains("machine=\"fine\" action=\"stop\"");
    assert!(log.lines().any(stopped), "{log}");
    assert!(log.contains("misbehaving machines are shut down"), "{log}");
    assert!(!cwd.socket().exists());
}

#[test]
fn host_shuts_down_when_a_plugin_thread_calls_exit() {
    let cwd = cwd("", "restore_start: thread_exit");
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "fine").unwrap(), success());
    client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
    host.wait_for_notification("STOPPING=1").unwrap();
    assert_ended(host, &cwd, "its thread 'faulty-exit'");
    RunningHost::start(&cwd).unwrap();
}

#[test]
fn host_shuts_down_when_a_plugin_method_calls_exit() {
    let cwd = cwd("", "restore_start: exit");
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "fine").unwrap(), success());
    let answer = client.act("restore_start", "m").unwrap();
    assert!(answer["reason"].as_str().unwrap().contains("did not return"), "{answer}");
    assert_ended(host, &cwd, "'misbehaving' in a call for the machine 'm'");
    RunningHost::start(&cwd).unwrap();
}

#[test]
fn host_shuts_down_when_reload_calls_exit() {
    let cwd = cwd("faults: {reload: exit}", "");
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "fine").unwrap(), success());
    client.send(&json!({"action": "reload"})).unwrap();
    assert_ended(host, &cwd, "'misbehaving' in reload");
}

#[test]
fn host_reports_the_plugin_when_shutdown_calls_exit() {
    let cwd = cwd("faults: {shutdown: exit}", "");
    let host = RunningHost::start(&cwd).unwrap();
    assert_eq!(host.client().unwrap().act("restore_start", "fine").unwrap(), success());
    host.signal(rustix::process::Signal::TERM).unwrap();
    assert_ended(host, &cwd, "'misbehaving' in shutdown");
}

#[test]
fn serve_fails_when_a_plugin_calls_exit_during_startup() {
    for method in ["load", "machines", "capabilities", "version"] {
        let cwd = cwd(&format!("faults: {{{method}: exit}}"), "");
        let ran = host::run(&cwd, &["serve"]).unwrap();
        assert_eq!(ran.code, Some(2), "{ran:?}");
        let by = format!("{method} of 'misbehaving'");
        assert!(ran.stderr.contains("a plugin called exit()") && ran.stderr.contains(&by), "{ran:?}");
        assert!(!cwd.socket().exists());
    }
}

#[test]
fn check_fails_when_a_plugin_calls_exit() {
    let ran = host::run(&cwd("faults: {check: exit}", ""), &["-v", "check"]).unwrap();
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("a plugin called exit()"), "{ran:?}");
    assert!(ran.stderr.contains("checking 'misbehaving'"), "{ran:?}");
}

#[test]
fn next_host_serves_when_a_plugin_aborted_the_process() {
    for fault in ["exit_at_once", "abort"] {
        let cwd = cwd("", &format!("restore_start: {fault}"));
        let mut host = RunningHost::start(&cwd).unwrap();
        let mut client = host.client().unwrap();
        assert_eq!(client.act("restore_start", "fine").unwrap(), success());
        client.send(&json!({"action": "restore_start", "machine": "m"})).unwrap();
        assert!(client.wait_for_close(), "{fault}");
        host.wait().unwrap();
        assert!(cwd.socket().exists(), "nobody was there to remove it");
        let mut next = RunningHost::start(&cwd).unwrap();
        assert_eq!(next.client().unwrap().act("restore_start", "fine").unwrap(), success());
        assert_eq!(next.terminate().unwrap().code(), Some(0));
    }
}
