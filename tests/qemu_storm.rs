//! Many restores at the same time, as in a sandbox: none fails, each begins at its snapshot, and the host leaks
//! nothing.
//!
//! The limits for memory, threads and descriptors are generous: the test searches for leaks that grow with each
//! round.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::thread;
use std::time::{Duration, Instant};

use machinery_testkit::guest::Guest;
use machinery_testkit::host::RunningHost;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::json;

const SOON: Duration = Duration::from_secs(60);
const ROUNDS: u32 = 50;

const MACHINES: [(&str, Guest, SnapshotFormat); 4] = [
    ("plain", Guest::Micro, SnapshotFormat::Plain),
    ("gzip", Guest::Micro, SnapshotFormat::Gzip),
    ("lz4", Guest::Micro, SnapshotFormat::Lz4),
    ("zstd", Guest::Micro, SnapshotFormat::Zstd),
];

/// Runs rounds on all machines, each with a client of its own. Returns the duration of the slowest restore.
fn rounds(lab: &Lab, host: &RunningHost, rounds: u32) -> Duration {
    let restored = lab.restored_count().unwrap();
    thread::scope(|scope| {
        let threads: Vec<_> = MACHINES
            .iter()
            .map(|(name, ..)| {
                scope
                    .spawn(move || (0..rounds).map(|round| one_round(lab, host, name, restored, round)).max())
            })
            .collect();
        threads.into_iter().filter_map(|thread| thread.join().unwrap()).max().unwrap()
    })
}

fn one_round(lab: &Lab, host: &RunningHost, name: &str, restored: u32, round: u32) -> Duration {
    let mut client = host.client().unwrap();
    let begun = Instant::now();
    assert_eq!(client.act("restore_start", name).unwrap(), json!({"success": true}), "{name}, {round}");
    let took = begun.elapsed();
    assert_eq!(lab.folder(name).first_count(SOON).unwrap(), restored, "{name}, {round}");
    assert_eq!(client.act("stop", name).unwrap(), json!({"success": true}), "{name}, {round}");
    took
}

#[test]
fn host_leaks_nothing_when_many_restores_run_at_the_same_time() {
    let lab = Lab::new(&MACHINES).unwrap();
    let mut host = lab.host().unwrap();
    rounds(&lab, &host, 1);
    lab.assert_clean();
    let before = host.resources().unwrap();
    let begun = Instant::now();
    let slowest = rounds(&lab, &host, ROUNDS - 1);
    println!("{} restores in {:?}, slowest {slowest:?}", (ROUNDS - 1) * 4, begun.elapsed());
    lab.assert_clean();
    let after = host.resources().unwrap();
    println!("{before:?}\n{after:?}");
    after.assert_no_growth_since(&before);
    assert_eq!(host.terminate().unwrap().code(), Some(0));
    lab.assert_clean();
    let log = host.log();
    assert!(!log.contains("ERROR"), "{log}");
}
