//! A new configuration while guests run, with real QEMUs: the guests keep running, and no standby is lost or
//! leaked.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::{Signal, test_kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const STANDBY: &str = "instant: auto, standby: auto";

fn reload(client: &mut Client) -> Value {
    client.ask(json!({"action": "reload"})).unwrap()
}

#[track_caller]
fn does(client: &mut Client, action: &str, machine: &str) {
    assert_eq!(client.act(action, machine).unwrap(), json!({"success": true}), "{action} of {machine}");
}

fn ready(client: &mut Client, machine: &str) -> String {
    client.machine(machine).unwrap()["ready"]["mode"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn guest_keeps_running_when_a_reload_adds_changes_and_removes_others() {
    let micro = |name| (name, Guest::Micro, SnapshotFormat::Lz4);
    let lab = Lab::new(&["runs", "stays", "goes"].map(micro)).unwrap();
    lab.ahead(STANDBY).unwrap();
    let whole = lab.yaml().unwrap();
    lab.cwd().remove_machine("qemu", "stays").unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    for machine in ["runs", "goes"] {
        does(&mut client, "prepare", machine);
        assert_eq!(ready(&mut client, machine), "standby");
    }
    does(&mut client, "restore_start", "runs");
    let (running, waiting) = (lab.qemu_of("runs").unwrap(), lab.qemu_of("goes").unwrap());
    // A wrong configuration changes nothing, not even a standby.
    lab.write_yaml(&whole.replace("qcow2_path", "qcow2_file")).unwrap();
    assert_eq!(reload(&mut client)["success"], false);
    assert_eq!((lab.qemu_of("runs").unwrap(), lab.qemu_of("goes").unwrap()), (running, waiting));
    // A machine is added, and another one is removed with its standby.
    lab.write_yaml(&whole).unwrap();
    lab.cwd().remove_machine("qemu", "goes").unwrap();
    let reloaded = reload(&mut client);
    assert_eq!(
        (&reloaded["added"], &reloaded["removed"]),
        (&json!(["stays"]), &json!(["goes"])),
        "{reloaded}"
    );
    assert!(test_kill_process(waiting).is_err(), "the standby of a removed machine still exists");
    assert!(!lab.template("goes").exists(), "the template of a removed machine still exists");
    does(&mut client, "restore_start", "stays");
    // A machine in use is changed once it is off.
    let count = lab.folder("runs").first_count(SOON).unwrap();
    lab.change_start_args("runs", |arguments| arguments.extend(["-name", "renamed"].map(str::to_owned)))
        .unwrap();
    assert_eq!(reload(&mut client)["later"], json!(["runs"]));
    assert_eq!(lab.qemu_of("runs").unwrap(), running);
    lab.folder("runs").wait_for_count(count + 1, SOON).unwrap();
    does(&mut client, "stop", "runs");
    // The host applies the pending change by itself.
    while client.machine("runs").unwrap()["outdated"] == true {
        client.next_message().unwrap();
    }
    does(&mut client, "restore_start", "runs");
    let process = lab.qemu_of("runs").unwrap();
    let arguments = fs::read_to_string(format!("/proc/{}/cmdline", process.as_raw_nonzero())).unwrap();
    assert!(arguments.contains("renamed"), "{}", arguments.replace('\0', " "));
    host.signal(Signal::TERM).unwrap();
    assert!(host.wait().unwrap().success(), "{}", host.log());
    lab.assert_clean();
}
