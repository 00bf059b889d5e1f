//! Clones of one snapshot: with the host, beside QEMU by hand, and beside machines with a snapshot each.
//!
//! ```text
//! start ─▶ all stand by ─▶ all resumed ─▶ all agents have answered, each on its own address ─▶ all stopped
//! ```
//!
//! | module | content |
//! | --- | --- |
//! | `kinds` | the figures |
//! | `machines` | the machine, its clones, and its copies |
//! | `host` | the host with clones or copies |
//! | `by_hand` | QEMUs in network namespaces, made by `ip` and `nft` |
//! | `agents` | the first answers of all agents |

mod agents;
mod by_hand;
mod host;
mod kinds;
mod machines;

use machinery_testkit::guest::Qemu;

use self::by_hand::HandMade;
use self::kinds::{HOST, SEPARATE};
use self::machines::{Machines, RAM_MIB};
use super::figures::Figures;
use super::plan::Plan;
use super::turns;
use crate::run::{Result, note};

pub use self::kinds::{Line, lines, pairs};

/// The numbers of clones whose growth is measured.
const STEPS: [usize; 7] = [1, 2, 5, 10, 20, 50, 100];
/// The number of machines with a snapshot each, at most.
const MAX_SEPARATE: usize = 20;
/// A round of many clones takes minutes.
const ROUNDS_EACH: usize = 5;

/// The contestants that take turns.
#[derive(Clone, Copy)]
enum Contestant {
    Host(usize),
    ByHand(usize),
    Separate(usize),
}

/// Measures all numbers of clones up to `most`.
pub fn measure(plan: &Plan, most: usize, figures: &mut Figures) -> Result<()> {
    let steps: Vec<usize> = STEPS.into_iter().filter(|step| *step < most).chain([most]).collect();
    let separate = most.min(MAX_SEPARATE);
    note(&format!("a machine of {RAM_MIB} MiB and {separate} copies of it are made"));
    let machines = Machines::new(separate)?;
    figures.about.push(("hypervisor", Qemu::find()?.version()?));
    let hand_made = HandMade::new(&machines)?;
    let contestants = steps.iter().flat_map(|step| [Contestant::Host(*step), Contestant::ByHand(*step)]);
    let contestants = contestants.chain([Contestant::Separate(separate)]).collect();
    turns::take(
        contestants,
        |_| plan.rounds.div_ceil(ROUNDS_EACH),
        |contestant, share| {
            let (what, count) = match contestant {
                Contestant::Host(count) => ("clones with the host", count),
                Contestant::ByHand(count) => ("clones by hand", count),
                Contestant::Separate(count) => ("separate machines with the host", count),
            };
            note(&format!("{count} {what}"));
            match contestant {
                Contestant::Host(_) => {
                    host::measure(&machines, &machines.clones(count)?, HOST, share, figures)
                }
                Contestant::ByHand(_) => (0..share).try_for_each(|_| hand_made.measure(count, figures)),
                Contestant::Separate(_) => {
                    host::measure(&machines, &machines.copies(count)?, SEPARATE, share, figures)
                }
            }
        },
    )
}
