//! A new configuration while machines run.
//!
//! What the suite can change of a configuration that it does not know is which machines there are: in the
//! files of all machineries they stand under `machines`, by name.

use machinery::{ErrorKind, Reloaded};
use serde_yaml::{Mapping, Value};

use crate::call::Call;
use crate::report::{CheckFailure, Result, demand};
use crate::session::{Session, failed};

pub fn reload(session: &Session) -> Result {
    let whole = session.suite().setup.config.text.as_str();
    let used = session.machine();
    session.restore(used)?;
    match session.reload(whole, &[used])? {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            return Err(CheckFailure::Skipped("the machinery does not offer reload".to_owned()));
        }
        outcome => expect(outcome, &[], "what it has already")?,
    }
    session.lives(used)?;
    a_bad_one_changes_nothing(session, used)?;
    match session.machines().find(|other| *other != used).zip(shortened(whole, used)) {
        Some((other, without_used)) => machines_go_and_come(session, other, &without_used),
        None => Ok(()),
    }
}

fn a_bad_one_changes_nothing(session: &Session, used: &str) -> Result {
    let before = session.names()?;
    let file = session.suite().setup.config.path.display().to_string();
    for text in ["machines: [unclosed", "just words", "no_such_key: 1"] {
        match session.reload(text, &[used])? {
            Ok(_) => {
                return Err(CheckFailure::Failed(format!("reload takes {text:?} for a good configuration")));
            }
            Err(error) => {
                demand!(error.to_string().contains(&file), "the error does not name {file}: {error}")
            }
        }
        demand!(session.names()? == before, "{text:?} was refused, and changed the machines");
    }
    session.lives(used)
}

/// One that is in use goes when it is not any more; all others go and come at once.
fn machines_go_and_come(session: &Session, other: &str, without_used: &str) -> Result {
    let whole = session.suite().setup.config.text.as_str();
    let (used, all) = (session.machine(), session.names()?);
    let without_other = shortened(whole, other).unwrap_or_default();
    expect(session.reload(&without_other, &[used])?, &[], &format!("a configuration without {other}"))?;
    is_gone(session, other)?;
    session.lives(used)?;
    expect(
        session.reload(without_used, &[used])?,
        &[used],
        &format!("a configuration without {used}, which runs"),
    )?;
    demand!(session.names()?.iter().any(|name| name == used), "{used} is in use, and gone");
    session.lives(used)?;
    session.restore(other)?;
    session.stop(used)?;
    expect(
        session.reload(without_used, &[other])?,
        &[],
        &format!("a configuration without {used}, which is off"),
    )?;
    is_gone(session, used)?;
    session.lives(other)?;
    session.stop(other)?;
    session.nothing_is_left("after a reload")?;
    expect(session.reload(whole, &[])?, &[], "the whole configuration again")?;
    demand!(
        session.names()? == all,
        "with the same configuration there are other machines: {:?}",
        session.names()
    );
    session.restore(used)
}

fn expect(outcome: machinery::Result<Reloaded>, later: &[&str], what: &str) -> Result {
    let outcome = outcome.map_err(|error| failed(&format!("reload of {what}"), &error))?;
    demand!(
        outcome.changed.is_empty(),
        "reload of {what}: no machine has changed, not {:?}",
        outcome.changed
    );
    demand!(outcome.later == later, "reload of {what}: {later:?} ought to wait, not {:?}", outcome.later);
    Ok(())
}

fn is_gone(session: &Session, machine: &str) -> Result {
    demand!(!session.names()?.iter().any(|name| name == machine), "{machine} is still there after a reload");
    for call in [Call::State, Call::RestoreStart, Call::Stop] {
        session.refuses(&call, machine, ErrorKind::NoSuchMachine)?;
    }
    Ok(())
}

/// The configuration without that machine, if it is of the usual shape.
fn shortened(text: &str, machine: &str) -> Option<String> {
    let mut file: Mapping = serde_yaml::from_str(text).ok()?;
    let machines = file.get_mut("machines").and_then(Value::as_mapping_mut)?;
    machines.remove(machine)?;
    serde_yaml::to_string(&file).ok()
}
