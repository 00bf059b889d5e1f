//! Intact snapshots that QEMU refuses: the reason has the cause and an advice. A failure that is not about the
//! template keeps the template.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::guest::Guest;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const MICRO: (&str, Guest, SnapshotFormat) = ("m", Guest::Micro, SnapshotFormat::Lz4);
const PLAIN: &str = "instant: off, standby: off";
const INSTANT: &str = "instant: auto, standby: off";

/// Replaces the value of that option.
fn set(args: &mut [String], option: &str, value: &str) {
    let at = args.iter().position(|arg| arg == option).unwrap();
    args[at + 1] = value.to_owned();
}

fn act(client: &mut Client, action: &str) -> Value {
    client.act(action, "m").unwrap()
}

#[track_caller]
fn does(client: &mut Client, action: &str) {
    assert_eq!(act(client, action), json!({"success": true}), "{action}");
}

/// Checks that the action fails with a one-line reason of sensible size that contains these words.
#[track_caller]
fn fails(client: &mut Client, action: &str, words: &[&str]) -> String {
    let answer = act(client, action);
    let reason = answer["reason"].as_str().unwrap_or_default().to_owned();
    for word in words {
        assert!(reason.contains(word), "{word:?} is not in {answer}");
    }
    assert!(reason.len() < 1500 && !reason.contains('\n'), "{reason}");
    act(client, "enable_machine");
    reason
}

type Change = fn(&mut Vec<String>);

/// Changes that make another machine than that of the snapshot, and the words that report each of them.
const OTHERS: [(Change, &[&str]); 3] = [
    (
        |args| set(args, "-machine", "pc-i440fx-7.1"),
        &["QEMU refuses the", "Machine type received is 'pc-i440fx-", "Write `-M pc-i440fx-"],
    ),
    (
        |args| set(args, "-m", "64"),
        &[
            "QEMU refuses the",
            "32 MiB of RAM, and start_args give 64 MiB",
            "Size mismatch: pc.ram",
            "`-m 32M`",
        ],
    ),
    (|args| set(args, "-vga", "cirrus"), &["QEMU refuses the", "vga", "Give start_args the devices"]),
];

#[test]
fn snapshot_is_refused_but_not_called_corrupt_when_its_machine_differs() {
    for format in [SnapshotFormat::Plain, SnapshotFormat::Lz4] {
        let lab = Lab::new(&[("m", Guest::Micro, format)]).unwrap();
        lab.ahead(PLAIN).unwrap();
        let mut host = lab.host().unwrap();
        let mut client = host.client().unwrap();
        for (change, words) in OTHERS {
            lab.change_start_args("m", change).unwrap();
            assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true);
            let reason = fails(&mut client, "restore_start", words);
            println!("{reason}");
            assert!(!reason.contains("corrupt") && !reason.contains("backup"), "{reason}");
            lab.assert_clean();
            // A cold start does not need the snapshot.
            does(&mut client, "norestore_start");
            does(&mut client, "stop");
        }
        assert!(host.terminate().unwrap().success());
    }
}

#[test]
fn template_is_missing_for_qemus_reason_when_it_refuses_the_snapshot() {
    for (change, words) in OTHERS {
        let lab = Lab::new(&[MICRO]).unwrap();
        lab.change_start_args("m", change).unwrap();
        lab.ahead(INSTANT).unwrap();
        let mut host = lab.host().unwrap();
        let mut client = host.client().unwrap();
        let reason = fails(&mut client, "prepare", words);
        assert!(reason.contains("building its template") && !reason.contains("corrupt"), "{reason}");
        let ready = client.machine("m").unwrap()["ready"].clone();
        let why = ready["reason"].as_str().unwrap();
        assert!(why.contains("QEMU refuses the") && !why.contains('\n'), "{ready}");
        assert!(host.terminate().unwrap().success());
    }
}

#[test]
fn reload_is_advised_when_machineinfo_was_corrected_after_it_was_read() {
    let lab = Lab::new(&[MICRO]).unwrap();
    lab.accept_unsafe_args("m").unwrap();
    for (wrong, words) in [(&["-m", "64"], "Size mismatch"), (&["-no-such", "option"], "invalid option")] {
        lab.change_start_args("m", |args| args.extend(wrong.map(str::to_owned))).unwrap();
        let mut host = lab.host().unwrap();
        let mut client = host.client().unwrap();
        let before = fails(&mut client, "restore_start", &[words]);
        assert!(!before.contains("reload"), "{before}");
        lab.change_start_args("m", |_| ()).unwrap();
        fails(
            &mut client,
            "restore_start",
            &[words, "machineinfo.json has changed since it was read: reload"],
        );
        assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true);
        does(&mut client, "restore_start");
        assert_eq!(lab.folder("m").first_count(SOON).unwrap(), lab.restored_count().unwrap());
        assert!(host.terminate().unwrap().success());
    }
}

/// Returns an option that listens on a port and does not change the guest's hardware.
fn listening_on(lab: &Lab) -> String {
    format!("socket,id=port,host={},port=8000,server=on,wait=off", lab.folder("m").ip)
}

#[test]
fn template_stays_when_restores_fail_for_a_port_that_is_in_use() {
    let lab = Lab::new(&[MICRO]).unwrap();
    let chardev = listening_on(&lab);
    lab.change_start_args("m", |args| args.extend(["-chardev".to_owned(), chardev])).unwrap();
    lab.ahead(INSTANT).unwrap();
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let taken = TcpListener::bind((lab.folder("m").ip.as_str(), 8000)).unwrap();
    for _ in 0..4 {
        fails(&mut client, "prepare", &["Address already in use"]);
    }
    drop(taken);
    does(&mut client, "prepare");
    assert_eq!(client.machine("m").unwrap()["ready"]["mode"], "instant");
    let made = || fs::metadata(lab.template("m").join("ram")).unwrap().ino();
    let before = made();
    let taken = TcpListener::bind((lab.folder("m").ip.as_str(), 8000)).unwrap();
    for _ in 0..4 {
        fails(&mut client, "restore_start", &["Address already in use"]);
    }
    drop(taken);
    assert_eq!(made(), before);
    does(&mut client, "restore_start");
    assert_eq!(lab.folder("m").first_count(SOON).unwrap(), lab.restored_count().unwrap());
    assert_eq!((made(), &client.machine("m").unwrap()["ready"]["mode"]), (before, &json!("instant")));
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
}
