//! The roster after a reload: machines that stay are the same objects.

use std::collections::HashSet;
use std::sync::Arc;

use machinery::MachineInfo;

use crate::actions::context::ActionSettings;
use crate::events::Events;
use crate::fleet::{Machine, Machinery, Roster};
use crate::load;

/// Returns the roster of the machines that the plugins list now.
pub async fn next(
    old: &Roster,
    answers: Vec<Vec<MachineInfo>>,
    settings: &ActionSettings,
    events: &Events,
) -> Roster {
    let mut machines = Vec::new();
    for (machinery, infos) in old.machineries().iter().zip(answers) {
        let known =
            |info: &MachineInfo| old.find(&info.name).filter(|machine| is_of(machinery, machine)).cloned();
        let added = infos.iter().filter(|info| known(info).is_none()).cloned().collect();
        let mut added = new_machines(machinery, added, settings, events).await.into_iter();
        for info in infos {
            match known(&info) {
                Some(machine) => {
                    machine.set_info(info);
                    machines.push(machine);
                }
                None => machines.extend(added.next()),
            }
        }
    }
    Roster::new(old.machineries().to_vec(), machines)
}

/// Returns those of the names that are machines of that machinery, each once: a plugin may return any name.
pub fn machines_of(machinery: &Arc<Machinery>, mut names: Vec<String>, roster: &Roster) -> Vec<String> {
    let mut seen = HashSet::new();
    names.retain(|name| {
        let own = roster.find(name).filter(|machine| is_of(machinery, machine));
        own.is_some_and(|machine| seen.insert(machine.name().to_owned()))
    });
    names
}

fn is_of(machinery: &Arc<Machinery>, machine: &Machine) -> bool {
    Arc::ptr_eq(&machine.machinery, machinery)
}

/// Makes new machines as at the start of the host, within the time of a reload.
async fn new_machines(
    machinery: &Arc<Machinery>,
    infos: Vec<MachineInfo>,
    settings: &ActionSettings,
    events: &Events,
) -> Vec<Arc<Machine>> {
    let (machinery, events) = (Arc::clone(machinery), events.clone());
    let (timeouts, heal) = (settings.timeouts, settings.heal);
    let made = tokio::task::spawn_blocking(move || {
        load::machines(&machinery, infos, timeouts.state, timeouts.reload, heal, &events)
    });
    made.await.unwrap_or_else(|error| {
        tracing::error!(%error, "new machines are left out: this is a bug of the host");
        Vec::new()
    })
}
