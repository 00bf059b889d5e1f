//! The replacement of a host whose machinery cannot adopt runs, and of one that hangs.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use machinery_testkit::client::Client;
use machinery_testkit::host::RunningHost;
use machinery_testkit::scratch::{ScratchCwd, double};
use rustix::process::Signal;
use serde_json::json;

fn served(machines: &[(&str, &str)]) -> (ScratchCwd, RunningHost, Client) {
    let cwd = ScratchCwd::new(&[("double", &double(machines))]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let client = host.client().unwrap();
    (cwd, host, client)
}

#[test]
fn machines_are_stopped_and_stay_locked_when_their_machinery_cannot_adopt() {
    let (_cwd, mut host, mut client) = served(&[("m", ""), ("n", "")]);
    let lock = json!({"action": "lock", "machine": "m", "task_id": "t"});
    assert_eq!(client.ask(lock).unwrap()["success"], true);
    assert_eq!(client.act("restore_start", "m").unwrap(), json!({"success": true}));
    host.signal(Signal::USR2).unwrap();
    let mut client = host.wait_for_replacement().unwrap();
    let machine = client.machine("m").unwrap();
    assert_eq!((&machine["state"], &machine["locked_by"]), (&json!("poweroff"), &json!("t")));
    for action in ["restore_start", "stop"] {
        assert_eq!(client.act(action, "m").unwrap(), json!({"success": true}), "{action}");
    }
    assert_eq!(host.terminate().unwrap().code(), Some(0));
}

#[test]
fn waiting_client_hears_to_ask_again_and_then_succeeds_when_the_host_is_replaced() {
    let (_cwd, mut host, mut client) = served(&[("m", "delays_ms: {restore_start: 2000}")]);
    let mut other = host.client().unwrap();
    other.subscribe().unwrap();
    for id in [1, 2] {
        client.send(&json!({"action": "restore_start", "machine": "m", "id": id})).unwrap();
    }
    other.wait_for_state("m", "starting").unwrap();
    host.signal(Signal::USR2).unwrap();
    let mut answers = [(); 2].map(|()| client.next_message().unwrap());
    answers.sort_by_key(|answer| answer["id"].as_u64());
    assert_eq!(answers[0], json!({"success": true, "id": 1}));
    assert!(answers[1]["reason"].as_str().unwrap().contains("ask again when it is back"), "{answers:?}");
    let mut client = host.wait_for_replacement().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), json!({"success": true}));
    assert_eq!(host.terminate().unwrap().code(), Some(0));
}
