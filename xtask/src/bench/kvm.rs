//! A domain of libvirt: by `virsh`, and with the host in each of its modes.

use machinery_testkit::lab::KvmLab;
use machinery_testkit::libvirt::SNAPSHOT;

use super::figures::{Figures, Kind, Place, Unit, size};
use super::hosted::{self, Mode, Served};
use super::turns::timed;
use super::{Plan, guest, note, turns};
use crate::run::Result;

/// What a restore takes.
pub const REVERT: Kind = Kind {
    name: "floor: plain restore",
    what: "virsh snapshot-revert --running, until it ends",
    unit: Unit::Ms,
};
/// What it takes to let a domain go on that is reverted and paused.
pub const RESUME: Kind = Kind {
    name: "floor: standby",
    what: "virsh resume of a domain that is reverted and paused",
    unit: Unit::Ms,
};
/// What a stop takes.
pub const DESTROY: Kind = Kind { name: "floor: stop", what: "virsh destroy, until it ends", unit: Unit::Ms };

/// Who takes turns.
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
        let version = lab.libvirtd().virsh(&["version", "--daemon"])?;
        let lines = version.lines().map(str::trim).filter(|line| !line.is_empty());
        figures.about.push(("hypervisor", lines.collect::<Vec<_>>().join(", ")));
    }
    let served = Served { cwd: lab.cwd(), machinery: "kvm", memory_mib: ram };
    let place = Place::Kvm(ram);
    let rounds = |contestant| match contestant {
        Contestant::Host(Mode::Standby) => plan.standby_rounds,
        _ => plan.rounds,
    };
    // libvirt's domains have no templates.
    let modes = plan.modes.iter().copied().filter(|mode| *mode != Mode::Instant);
    let contestants = [Contestant::Virsh].into_iter().chain(modes.map(Contestant::Host)).collect();
    turns::take(contestants, rounds, |contestant, share| match contestant {
        Contestant::Virsh => by_virsh(&lab, share, place, figures),
        Contestant::Host(mode) => hosted::measure(served, mode, share, place, figures),
    })
}

/// The first round does not count.
fn by_virsh(lab: &KvmLab, rounds: usize, place: Place, figures: &mut Figures) -> Result<()> {
    let label = lab.machine("m").label.as_str();
    let virsh =
        |command: &[&str]| timed(|| Ok(lab.libvirtd().virsh(command).map(drop)?)).map(|(_, took)| took);
    for round in 0..=rounds {
        let revert = virsh(&["snapshot-revert", label, SNAPSHOT, "--running"])?;
        let destroy = virsh(&["destroy", label])?;
        virsh(&["snapshot-revert", label, SNAPSHOT, "--paused"])?;
        let resume = virsh(&["resume", label])?;
        virsh(&["destroy", label])?;
        if round > 0 {
            figures.add(place, REVERT, revert);
            figures.add(place, RESUME, resume);
            figures.add(place, DESTROY, destroy);
        }
    }
    Ok(())
}
