//! The requirement on runs that a host leaves to the next one.
//!
//! ```text
//! a host of its own starts a machine ─┬─ is killed ──────────────────────────────┬─▶ the next load, adopt: the same run
//!                                     ├─ hands over, ends ───────────────────────┘
//!                                     └─ is killed ─▶ the machine is killed ───────▶ the next load, adopt: an error
//! ```
//!
//! Each way to leave a run follows each start: the count of a restored run shows that it was not booted again, and that of
//! a cold start shows that it was not restored again.

use machinery::{DumpFormat, ErrorKind, Setup, State};

use super::own_host::{adopt, offers_adopt, prepared_beside, running};
use crate::call::{Call, Outcome};
use crate::host_process::{HostProcess, Start};
use crate::report::{CheckFailure, Result, demand, failed};
use crate::session::Session;
use crate::spec::{Death, Hook};

/// A way to leave a run to the next host, and its description.
type Leaving = (fn(&mut HostProcess) -> Result, &'static str);

const LEAVINGS: [Leaving; 2] = [
    (|host| host.kill().map(drop), "after its host was killed"),
    (HostProcess::hand_over, "after its host has handed over"),
];

pub fn adoption(session: &Session) -> Result {
    if !offers_adopt(session)? {
        return Err(CheckFailure::Skipped("the machinery does not offer adopt".to_owned()));
    }
    let (machine, beside) = (session.machine(), prepared_beside(session, session.machine())?);
    let starts: &[Start] = match session.capabilities()?.norestore_start {
        true => &[Start::Restored, Start::Cold],
        false => &[Start::Restored],
    };
    for (start, (leave, when)) in starts.iter().flat_map(|start| LEAVINGS.map(|leaving| (*start, leaving))) {
        let mut host = running(session, machine, start, beside)?;
        leave(&mut host)?;
        in_next_host(session, |next| is_continued(next, machine, start, when))?;
    }
    match &session.spec().death {
        Some(Death { machine, kill }) => {
            let machine = session.machine_or(machine);
            later_death_is_reported(session, machine, kill)?;
            dead_run_is_refused(session, machine, kill)
        }
        None => Ok(()),
    }
}

/// Loads the machinery as the next host, checks it, and ends it.
fn in_next_host<T>(session: &Session, check: impl FnOnce(&Session) -> Result<T>) -> Result<T> {
    let setup = Setup { adopts: true, ..session.plugin().setup.clone() };
    let mut next = Session::load_with(session.plugin(), &setup, session.folder())?;
    let result = next.list_machines().and_then(|()| check(&next));
    let closed = next.close();
    // The first failure is the cause of the later ones.
    let value = result?;
    closed.map(|()| value)
}

/// Adopts all machines, as a host does. Demands that this one runs, and no other.
fn is_adopted(session: &Session, machine: &str, when: &str) -> Result {
    let adopted = adopt(session, machine)?.expect_success(&format!("adopt of {machine} {when}"))?;
    demand!(adopted, "{machine} ran on {when}, but adopt returned false");
    others_have_no_run(session, machine)?;
    session.has_state(machine, State::Running)
}

/// Demands that the machine goes on in the run of its earlier host, which began with that start, and that it is a machine
/// like any other.
fn is_continued(session: &Session, machine: &str, start: Start, when: &str) -> Result {
    is_adopted(session, machine, when)?;
    match start {
        Start::Restored => session.is_restored(machine)?,
        Start::Cold => session.is_cold_started(machine)?,
    }
    session.is_alive(machine)?;
    session.is_refused(&Call::RestoreStart, machine, ErrorKind::UnexpectedState)?;
    // The guest of a cold start may have no picture yet.
    if start == Start::Restored {
        writes_files(session, machine, when)?;
    }
    session.is_alive(machine)?;
    let end = session.events().into_iter().find(|event| event.end_of(machine).is_some());
    demand!(end.is_none(), "{machine} runs {when}, but the plugin reported its end: {end:?}");
    // It uses up an adopted standby, which would be a leftover.
    let other = session.machines().find(|other| *other != machine);
    other.map_or(Ok(()), |other| one_run(session, other))?;
    session.stop(machine)?;
    restores_as_usual(session, machine, "after stop of an adopted run")
}

fn writes_files(session: &Session, machine: &str, when: &str) -> Result {
    let capabilities = session.capabilities()?;
    let path = |what: &str| session.path(&format!("{what} {when}"));
    let calls = [Call::Screenshot(path("screenshot")), Call::DumpMemory(path("dump"), DumpFormat::Elf)];
    let mut offered = calls.iter().filter(|call| call.is_offered(capabilities));
    offered.try_for_each(|call| session.succeeds(call, machine))
}

/// Demands that nothing is left of the machine, and that it restores and stops.
fn restores_as_usual(session: &Session, machine: &str, when: &str) -> Result {
    session.no_leftovers(when)?;
    one_run(session, machine)?;
    session.no_leftovers("after stop")
}

fn one_run(session: &Session, machine: &str) -> Result {
    session.restore(machine)?;
    session.is_alive(machine)?;
    session.stop(machine)
}

/// Adopts all other machines. Demands that they have no run.
fn others_have_no_run(session: &Session, machine: &str) -> Result {
    for other in session.listed().iter().filter(|other| *other != machine) {
        let adopted = adopt(session, other)?.expect_success(&format!("adopt of {other}"))?;
        demand!(!adopted, "{other} had no run, but adopt returned true");
        session.has_state(other, State::Poweroff)?;
    }
    Ok(())
}

/// Demands that the plugin watches an adopted run.
fn later_death_is_reported(session: &Session, machine: &str, kill: &Hook) -> Result {
    running(session, machine, Start::Restored, None)?.kill()?;
    in_next_host(session, |next| {
        is_adopted(next, machine, "after its host was killed")?;
        next.run_hook("killing", machine, kill)?;
        ends_by_itself(next, machine)?;
        restores_as_usual(next, machine, "after an adopted run has died")
    })
}

/// Demands that the end of an adopted run is reported.
fn ends_by_itself(session: &Session, machine: &str) -> Result {
    let end = session.wait_for_event(0, session.timeout(), |event| event.end_of(machine));
    demand!(end.is_some(), "{machine} died after adopt, but the plugin reported no state_changed");
    session.ensure_off(machine)
}

/// Demands that `adopt` returns an error for a run that has died after its host. One round with an error is enough: the
/// function that kills the machine need not wait for the end.
fn dead_run_is_refused(session: &Session, machine: &str, kill: &Hook) -> Result {
    for _ in 0..session.spec().rounds {
        running(session, machine, Start::Restored, None)?.kill()?;
        session.run_hook("killing", machine, kill)?;
        if in_next_host(session, |next| is_refused(next, machine))? {
            return Ok(());
        }
    }
    let how = format!("{machine} was killed while no host watched it, but adopt returned no error");
    Err(CheckFailure::Failed(how))
}

/// Reports whether `adopt` returned an error. Demands that the machine is off, and restores as usual.
fn is_refused(session: &Session, machine: &str) -> Result<bool> {
    let outcome = adopt(session, machine)?;
    let when = "after a run that had died was adopted";
    match &outcome {
        Outcome::Refusal(error) if error.reason().trim().is_empty() => {
            return Err(failed(&format!("adopt of {machine} failed without a reason"), error));
        }
        Outcome::Refusal(_) => session.has_state(machine, State::Poweroff)?,
        Outcome::Success(true) => ends_by_itself(session, machine)?,
        Outcome::Success(false) => {
            let how = format!("{machine} was killed while no host watched it, but adopt returned false");
            return Err(CheckFailure::Failed(how));
        }
    }
    others_have_no_run(session, machine)?;
    restores_as_usual(session, machine, when)?;
    Ok(matches!(outcome, Outcome::Refusal(_)))
}
