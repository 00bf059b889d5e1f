//! The figures of clones, and how they compare.

use super::machines::RAM_MIB;
use crate::bench::figures::{Kind, Place, Unit};

/// The time until all machines are loaded and paused.
pub const STAND_BY: Kind = kind("all stand by", "from nothing, until all are loaded and paused", Unit::Ms);
/// The time until all machines run.
pub const RESUMED: Kind = kind("all resumed", "of all that stand by, until all run", Unit::Ms);
/// The time until all agents have answered.
pub const ANSWERED: Kind =
    kind("all agents answer", "the same begin, until each agent has answered on its own address", Unit::Ms);
/// The time until all machines are stopped.
pub const STOPPED: Kind = kind("all stopped", "until no process is left", Unit::Ms);
/// The memory of a machine that stands by.
pub const IDLE_MEMORY: Kind =
    kind("memory of one, standby", "PSS of all QEMUs that stand by, for each of them", Unit::MiB);
/// The memory of a machine that runs.
pub const MEMORY: Kind = kind(
    "memory of one, running",
    "PSS of all QEMUs, after the agents' answers, for each of them",
    Unit::MiB,
);
/// The memory of all machines that run.
pub const ALL_MEMORY: Kind =
    kind("memory of all, running", "PSS of all QEMUs, after the agents' answers", Unit::MiB);
/// The disk space of all machines.
pub const DISK: Kind = kind(
    "disk of all",
    "disks, snapshots, templates and overlays of all machines, while they run",
    Unit::MiB,
);

/// The host with clones.
pub const HOST: &str = "host";
/// QEMU by hand.
pub const BY_HAND: &str = "by hand";
/// The host with copies.
pub const SEPARATE: &str = "separate";

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

/// Returns the place of that many machines.
pub fn place(count: usize) -> Place {
    Place::Clones(count, RAM_MIB)
}
