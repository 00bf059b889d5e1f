//! One machine of each size: by hand, with the host in each of its modes, and with Cuckoo3.

use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;

use super::by_hand::ByHand;
use super::cuckoo3::{self, Cuckoo3};
use super::figures::{Figures, Place, size};
use super::host::{self, Mode, Served};
use super::plan::{Plan, guest};
use super::turns;
use crate::run::{Result, note};

/// The contestants that take turns.
#[derive(Clone, Copy)]
enum Contestant {
    ByHand(Mode),
    Host(Mode),
    Cuckoo3,
}

/// The RAM of the machine for Cuckoo3, if it is among the sizes. Cuckoo3 waits whole seconds, so one size is
/// enough.
const CUCKOO3_RAM: u32 = 2048;

/// Measures all sizes.
pub fn measure(plan: &Plan, figures: &mut Figures) -> Result<()> {
    let python = cuckoo3::python();
    if python.is_none() {
        note("Cuckoo3 is not measured: CUCKOO3_PYTHON names no Python that has it");
    }
    let largest = plan.ram.iter().copied().max();
    let with_cuckoo3 = plan.ram.iter().copied().find(|ram| *ram == CUCKOO3_RAM).or(largest);
    for ram in &plan.ram {
        let python = python.as_deref().filter(|_| with_cuckoo3 == Some(*ram));
        one_size(plan, *ram, python, figures)?;
    }
    Ok(())
}

fn one_size(plan: &Plan, ram: u32, python: Option<&str>, figures: &mut Figures) -> Result<()> {
    note(&format!("a machine of {} is made", size(ram)));
    let lab = Lab::new(&[("m", guest(ram), SnapshotFormat::Plain)])?;
    if figures.about.is_empty() {
        figures.about.push(("hypervisor", lab.qemu().version()?));
    }
    if python.is_some() {
        cuckoo3::complete(&lab)?;
    }
    let by_hand = ByHand::new(lab.qemu(), lab.folder("m"))?;
    let served = Served { cwd: lab.cwd(), machinery: "qemu", memory_mib: ram };
    let place = Place::Qemu(ram);
    let rounds = |contestant| match contestant {
        Contestant::ByHand(Mode::Standby) | Contestant::Host(Mode::Standby) => plan.standby_rounds,
        _ => plan.rounds,
    };
    turns::take(contestants(plan, python.is_some()), rounds, |contestant, share| match (contestant, python) {
        (Contestant::ByHand(mode), _) => by_hand.measure(mode, share, place, figures),
        (Contestant::Host(mode), _) => {
            host::measure(served, mode, &lab.folder("m").probe, share, place, figures)
        }
        (Contestant::Cuckoo3, Some(python)) => Cuckoo3::start(python, &lab)?.measure(share, place, figures),
        (Contestant::Cuckoo3, None) => Ok(()),
    })
}

fn contestants(plan: &Plan, with_cuckoo3: bool) -> Vec<Contestant> {
    let of_mode = |mode: &Mode| [Contestant::ByHand(*mode), Contestant::Host(*mode)];
    let mut contestants: Vec<Contestant> = plan.modes.iter().flat_map(of_mode).collect();
    contestants.extend(with_cuckoo3.then_some(Contestant::Cuckoo3));
    contestants
}
