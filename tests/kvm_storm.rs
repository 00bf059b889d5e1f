//! Many simultaneous restores. None fails, and the host has no more threads, files and memory afterwards.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::thread;
use std::time::{Duration, Instant};

use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::KvmLab;
use serde_json::json;

const SOON: Duration = Duration::from_secs(60);
/// More than five: libvirtd executes five requests of one connection at a time.
const MACHINES: [&str; 7] = ["a", "b", "c", "d", "e", "f", "g"];
/// Two actions in each round of each machine: 210 in all.
const ROUNDS: u32 = 15;

fn rounds(lab: &KvmLab, host: &RunningHost, rounds: u32) {
    let restored = lab.restored_count().unwrap();
    thread::scope(|scope| {
        for name in MACHINES {
            scope.spawn(move || {
                let mut client = host.client().unwrap();
                for round in 0..rounds {
                    let started = client.act("restore_start", name).unwrap();
                    assert_eq!(started, json!({"success": true}), "{name}, {round}");
                    assert_eq!(lab.machine(name).first_count(SOON).unwrap(), restored, "{name}, {round}");
                    let stopped = client.act("stop", name).unwrap();
                    assert_eq!(stopped, json!({"success": true}), "{name}, {round}");
                }
            });
        }
    });
}

#[test]
fn host_has_the_same_resources_after_two_hundred_actions() {
    let lab = KvmLab::new(&MACHINES.map(|name| (name, Guest::Micro))).unwrap();
    lab.cwd().host_yaml("machineries: {kvm: {standby: off}}\n").unwrap();
    let mut host = lab.host().unwrap();
    // A domain that gets its save image is on.
    let mut client = host.client().unwrap();
    for name in MACHINES {
        assert_eq!(client.act("prepare", name).unwrap(), json!({"success": true}), "{name}");
    }
    rounds(&lab, &host, 1);
    lab.assert_clean();
    let before = host.resources().unwrap();
    let begun = Instant::now();
    rounds(&lab, &host, ROUNDS);
    println!("{} actions in {:?}", ROUNDS * 14, begun.elapsed());
    lab.assert_clean();
    let after = host.resources().unwrap();
    println!("{before:?}\n{after:?}");
    after.assert_no_growth_since(&before);
    assert_eq!(host.terminate().unwrap().code(), Some(0));
    let log = host.log();
    assert!(!log.contains("ERROR"), "{log}");
}
