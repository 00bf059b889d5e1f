//! A new configuration while machines run.
//!
//! The suite does not know the machinery's keys. It can only add and remove machines, because the files of all
//! machineries list them by name under `machines`.

use machinery::{ErrorKind, Reloaded};
use serde_yaml::{Mapping, Value};

use crate::call::{Call, Outcome};
use crate::report::{CheckFailure, Result, demand};
use crate::session::Session;

pub fn reload(session: &Session) -> Result {
    let full = session.plugin().setup.config.text.as_str();
    let first = session.machine();
    session.restore(first)?;
    match session.reload(full, &[first])? {
        Outcome::Refusal(error) if error.kind() == ErrorKind::Unsupported => {
            return Err(CheckFailure::Skipped("the machinery does not offer reload".to_owned()));
        }
        outcome => expect_deferred(outcome, &[], "the current configuration")?,
    }
    session.is_alive(first)?;
    invalid_configuration_changes_nothing(session, first)?;
    match session.machines().find(|other| *other != first).zip(without_machine(full, first)) {
        Some((other, without_first)) => machines_are_removed_and_added(session, other, &without_first),
        None => Ok(()),
    }
}

fn invalid_configuration_changes_nothing(session: &Session, first: &str) -> Result {
    let before = session.names()?;
    let file = session.plugin().setup.config.path.display().to_string();
    for text in ["machines: [unclosed", "just words", "no_such_key: 1"] {
        match session.reload(text, &[first])? {
            Outcome::Success(_) => {
                return Err(CheckFailure::Failed(format!(
                    "reload must refuse the configuration {text:?}, but it succeeded"
                )));
            }
            Outcome::Refusal(error) => {
                demand!(error.to_string().contains(&file), "the error does not name {file}: {error}")
            }
        }
        demand!(session.names()? == before, "reload refused {text:?}, but changed the machines");
    }
    session.is_alive(first)
}

/// Demands that a machine in use is removed once it is free, and that all others are removed and added at once.
fn machines_are_removed_and_added(session: &Session, other: &str, without_first: &str) -> Result {
    let full = session.plugin().setup.config.text.as_str();
    let (first, all) = (session.machine(), session.names()?);
    let without_other = without_machine(full, other).unwrap_or_default();
    expect_deferred(
        session.reload(&without_other, &[first])?,
        &[],
        &format!("a configuration without {other}"),
    )?;
    is_removed(session, other)?;
    session.is_alive(first)?;
    expect_deferred(
        session.reload(without_first, &[first])?,
        &[first],
        &format!("a configuration without {first}, which runs"),
    )?;
    demand!(session.names()?.iter().any(|name| name == first), "{first} is in use, but reload removed it");
    session.is_alive(first)?;
    session.restore(other)?;
    session.stop(first)?;
    expect_deferred(
        session.reload(without_first, &[other])?,
        &[],
        &format!("a configuration without {first}, which is off"),
    )?;
    is_removed(session, first)?;
    session.is_alive(other)?;
    session.stop(other)?;
    session.no_leftovers("after a reload")?;
    expect_deferred(session.reload(full, &[])?, &[], "the full configuration")?;
    demand!(
        session.names()? == all,
        "the machines differ after a reload of the original configuration: {:?}",
        session.names()
    );
    session.restore(first)
}

fn expect_deferred(outcome: Outcome<Reloaded>, deferred: &[&str], what: &str) -> Result {
    let outcome = outcome.expect_success(&format!("reload of {what}"))?;
    demand!(
        outcome.changed.is_empty(),
        "reload of {what} must change no machine, but changed {:?}",
        outcome.changed
    );
    demand!(
        outcome.later == deferred,
        "reload of {what} must defer {deferred:?}, but deferred {:?}",
        outcome.later
    );
    Ok(())
}

fn is_removed(session: &Session, machine: &str) -> Result {
    demand!(
        !session.names()?.iter().any(|name| name == machine),
        "{machine} still exists after a reload without it"
    );
    for call in [Call::State, Call::RestoreStart, Call::Stop] {
        session.is_refused(&call, machine, ErrorKind::NoSuchMachine)?;
    }
    Ok(())
}

/// Returns the configuration without that machine, if it has the usual form.
fn without_machine(text: &str, machine: &str) -> Option<String> {
    let mut file: Mapping = serde_yaml::from_str(text).ok()?;
    let machines = file.get_mut("machines").and_then(Value::as_mapping_mut)?;
    machines.remove(machine)?;
    serde_yaml::to_string(&file).ok()
}
