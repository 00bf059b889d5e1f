//! The qemu machinery meets all requirements of a machinery, with real QEMUs and the micro guest, whose counter
//! shows exactly where a run began.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use machinery::host::Plugin;
use machinery::{Deadline, Setup};
use machinery_testkit::artifacts;
use machinery_testkit::conformance::{self, BackendSpec, NullHost};
use machinery_testkit::guest::Guest;
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use rustix::process::{Signal, kill_process};

const SOON: Duration = Duration::from_secs(60);

/// One machine for each format that a snapshot may have, in the order of the lab's configuration.
const MACHINES: [(&str, Guest, SnapshotFormat); 4] = [
    ("gzip", Guest::Micro, SnapshotFormat::Gzip),
    ("lz4", Guest::Micro, SnapshotFormat::Lz4),
    ("plain", Guest::Micro, SnapshotFormat::Plain),
    ("zstd", Guest::Micro, SnapshotFormat::Zstd),
];

fn lab() -> Arc<Lab> {
    Arc::new(Lab::new(&MACHINES).unwrap())
}

fn setup(lab: &Lab) -> Setup {
    lab.cwd().setup("qemu").unwrap()
}

fn spec(lab: &Arc<Lab>) -> BackendSpec {
    let names: Vec<&str> = MACHINES.iter().map(|(name, ..)| *name).collect();
    let restored = lab.restored_count().unwrap();
    let [counting, living, littered, killing, pausing, resuming] = [(); 6].map(|()| Arc::clone(lab));
    let mortal = names[0];
    BackendSpec::new(&names)
        .counts(restored..=restored, move |_, machine| Ok(counting.folder(machine).first_count(SOON)?))
        .alive(move |_, machine| Ok(living.folder(machine).wait_for_next_count(SOON)?))
        .leftovers(move || Ok(littered.leftovers()?))
        // SIGKILL ends it like a crash.
        .death(mortal, move || Ok(kill_process(killing.qemu_of(mortal)?, Signal::KILL)?))
        // A stopped QEMU does not answer.
        .pause(
            mortal,
            move || Ok(kill_process(pausing.qemu_of(mortal)?, Signal::STOP)?),
            move || Ok(kill_process(resuming.qemu_of(mortal)?, Signal::CONT)?),
        )
        .host_program(artifacts::program().unwrap(), conformance::HOST_PROCESS)
        .timeout(SOON)
}

/// Returns damaged versions of a snapshot, each with the kind of damage.
fn broken_snapshots(path: &Path) -> Vec<(&'static str, Vec<u8>)> {
    let (whole, format) = (fs::read(path).unwrap(), SnapshotFormat::of(path).unwrap());
    let stored = |mut content: &[u8]| {
        let mut file = Vec::new();
        format.write(&mut content, &mut file).unwrap();
        file
    };
    let mut broken = vec![
        ("an empty file", Vec::new()),
        ("the first half", whole[..whole.len() / 2].to_vec()),
        ("garbage behind the beginning", [&whole[..8], &[0x5a; 100_000]].concat()),
        ("something else", stored(&[0x5a; 100_000])),
    ];
    // QEMU does not need the last bytes of a plain snapshot, so their loss goes unnoticed.
    if format != SnapshotFormat::Plain {
        broken.push(("the end cut off", whole[..whole.len() - 100].to_vec()));
        broken.push(("nothing, but well packed", stored(&[])));
    }
    broken
}

#[test]
fn qemu_meets_the_requirements() {
    assert_meets_requirements(&lab());
}

#[test]
fn qemu_meets_the_requirements_with_templates() {
    let lab = lab();
    lab.ahead("instant: auto, standby: off, console: true").unwrap();
    prepare_all(&lab);
    assert_meets_requirements(&lab);
}

#[test]
fn qemu_meets_the_requirements_with_standbys() {
    let lab = lab();
    lab.ahead("instant: auto, standby: on").unwrap();
    prepare_all(&lab);
    assert_meets_requirements(&lab);
}

/// Builds the templates of all machines.
fn prepare_all(lab: &Lab) {
    let plugin = Plugin::open(&artifacts::plugin("qemu").unwrap()).unwrap();
    let qemu = plugin.load(&setup(lab), Arc::new(NullHost)).unwrap();
    for (name, ..) in MACHINES {
        qemu.prepare(name, Deadline::after(SOON)).unwrap();
    }
    qemu.shutdown(Deadline::after(SOON)).unwrap();
    lab.assert_clean();
}

fn assert_meets_requirements(lab: &Arc<Lab>) {
    let snapshot = lab.folder("gzip").snapshot.clone();
    let whole = fs::read(&snapshot).unwrap();
    let (half, path) = (whole.len() / 2, snapshot.clone());
    let truncate = move || Ok(fs::File::options().write(true).open(&path)?.set_len(half as u64)?);
    let mend = move || Ok(fs::write(&snapshot, &whole)?);
    let spec = spec(lab).breakage("gzip", truncate, mend);
    let plugin = artifacts::plugin("qemu").unwrap();
    let report = conformance::run(&plugin, &setup(lab), &spec);
    println!("{report}");
    assert!(report.passed(), "{report}");
}

#[test]
fn failed_start_leaves_nothing_when_a_snapshot_is_damaged() {
    let lab = lab();
    let plugin = artifacts::plugin("qemu").unwrap();
    let mut kept = true;
    for (name, ..) in MACHINES {
        let path = &lab.folder(name).snapshot;
        let whole = fs::read(path).unwrap();
        for (how, content) in broken_snapshots(path) {
            let [(spoilt, content), (mended, whole)] =
                [(path.clone(), content), (path.clone(), whole.clone())];
            let spec = spec(&lab).timeout(Duration::from_secs(20)).breakage(
                name,
                move || Ok(fs::write(&spoilt, &content)?),
                move || Ok(fs::write(&mended, &whole)?),
            );
            let report = conformance::run_some(&plugin, &setup(&lab), &spec, &["failed_start"]);
            print!("{name}, {how}: {report}");
            kept &= report.passed() && report.skipped().is_empty();
        }
    }
    assert!(kept, "the lines above name the damage that is not noticed");
}

#[test]
fn leftovers_are_found_when_a_machine_runs() {
    let lab = lab();
    let plugin = Plugin::open(&artifacts::plugin("qemu").unwrap()).unwrap();
    let qemu = plugin.load(&setup(&lab), Arc::new(NullHost)).unwrap();
    lab.assert_clean();
    qemu.restore_start("plain", Deadline::after(SOON)).unwrap();
    let found = lab.leftovers().unwrap();
    for what in ["qemu-system", "_disposable.qcow2", ".sock"] {
        assert!(found.iter().any(|left| left.contains(what)), "no {what} in {found:?}");
    }
    qemu.stop("plain", Deadline::after(SOON)).unwrap();
    lab.assert_clean();
}
