//! What is done ahead of a restore: templates, and machines that stand by. They are only as good as they
//! are right: whatever changes, the guest is the snapshot's, and a restore works.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery_testkit::client::Client;
use machinery_testkit::guest::{Guest, micro};
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
const MICRO: (&str, Guest, SnapshotFormat) = ("m", Guest::Micro, SnapshotFormat::Lz4);

const INSTANT: &str = "instant: auto, standby: off";
const STANDBY: &str = "instant: auto, standby: auto";

/// A lab whose machine `m` is prepared this way, with a client of its host.
fn prepared(ahead: &str) -> (Lab, RunningHost, Client) {
    let lab = Lab::new(&[MICRO]).unwrap();
    lab.ahead(ahead).unwrap();
    let (host, client) = served(&lab);
    (lab, host, client)
}

/// A host of the lab whose machine is prepared, with a client that hears all.
fn served(lab: &Lab) -> (RunningHost, Client) {
    let host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    prepare(&mut client);
    (host, client)
}

#[track_caller]
fn does(client: &mut Client, action: &str) {
    let answer = client.act(action, "m").unwrap();
    assert_eq!(answer, json!({"success": true}), "{action}");
}

#[track_caller]
fn prepare(client: &mut Client) {
    does(client, "prepare");
}

fn ready(client: &mut Client) -> Value {
    client.machine("m").unwrap()["ready"].take()
}

#[track_caller]
fn is_ready(client: &mut Client, how: &str) {
    let ready = ready(client);
    assert_eq!(ready["how"], how, "{ready}");
}

/// Waits until the host has prepared the machine by itself.
fn until_ready(client: &mut Client, how: &str) {
    while ready(client)["how"] != how {
        client.hear("ready", "m").unwrap();
    }
}

/// The machine is restored, to exactly the snapshot's moment, and goes on from there.
#[track_caller]
fn restores(lab: &Lab, client: &mut Client) {
    does(client, "restore_start");
    let machine = lab.folder("m");
    let first = machine.first_count(SOON).unwrap();
    assert_eq!(first, lab.restored_count().unwrap(), "not the snapshot's moment");
    machine.wait_for_count(first + 1, SOON).unwrap();
}

/// The same, and by this way.
#[track_caller]
fn restores_by(lab: &Lab, client: &mut Client, host: &RunningHost, way: &str) {
    let before = host.log().len();
    restores(lab, client);
    let log = host.log();
    let done = log[before..].lines().rfind(|line| line.contains("restore_start")).unwrap_or_default();
    let (loads, resumes) = (done.contains("load "), done.contains("resume "));
    let took = match way {
        "standby" => !loads && resumes,
        _ => loads && resumes,
    };
    assert!(took, "not by {way}: {done}\n{log}");
}

fn ends_well(lab: &Lab, host: &mut RunningHost) {
    assert!(host.terminate().unwrap().success());
    lab.assert_clean();
}

fn hash(path: &Path) -> u32 {
    crc32fast::hash(&fs::read(path).unwrap())
}

#[test]
fn instant_restores_are_the_snapshots_and_leave_the_template_as_it_is() {
    let (lab, mut host, mut client) = prepared(INSTANT);
    is_ready(&mut client, "instant");
    let ram = lab.template("m").join("ram");
    let before = (hash(&ram), fs::metadata(&ram).unwrap().ctime_nsec());
    for _ in 0..5 {
        restores_by(&lab, &mut client, &host, "instant");
        does(&mut client, "stop");
    }
    assert_eq!((hash(&ram), fs::metadata(&ram).unwrap().ctime_nsec()), before);
    ends_well(&lab, &mut host);
}

#[test]
fn what_stands_by_is_off_to_the_outside_and_replaced_after_each_run() {
    let (lab, mut host, mut client) = prepared(STANDBY);
    for _ in 0..5 {
        until_ready(&mut client, "standby");
        let standing_by = lab.qemu_of("m").unwrap();
        assert_eq!(client.act("state", "m").unwrap()["state"], "poweroff");
        for action in ["dump_memory", "screenshot"] {
            let request = json!({"action": action, "machine": "m", "path": "/tmp/never-written"});
            let answer = client.ask(request).unwrap();
            assert!(answer["reason"].as_str().unwrap().contains("powered off"), "{answer}");
        }
        restores_by(&lab, &mut client, &host, "standby");
        assert_eq!(lab.qemu_of("m").unwrap(), standing_by);
        does(&mut client, "stop");
    }
    ends_well(&lab, &mut host);
}
