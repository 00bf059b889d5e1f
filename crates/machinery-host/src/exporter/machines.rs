//! The gauges of machines.
//!
//! A lab may have hundreds of clones, and each of their samples would be a series of its own in Prometheus. So all clones of a
//! machine have one sample.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use machinery::{Readiness, State};

use super::families::{Families, Labels, Unit};
use crate::fleet::status::Status;
use crate::fleet::{Machine, Machinery};
use crate::manager::Manager;

/// All modes of a restore.
const ALL_MODES: [Readiness; 3] = [Readiness::Plain, Readiness::Instant, Readiness::Standby];

/// All machines, each with its status at the moment of the request.
type Machines<'a> = Vec<(&'a Arc<Machine>, Status)>;

/// Returns the mode of the next restore, if it is known.
fn mode(status: &Status) -> Option<Readiness> {
    status.ready.as_ref().map(|ready| ready.mode)
}

/// A name, its meaning, and whether it holds for a machine.
type Flag = (&'static str, &'static str, fn(&Status) -> bool);

/// The flags of a machine.
const FLAGS: [Flag; 4] = [
    ("disabled", "disabled, until somebody corrects or enables it", |status| {
        let availability = &status.availability;
        availability.disabled_reason().is_some() && availability.quarantine.is_none()
    }),
    ("quarantined", "in quarantine", |status| status.availability.quarantine.is_some()),
    ("locked", "locked by a task", |status| status.availability.lock.is_some()),
    ("reserved", "reserved for a task", |status| status.availability.reserved_by.is_some()),
];

/// Writes all gauges.
pub fn gauges(families: &mut Families<'_>, manager: &Manager) -> fmt::Result {
    let roster = manager.roster();
    let machines: Machines<'_> =
        roster.machines().iter().map(|machine| (machine, machine.status())).collect();
    // The sum over the machines of each machinery, also of one without machines.
    let sums = |label: Option<(&'static str, String)>, value: &dyn Fn(&Machine, &Status) -> u64| {
        let of = |machinery: &Arc<Machinery>| {
            let own = machines.iter().filter(|(machine, _)| Arc::ptr_eq(&machine.machinery, machinery));
            let sum: u64 = own.map(|(machine, status)| value(machine, status)).sum();
            let labels = [("machinery", machinery.name.clone())].into_iter().chain(label.clone());
            (labels.collect::<Labels>(), sum as f64)
        };
        roster.machineries().iter().map(of).collect::<Vec<_>>()
    };
    let in_state = |state: State| {
        sums(Some(("state", state.to_string())), &move |_, status| u64::from(status.state == state))
    };
    families.gauge(
        "machines",
        "Machines in each state.",
        Unit::None,
        State::ALL.into_iter().flat_map(in_state),
    )?;
    let ready = |wanted: Readiness| {
        sums(Some(("mode", wanted.to_string())), &move |_, status| u64::from(mode(status) == Some(wanted)))
    };
    families.gauge(
        "ready_machines",
        "Machines by the mode of their next restore.",
        Unit::None,
        ALL_MODES.into_iter().flat_map(ready),
    )?;
    let waiting = sums(None, &|machine, _| manager.queues().waiting(machine) as u64);
    families.gauge("waiting_requests", "Requests that wait for their machine.", Unit::None, waiting)?;
    let memory = sums(None, &|_, status| status.ready.as_ref().map_or(0, |ready| ready.memory));
    families.gauge("standby_memory", "Memory of all standbys.", Unit::Bytes, memory)?;
    let disk = roster.machineries().iter().map(|machinery| {
        let own = machines.iter().filter(|(machine, _)| Arc::ptr_eq(&machine.machinery, machinery));
        (vec![("machinery", machinery.name.clone())], template_disk(own) as f64)
    });
    families.gauge("template_disk", "Disk space of all templates and save images.", Unit::Bytes, disk)?;
    for (flag, meaning, is) in FLAGS {
        let single = machines.iter().filter(|(machine, _)| machine.info().clone_of.is_none());
        let flags = single.map(|(machine, status)| {
            let labels =
                vec![("machinery", machine.machinery.name.clone()), ("machine", machine.name().to_owned())];
            (labels, f64::from(u8::from(is(status))))
        });
        let help = format!("1 if the machine, which is no clone, is {meaning}.");
        families.gauge(&format!("machine_{flag}"), &help, Unit::None, flags)?;
    }
    Clones::of(&machines).gauges(families)
}

/// Returns the disk space of the machines' templates. A machine and its clones have one.
fn template_disk<'a>(machines: impl Iterator<Item = &'a (&'a Arc<Machine>, Status)>) -> u64 {
    let mut templates = BTreeMap::<String, u64>::new();
    for (machine, status) in machines {
        let name = machine.info().clone_of.clone().unwrap_or_else(|| machine.name().to_owned());
        let disk = status.ready.as_ref().map_or(0, |ready| ready.disk);
        let known = templates.entry(name).or_default();
        *known = disk.max(*known);
    }
    templates.values().sum()
}

/// The clones of each machine, by their machinery and the machine's name.
struct Clones<'a>(BTreeMap<(&'a str, String), Vec<&'a Status>>);

impl<'a> Clones<'a> {
    /// Returns the clones among these machines.
    fn of(machines: &'a Machines<'_>) -> Self {
        let mut clones = BTreeMap::<_, Vec<_>>::new();
        for (machine, status) in machines {
            if let Some(of) = &machine.info().clone_of {
                clones.entry((machine.machinery.name.as_str(), of.clone())).or_default().push(status);
            }
        }
        Clones(clones)
    }

    /// Writes all gauges.
    fn gauges(&self, families: &mut Families<'_>) -> fmt::Result {
        let in_state =
            |state: State| self.counts(Some(("state", state.to_string())), move |one| one.state == state);
        let states = State::ALL.into_iter().flat_map(in_state);
        families.gauge("clones", "Clones of each machine in each state.", Unit::None, states)?;
        let ready = |wanted: Readiness| {
            self.counts(Some(("mode", wanted.to_string())), move |one| mode(one) == Some(wanted))
        };
        let help = "Clones of each machine by the mode of their next restore.";
        families.gauge("ready_clones", help, Unit::None, ALL_MODES.into_iter().flat_map(ready))?;
        for (flag, meaning, is) in FLAGS {
            let help = format!("Clones of each machine that are {meaning}.");
            families.gauge(&format!("clones_{flag}"), &help, Unit::None, self.counts(None, is))?;
        }
        Ok(())
    }

    /// Returns the number of clones of each machine for which this holds.
    fn counts(
        &self,
        label: Option<(&'static str, String)>,
        is: impl Fn(&Status) -> bool,
    ) -> Vec<(Labels, f64)> {
        let count = |((machinery, of), clones): (&(&str, String), &Vec<&Status>)| {
            let labels = [("machinery", (*machinery).to_owned()), ("clone_of", of.clone())];
            let count = clones.iter().filter(|status| is(status)).count();
            (labels.into_iter().chain(label.clone()).collect(), count as f64)
        };
        self.0.iter().map(count).collect()
    }
}
