//! The kvm machinery meets every requirement of the interface, with real domains of a real libvirtd. The guest is the
//! micro guest, whose counter shows exactly where a run began.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use machinery::config::ConfigFile;
use machinery::host::Plugin;
use machinery::{Deadline, Setup, State};
use machinery_testkit::artifacts;
use machinery_testkit::conformance::{self, Answer, BackendSpec, NullHost};
use machinery_testkit::guest::Guest;
use machinery_testkit::lab::KvmLab;
use rustix::process::{Signal, kill_process};

const SOON: Duration = Duration::from_secs(60);

const MACHINES: [&str; 3] = ["one", "two", "three"];

fn lab() -> Arc<KvmLab> {
    Arc::new(KvmLab::new(&MACHINES.map(|name| (name, Guest::Micro))).unwrap())
}

fn setup(lab: &KvmLab) -> Setup {
    lab.cwd().setup("kvm").unwrap()
}

fn spec(lab: &Arc<KvmLab>) -> BackendSpec {
    let restored = lab.restored_count().unwrap();
    let [counting, living, littered, killing, pausing, resuming] = [(); 6].map(|()| Arc::clone(lab));
    let mortal = MACHINES[0];
    BackendSpec::new(&MACHINES)
        .counts(restored..=restored, move |_, machine| Ok(counting.machine(machine).first_count(SOON)?))
        .alive(move |_, machine| Ok(living.machine(machine).wait_for_next_count(SOON)?))
        .leftovers(move || Ok(littered.leftovers()?))
        // The same end as by a crash.
        .death(mortal, move || Ok(kill_process(killing.qemu_of(mortal)?, Signal::KILL)?))
        .pause(mortal, move || virsh(&pausing, "suspend", mortal), move || virsh(&resuming, "resume", mortal))
        .host_program(artifacts::program().unwrap(), conformance::HOST_PROCESS)
        .timeout(SOON)
}

fn virsh(lab: &KvmLab, command: &str, machine: &str) -> Answer<()> {
    Ok(lab.libvirtd().virsh(&[command, &lab.machine(machine).label]).map(drop)?)
}

fn with_standby(setup: Setup) -> Setup {
    with_section(setup, "standby: on")
}

/// Returns the setup with these keys in the machinery's section.
fn with_section(mut setup: Setup, keys: &str) -> Setup {
    let text = format!("machineries: {{kvm: {{{keys}}}}}\n");
    setup.host_config = Some(ConfigFile { path: "machinery-host.yaml".into(), text });
    setup
}

#[test]
fn kvm_meets_the_requirements() {
    let lab = lab();
    assert_meets_requirements(&lab, &setup(&lab));
}

#[test]
fn kvm_meets_the_requirements_with_standbys() {
    let lab = lab();
    assert_meets_requirements(&lab, &with_standby(setup(&lab)));
}

/// The requirement of `prepare` makes the image, and the later ones use it.
#[test]
fn kvm_meets_the_requirements_with_save_images() {
    let lab = lab();
    let setup = with_section(setup(&lab), "instant: on, standby: off");
    assert_meets_requirements(&lab, &setup);
    assert!(
        setup.cache_dir.join("one.machinery-image").exists(),
        "the requirements were checked without an image"
    );
}

fn assert_meets_requirements(lab: &Arc<KvmLab>, setup: &Setup) {
    // A domain does not start without its disk.
    let disk = lab.machine("one").disk.clone();
    let away = disk.with_extension("away");
    let (breaking, repair) = ((disk.clone(), away.clone()), (away, disk));
    let spec = spec(lab).breakage(
        "one",
        move || Ok(fs::rename(&breaking.0, &breaking.1)?),
        move || Ok(fs::rename(&repair.0, &repair.1)?),
    );
    let plugin = artifacts::plugin("kvm").unwrap();
    let report = conformance::run(&plugin, setup, &spec);
    println!("{report}");
    assert!(report.passed(), "{report}");
}

/// The search for leftovers finds the QEMU of a running machine, so it would find a leaked one.
#[test]
fn leftovers_are_found_when_a_machine_runs() {
    let lab = lab();
    let plugin = Plugin::open(&artifacts::plugin("kvm").unwrap()).unwrap();
    let kvm = plugin.load(&setup(&lab), Arc::new(NullHost)).unwrap();
    lab.assert_clean();
    kvm.restore_start("two", Deadline::after(SOON)).unwrap();
    let found = lab.leftovers().unwrap();
    assert!(found.iter().any(|leftover| leftover.contains("qemu-system")), "no QEMU in {found:?}");
    kvm.stop("two", Deadline::after(SOON)).unwrap();
    lab.assert_clean();
    kvm.shutdown(Deadline::after(SOON)).unwrap();
}

/// The restore then reverts to the snapshot.
#[test]
fn restore_succeeds_when_the_standby_has_ended() {
    let lab = lab();
    let plugin = Plugin::open(&artifacts::plugin("kvm").unwrap()).unwrap();
    let kvm = plugin.load(&with_standby(setup(&lab)), Arc::new(NullHost)).unwrap();
    let soon = || Deadline::after(SOON);
    for _ in 0..5 {
        kvm.prepare("one", soon()).unwrap();
        let standby = lab.qemu_of("one").unwrap();
        kill_process(standby, Signal::KILL).unwrap();
        kvm.restore_start("one", soon()).unwrap();
        assert_ne!(lab.qemu_of("one").unwrap(), standby);
        assert_eq!(lab.machine("one").first_count(SOON).unwrap(), lab.restored_count().unwrap());
        assert_eq!(kvm.state("one", soon()).unwrap(), State::Running);
        kvm.stop("one", soon()).unwrap();
        assert_eq!(kvm.state("one", soon()).unwrap(), State::Poweroff);
    }
    kvm.prepare("two", soon()).unwrap();
    kvm.shutdown(soon()).unwrap();
    lab.assert_clean();
}
