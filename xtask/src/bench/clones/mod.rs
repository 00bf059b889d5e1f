//! Clones of one snapshot: with the host, beside QEMU by hand, and beside machines with a snapshot each.
//!
//! ```text
//! start ─▶ all stand by ─▶ all resumed ─▶ all agents have answered, each on its own address ─▶ all stopped
//! ```
//!
//! | module | content |
//! | --- | --- |
//! | `machines` | the machine, its clones, and its copies |
//! | `host` | the host with clones or copies |
//! | `by_hand` | QEMUs in network namespaces, made by `ip` and `nft` |
//! | `agents` | the first answers of all agents |

mod agents;
mod by_hand;
mod host;
mod machines;

use machinery_testkit::guest::Qemu;

use self::by_hand::HandMade;
use self::machines::{Machines, RAM_MIB};
use super::figures::{Figures, Kind, Place, Unit};
use super::plan::Plan;
use super::turns;
use crate::run::{Result, note};

/// The time until all machines are loaded and paused.
const STAND_BY: Kind = kind("all stand by", "from nothing, until all are loaded and paused", Unit::Ms);
/// The time until all machines run.
const RESUMED: Kind = kind("all resumed", "of all that stand by, until all run", Unit::Ms);
/// The time until all agents have answered.
const ANSWERED: Kind =
    kind("all agents answer", "the same begin, until each agent has answered on its own address", Unit::Ms);
/// The time until all machines are stopped.
const STOPPED: Kind = kind("all stopped", "until no process is left", Unit::Ms);
/// The memory of a machine that stands by.
const IDLE_MEMORY: Kind =
    kind("memory of one, standby", "PSS of all QEMUs that stand by, for each of them", Unit::MiB);
/// The memory of a machine that runs.
const MEMORY: Kind = kind(
    "memory of one, running",
    "PSS of all QEMUs, after the agents' answers, for each of them",
    Unit::MiB,
);
/// The memory of all machines that run.
const ALL_MEMORY: Kind =
    kind("memory of all, running", "PSS of all QEMUs, after the agents' answers", Unit::MiB);
/// The disk space of all machines.
const DISK: Kind = kind(
    "disk of all",
    "disks, snapshots, templates and overlays of all machines, while they run",
    Unit::MiB,
);

const HOST: &str = "host";
const BY_HAND: &str = "by hand";
const SEPARATE: &str = "separate";

/// The numbers of clones whose growth is measured.
const STEPS: [usize; 7] = [1, 2, 5, 10, 20, 50, 100];
/// The number of machines with a snapshot each, at most.
const MAX_SEPARATE: usize = 20;
/// A round of many clones takes minutes.
const ROUNDS_EACH: usize = 5;

const fn kind(name: &'static str, what: &'static str, unit: Unit) -> Kind {
    Kind { by: "", name, what, unit }
}

/// Returns the compared kinds: each first one in relation to the second.
pub fn pairs() -> Vec<(Kind, Kind)> {
    let by_hand =
        [STAND_BY, RESUMED, ANSWERED, STOPPED, MEMORY].map(|kind| (kind.by(HOST), kind.by(BY_HAND)));
    let separate =
        [STAND_BY, RESUMED, ANSWERED, ALL_MEMORY, DISK].map(|kind| (kind.by(SEPARATE), kind.by(HOST)));
    by_hand.into_iter().chain(separate).collect()
}

/// A line of the chart of growth.
#[derive(Clone, Copy)]
pub struct Line {
    /// The figure.
    pub kind: Kind,
    /// True if it is that of QEMU by hand.
    pub is_by_hand: bool,
}

/// Returns the lines of that unit: each figure with the host, and then by hand.
pub fn lines(unit: Unit) -> Vec<Line> {
    let kinds =
        [STAND_BY, RESUMED, ANSWERED, STOPPED, ALL_MEMORY].into_iter().filter(|kind| kind.unit == unit);
    let lines = |kind: Kind| [HOST, BY_HAND].map(|by| Line { kind: kind.by(by), is_by_hand: by == BY_HAND });
    kinds.flat_map(lines).collect()
}

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

/// Returns the place of that many machines.
fn place(count: usize) -> Place {
    Place::Clones(count, RAM_MIB)
}
