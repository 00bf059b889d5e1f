//! The kvm machinery keeps every requirement of a machinery, with real domains of a real libvirtd and the
//! micro guest, whose counter tells exactly where a run began.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use machinery::config::ConfigFile;
use machinery::host::Plugin;
use machinery::{Deadline, Setup, State};
use machinery_testkit::artifacts;
use machinery_testkit::conformance::{self, BackendSpec, NullHost};
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
    let [counting, living, littered, killing] = [(); 4].map(|()| Arc::clone(lab));
    let mortal = MACHINES[0];
    BackendSpec::new(&MACHINES)
        .counts(restored..=restored, move |_, machine| Ok(counting.machine(machine).first_count(SOON)?))
        .alive(move |_, machine| Ok(living.machine(machine).wait_for_next_count(SOON)?))
        .leftovers(move || Ok(littered.leftovers()?))
        // As a crash would end it.
        .death(mortal, move || Ok(kill_process(killing.qemu_of(mortal)?, Signal::KILL)?))
        .timeout(SOON)
}

fn with_standby(setup: Setup) -> Setup {
    with_section(setup, "standby: on")
}

/// The same, with these keys of the machinery's section.
fn with_section(mut setup: Setup, keys: &str) -> Setup {
    let text = format!("machineries: {{kvm: {{{keys}}}}}\n");
    setup.host_config = Some(ConfigFile { path: "machinery-host.yaml".into(), text });
    setup
}

#[test]
fn kvm_keeps_every_requirement() {
    let lab = lab();
    keeps_every_requirement(&lab, &setup(&lab));
}

#[test]
fn kvm_keeps_every_requirement_with_machines_that_stand_by() {
    let lab = lab();
    keeps_every_requirement(&lab, &with_standby(setup(&lab)));
}

/// The image is made for the requirement of `prepare`, and there for all that come later.
#[test]
fn kvm_keeps_every_requirement_with_save_images() {
    let lab = lab();
    let setup = with_section(setup(&lab), "save_images: on");
    keeps_every_requirement(&lab, &setup);
    assert!(setup.cache_dir.join("one.machinery-image").exists(), "there was no image to keep them with");
}

fn keeps_every_requirement(lab: &Arc<KvmLab>, setup: &Setup) {
    // Without its disk a domain does not start.
    let disk = lab.machine("one").disk.clone();
    let away = disk.with_extension("away");
    let (lost, found) = ((disk.clone(), away.clone()), (away, disk));
    let spec = spec(lab).breakage(
        "one",
        move || Ok(fs::rename(&lost.0, &lost.1)?),
        move || Ok(fs::rename(&found.0, &found.1)?),
    );
    let plugin = artifacts::plugin("kvm").unwrap();
    let report = conformance::run(&plugin, setup, &spec);
    println!("{report}");
    assert!(report.passed(), "{report}");
}

/// What the leftovers are looked for with finds them when they are there.
#[test]
fn a_running_machine_is_something_that_could_be_left() {
    let lab = lab();
    let plugin = Plugin::open(&artifacts::plugin("kvm").unwrap()).unwrap();
    let kvm = plugin.load(&setup(&lab), Arc::new(NullHost)).unwrap();
    lab.assert_clean();
    kvm.restore_start("two", Deadline::after(SOON)).unwrap();
    let found = lab.leftovers().unwrap();
    assert!(found.iter().any(|left| left.contains("qemu-system")), "no QEMU in {found:?}");
    kvm.stop("two", Deadline::after(SOON)).unwrap();
    lab.assert_clean();
    kvm.shutdown(Deadline::after(SOON)).unwrap();
}

/// A restore that finds what was prepared gone is a restore all the same.
#[test]
fn what_stands_by_may_end_at_any_moment() {
    let lab = lab();
    let plugin = Plugin::open(&artifacts::plugin("kvm").unwrap()).unwrap();
    let kvm = plugin.load(&with_standby(setup(&lab)), Arc::new(NullHost)).unwrap();
    let soon = || Deadline::after(SOON);
    for _ in 0..5 {
        kvm.prepare("one", soon()).unwrap();
        let stood_by = lab.qemu_of("one").unwrap();
        kill_process(stood_by, Signal::KILL).unwrap();
        kvm.restore_start("one", soon()).unwrap();
        assert_ne!(lab.qemu_of("one").unwrap(), stood_by);
        assert_eq!(lab.machine("one").first_count(SOON).unwrap(), lab.restored_count().unwrap());
        assert_eq!(kvm.state("one", soon()).unwrap(), State::Running);
        kvm.stop("one", soon()).unwrap();
        assert_eq!(kvm.state("one", soon()).unwrap(), State::Poweroff);
    }
    kvm.prepare("two", soon()).unwrap();
    kvm.shutdown(soon()).unwrap();
    lab.assert_clean();
}
