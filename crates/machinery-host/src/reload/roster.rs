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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actions::lab::Lab;
    use crate::fleet::fake_plugin::{FakePlugin, info};
    use machinery::State;

    #[tokio::test]
    async fn next_roster_keeps_machines_of_the_same_machinery_and_name() {
        let (plugin, events) = (FakePlugin::default(), Events::default());
        let kept = plugin.machine("kept", &events);
        let (first, second) = (Arc::clone(&kept.machinery), plugin.machinery("second"));
        let moved =
            Arc::new(Machine::new(info("moved"), Arc::clone(&second), State::Poweroff, events.clone()));
        let old = Roster::new(
            vec![Arc::clone(&first), Arc::clone(&second)],
            vec![Arc::clone(&kept), Arc::clone(&moved)],
        );
        plugin.set_state("new", State::Running);
        let changed = MachineInfo { ip: "10.0.0.9".into(), ..info("kept") };
        let answers = vec![vec![info("new"), changed, info("moved")], Vec::new()];
        let next = next(&old, answers, &Lab::new("").context.settings(), &events).await;
        let names: Vec<_> = next.machines().iter().map(|machine| machine.name()).collect();
        assert_eq!((names, next.machineries().len()), (vec!["new", "kept", "moved"], 2));
        assert!(next.has(&kept) && !next.has(&moved), "another machinery has the name now");
        assert_eq!(
            (kept.info().ip.as_str(), next.find("new").unwrap().status().state),
            ("10.0.0.9", State::Running)
        );
        let of =
            |machinery| machines_of(machinery, ["kept", "x", "kept", "new"].map(String::from).into(), &next);
        assert_eq!((of(&first), of(&second)), (vec!["kept".into(), "new".into()], Vec::<String>::new()));
    }
}
