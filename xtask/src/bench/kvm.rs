//! A domain of libvirt: by `virsh`, and with the host in each of its modes.

use machinery_testkit::lab::KvmLab;
use machinery_testkit::libvirt::SNAPSHOT;

use super::figures::{Figures, Kind, Place, size};
use super::host::{self, Mode, Served};
use super::plan::{Plan, guest};
use super::turns::timed;
use super::{answers, by_hand, turns};
use crate::run::{Result, note};

/// The duration of a stop by hand.
const DESTROY: Kind = Kind { what: "virsh destroy, until it ends", ..by_hand::STOP };

/// The duration of a restore by hand.
fn revert() -> Kind {
    Kind { what: "virsh snapshot-revert --running, until it ends", ..by_hand::restore(Mode::Plain) }
}

/// The duration of a restore by hand of a save image.
fn image() -> Kind {
    Kind { what: "virsh restore of a save image, until it ends", ..by_hand::restore(Mode::Instant) }
}

/// The duration of a resume by hand of a reverted and paused domain.
fn resume() -> Kind {
    Kind { what: "virsh resume of a domain that is reverted and paused", ..by_hand::restore(Mode::Standby) }
}

/// The contestants that take turns.
#[derive(Clone, Copy)]
enum Contestant {
    Virsh,
    Host(Mode),
}

/// Measures all sizes.
pub fn measure(plan: &Plan, figures: &mut Figures) -> Result<()> {
    plan.ram.iter().try_for_each(|ram| one_size(plan, *ram, figures))
}

fn one_size(plan: &Plan, ram: u32, figures: &mut Figures) -> Result<()> {
    note(&format!("a domain of {} is made", size(ram)));
    let lab = KvmLab::new(&[("m", guest(ram))])?;
    if figures.about.is_empty() {
        figures.about.push(("hypervisor", version(&lab)?));
    }
    let served = Served { cwd: lab.cwd(), machinery: "kvm", memory_mib: ram };
    let place = Place::Kvm(ram);
    let rounds = |contestant| match contestant {
        Contestant::Host(Mode::Standby) => plan.standby_rounds,
        _ => plan.rounds,
    };
    let modes = plan.modes.iter().copied().map(Contestant::Host);
    let contestants = [Contestant::Virsh].into_iter().chain(modes).collect();
    turns::take(contestants, rounds, |contestant, share| match contestant {
        Contestant::Virsh => by_virsh(&lab, share, place, figures),
        Contestant::Host(mode) => host::measure(served, mode, &lab.machine("m").probe, share, place, figures),
    })
}

/// Returns the versions of libvirt and of its QEMU.
pub fn version(lab: &KvmLab) -> Result<String> {
    let version = lab.libvirtd().virsh(&["version", "--daemon"])?;
    let lines = version.lines().map(str::trim).filter(|line| !line.is_empty());
    Ok(lines.collect::<Vec<_>>().join(", "))
}

/// Measures with virsh; the first round does not count.
fn by_virsh(lab: &KvmLab, rounds: usize, place: Place, figures: &mut Figures) -> Result<()> {
    let guest = &lab.machine("m").probe;
    let label = lab.machine("m").label.as_str();
    let virsh =
        |command: &[&str]| timed(|| Ok(lab.libvirtd().virsh(command).map(drop)?)).map(|(_, took)| took);
    let file = lab.cwd().root().join("by-hand.save").display().to_string();
    virsh(&["snapshot-revert", label, SNAPSHOT, "--paused"])?;
    virsh(&["save", label, &file, "--running"])?;
    for round in 0..=rounds {
        let reverted = virsh(&["snapshot-revert", label, SNAPSHOT, "--running"])?;
        let plain = answers::after(reverted, guest)?;
        let destroyed = virsh(&["destroy", label])?;
        // The snapshot's memory needs the snapshot's disk.
        virsh(&["snapshot-revert", label, SNAPSHOT, "--paused"])?;
        virsh(&["destroy", label])?;
        let restored = virsh(&["restore", &file])?;
        let instant = answers::after(restored, guest)?;
        virsh(&["destroy", label])?;
        virsh(&["snapshot-revert", label, SNAPSHOT, "--paused"])?;
        let resumed = virsh(&["resume", label])?;
        let standby = answers::after(resumed, guest)?;
        virsh(&["destroy", label])?;
        if round > 0 {
            figures.add(place, revert(), reverted);
            figures.add(place, image(), restored);
            figures.add(place, resume(), resumed);
            figures.add(place, DESTROY, destroyed);
            figures.add(place, by_hand::answer(Mode::Plain), plain);
            figures.add(place, by_hand::answer(Mode::Instant), instant);
            figures.add(place, by_hand::answer(Mode::Standby), standby);
        }
    }
    Ok(())
}
