//! The figures that the analyses of all sandboxes have in common.

use std::time::Duration;

use crate::bench::figures::{Kind, Unit};

/// The duration of a sample's run.
pub const RUN: Duration = Duration::from_secs(12);

/// The contestant that is this host, with the machines of the sandbox's own manager.
pub const HOST: &str = "host";
/// The contestant that is this host, with machines of QEMU in the place of domains.
pub const HOST_QEMU: &str = "host (qemu)";
/// The contestant that is Cuckoo3's own manager.
pub const CUCKOO3: &str = "Cuckoo3";
/// The contestant that is CAPE's own module.
pub const CAPE: &str = "CAPE";

/// The number of tasks in an hour.
pub const TASKS: Kind = Kind {
    by: HOST,
    name: "tasks",
    what: "the first submission until the end of the last task, all samples at once",
    unit: Unit::PerHour,
};

/// The name of the step from the request of a restore to its answer.
pub const RESTORE: &str = "restore";
/// The name of the step from the request of a stop to its answer.
pub const STOP: &str = "stop";

/// Returns the kind of a task's step.
pub const fn step(name: &'static str, what: &'static str) -> Kind {
    Kind { by: HOST, name, what, unit: Unit::Ms }
}

/// Returns the compared kinds: those of the sandbox's own manager in relation to those of the host, and the numbers of
/// tasks the other way round.
pub fn pairs() -> Vec<(Kind, Kind)> {
    let mut pairs = Vec::new();
    for (own, host) in [(CUCKOO3, HOST), (CAPE, HOST), (CAPE, HOST_QEMU)] {
        pairs.push((TASKS.by(host), TASKS.by(own)));
        pairs.extend([RESTORE, STOP].map(|name| (step(name, "").by(own), step(name, "").by(host))));
    }
    pairs
}
