//! Preparations and a new configuration: a standby that is switched off, machines with other names.
//!
//! The suite does not know the machinery's keys. It knows `standby` in `machinery-host.yaml`, which all machineries
//! share, and the names of machines. It finds preparations as files in the machinery's folders, and as events.

use std::path::Path;
use std::time::Duration;

use machinery::config::ConfigFile;
use machinery::{Readiness, Setup, State};
use serde_yaml::{Mapping, Value};

use crate::call::{Call, Outcome};
use crate::folders::{self, Listing};
use crate::recorder::Event;
use crate::report::{CheckFailure, Result, demand};
use crate::session::Session;

/// The time for an event of a call that has returned.
const EVENT_TIME: Duration = Duration::from_secs(2);
/// Names that become one when a plugin replaces special characters, and names of which one begins with the other.
const SIMILAR_NAMES: [[&str; 2]; 2] = [["kit_a", "kit.a"], ["kit_a", "kit_a_2"]];

pub fn reload_standby(session: &Session) -> Result {
    expect_prepare(session)?;
    let (machine, setup) = (session.machine(), session.plugin().setup);
    let skip = |why: String| Err(CheckFailure::Skipped(why));
    if let Outcome::Refusal(error) = session.reload_setup(with_standby(session, "on")?, &[])? {
        return skip(format!("the machinery refuses `standby: on`: {error}"));
    }
    let before = session.events().len();
    session.succeeds(&Call::Prepare, machine)?;
    let readiness = |event: &Event| event.readiness_of(machine);
    session.wait_for_event(before, EVENT_TIME, |event| readiness(event).filter(is_standby));
    match session.events().iter().skip(before).filter_map(readiness).next_back() {
        Some(last) if is_standby(&last) => {}
        Some((mode, reason)) => return skip(format!("{machine} got no standby, but is {mode}: {reason}")),
        None => return skip(format!("the plugin reported no readiness of {machine}")),
    }
    let before = session.events().len();
    let outcome = session.reload_setup(with_standby(session, "off")?, &[])?;
    let reloaded = outcome.expect_success("reload with `standby: off`")?;
    let is_changed = reloaded.changed.iter().any(|changed| changed == machine);
    let is_lost = || {
        session.wait_for_event(before, EVENT_TIME, |event| readiness(event).filter(|now| !is_standby(now)))
    };
    demand!(
        is_changed || is_lost().is_some(),
        "after a reload with `standby: off`, {machine} is still reported as standby"
    );
    session.no_leftovers("after a reload with `standby: off`")?;
    session.restore(machine)?;
    session.stop(machine)?;
    session.reload_setup(setup.clone(), &[])?.expect_success("reload of the original configuration")?;
    Ok(())
}

fn is_standby(readiness: &(Readiness, String)) -> bool {
    readiness.0 == Readiness::Standby
}

/// Returns the setup with this value of `standby` in the machinery's section of `machinery-host.yaml`.
fn with_standby(session: &Session, value: &str) -> Result<Setup> {
    let mut setup = session.plugin().setup.clone();
    let path = setup.config.path.with_file_name("machinery-host.yaml");
    let file = setup.host_config.get_or_insert(ConfigFile { path, text: String::new() });
    let other_form = || CheckFailure::Skipped("machinery-host.yaml has an unusual form".to_owned());
    // An empty file is no mapping.
    let mut root: Option<Mapping> = serde_yaml::from_str(&file.text).map_err(|_| other_form())?;
    let machineries = child(root.get_or_insert_default(), "machineries").ok_or_else(other_form)?;
    let section = child(machineries, session.plugin().plugin.name()).ok_or_else(other_form)?;
    section.insert("standby".into(), value.into());
    file.text = serde_yaml::to_string(&root).map_err(|_| other_form())?;
    Ok(setup)
}

/// Returns the mapping of that key, which is created if it does not exist.
fn child<'m>(mapping: &'m mut Mapping, key: &str) -> Option<&'m mut Mapping> {
    let value = mapping.entry(key.into()).or_insert(Value::Null);
    if value.is_null() {
        *value = Value::Mapping(Mapping::new());
    }
    value.as_mapping_mut()
}

pub fn reload_names(session: &Session) -> Result {
    expect_prepare(session)?;
    let machines: Vec<&str> = session.machines().take(2).collect();
    let &[one, two] = machines.as_slice() else {
        return Err(CheckFailure::Skipped("there is only one machine".to_owned()));
    };
    for [first, second] in SIMILAR_NAMES {
        let files = separate_preparations(session, [(one, first), (two, second)])?;
        new_machine_gets_its_own(session, one, second, files)?;
    }
    let original = session.plugin().setup.config.text.as_str();
    session.reload(original, &[])?.expect_success("reload of the original configuration")?;
    session.restore(one)
}

/// Demands that the machines, under their new names, have separate preparations: those of the second remain when the
/// first is removed. Returns the files of the second one's preparation.
fn separate_preparations(session: &Session, names: [(&str, &str); 2]) -> Result<Listing> {
    let [(_, first), (two, second)] = names;
    rename(session, &names)?;
    let of_first = prepare(session, first)?;
    let before = session.events().len();
    let of_second = prepare(session, second)?;
    remain(session, first, &of_first, before, &format!("{second} was prepared"))?;
    let before = session.events().len();
    rename(session, &[(two, second)])?;
    remain(session, second, &of_second, before, &format!("{first} was removed"))?;
    session.succeeds(&Call::RestoreStart, second)?;
    session.has_state(second, State::Running)?;
    session.stop(second)?;
    Ok(of_second)
}

/// Demands that another machine that gets the name does not use the preparation of the one before, which has these
/// files.
fn new_machine_gets_its_own(session: &Session, machine: &str, name: &str, mut files: Listing) -> Result {
    files.extend(prepare(session, name)?);
    let before = folders::list_all(session.plugin().setup);
    rename(session, &[(machine, name)])?;
    session.succeeds(&Call::Prepare, name)?;
    let now = folders::list_all(session.plugin().setup);
    let is_new = now.keys().any(|path| !before.contains_key(path));
    let old: Vec<_> = files.keys().filter_map(|path| before.get_key_value(path)).collect();
    demand!(
        old.is_empty() || is_new || old.iter().any(|(path, entry)| now.get(*path) != Some(*entry)),
        "another machine has got the name {name}, but its preparation is that of the machine before"
    );
    session.succeeds(&Call::RestoreStart, name)?;
    session.has_state(name, State::Running)?;
    session.stop(name)
}

/// Prepares the machine, and returns the files of its preparation.
fn prepare(session: &Session, machine: &str) -> Result<Listing> {
    let before = folders::list_all(session.plugin().setup);
    session.succeeds(&Call::Prepare, machine)?;
    let mut added = folders::added(folders::list_all(session.plugin().setup), &before);
    added.retain(|_, entry| !entry.is_folder);
    Ok(added)
}

/// Demands that the files of the machine's preparation remain, unless the plugin has reported after the first `before`
/// events that it is lost.
fn remain(session: &Session, machine: &str, files: &Listing, before: usize, when: &str) -> Result {
    let now = folders::list_all(session.plugin().setup);
    let inode = |path: &Path| now.get(path).map(|entry| entry.inode);
    let gone = files.iter().find(|(path, entry)| inode(path) != Some(entry.inode));
    let gone = gone.map(|(path, _)| path.display().to_string());
    let is_reported =
        || session.events().iter().skip(before).any(|event| event.readiness_of(machine).is_some());
    demand!(
        gone.is_none() || is_reported(),
        "when {when}, the preparation of {machine} lost its file {}",
        gone.unwrap_or_default()
    );
    Ok(())
}

/// Reloads with only these machines, each under a new name.
fn rename(session: &Session, names: &[(&str, &str)]) -> Result {
    let text = renamed(&session.plugin().setup.config.text, names);
    let text =
        text.ok_or_else(|| CheckFailure::Skipped("the configuration has an unusual form".to_owned()))?;
    names.iter().for_each(|(_, name)| session.plugin().give_name(name));
    match session.reload(&text, &[])? {
        Outcome::Success(_) => Ok(()),
        Outcome::Refusal(error) => {
            Err(CheckFailure::Skipped(format!("the machinery refuses other names of its machines: {error}")))
        }
    }
}

fn renamed(text: &str, names: &[(&str, &str)]) -> Option<String> {
    let mut file: Mapping = serde_yaml::from_str(text).ok()?;
    let machines = file.get_mut("machines").and_then(Value::as_mapping_mut)?;
    let old = std::mem::take(machines);
    for (machine, name) in names {
        machines.insert((*name).into(), old.get(*machine)?.clone());
    }
    serde_yaml::to_string(&file).ok()
}

fn expect_prepare(session: &Session) -> Result {
    if session.capabilities()?.prepare {
        return Ok(());
    }
    Err(CheckFailure::Skipped("the machinery does not offer prepare".to_owned()))
}
