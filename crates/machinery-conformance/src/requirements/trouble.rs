//! Faults: starts that fail, machines that die, deadlines that are too short.

use std::time::{Duration, Instant};

use machinery::host::Instance;
use machinery::{DumpFormat, ErrorKind, State};

use crate::call::{Call, Outcome};
use crate::report::{CheckFailure, Result, demand, failed};
use crate::session::Session;
use crate::spec::Death;

pub fn failed_start(session: &Session) -> Result {
    let Some(breakage) = &session.spec().breakage else {
        return Err(CheckFailure::Skipped("the spec has no breakage to make a start fail".to_owned()));
    };
    let machine = breakage.machine.as_str();
    session.run_hook("breaking the restore of", machine, &breakage.break_restore)?;
    let result = fails_cleanly(session, machine);
    session.run_hook("repairing", machine, &breakage.repair)?;
    result?;
    session.restore(machine)?;
    session.is_alive(machine)
}

fn fails_cleanly(session: &Session, machine: &str) -> Result {
    let began = Instant::now();
    let error = session.fails(&Call::RestoreStart, machine)?;
    // A start that cannot succeed must not wait for its deadline.
    demand!(
        began.elapsed() < session.timeout(),
        "the failed start of {machine} waited for its deadline: {error}"
    );
    session.has_state(machine, State::Poweroff)?;
    session.no_leftovers("after a failed start")
}

pub fn diagnose(session: &Session) -> Result {
    let machine = session.machine();
    no_machine_is_unusable(session, "before any start")?;
    session.restore(machine)?;
    no_machine_is_unusable(session, &format!("while {machine} runs"))?;
    session.is_alive(machine)?;
    session.stop(machine)?;
    no_machine_is_unusable(session, &format!("after {machine} ran"))
}

fn no_machine_is_unusable(session: &Session, when: &str) -> Result {
    let names: Vec<String> = session.machines().map(str::to_owned).collect();
    let diagnose = move |instance: &Instance, deadline| instance.diagnose(&names, deadline);
    let diagnoses = session.call("diagnose", diagnose)?;
    match diagnoses.into_iter().find_map(|diagnosis| diagnosis.unusable.zip(Some(diagnosis.machine))) {
        Some((error, machine)) => {
            Err(failed(&format!("{when}, {machine} works but is reported as unusable"), &error))
        }
        None => Ok(()),
    }
}

pub fn death(session: &Session) -> Result {
    let Some(Death { machine, kill }) = &session.spec().death else {
        return Err(CheckFailure::Skipped("the spec has no death to kill a machine".to_owned()));
    };
    session.succeeds(&Call::RestoreStart, machine)?;
    session.run_hook("killing", machine, kill)?;
    let state = end_is_reported(session, machine)?;
    session.has_state(machine, state)?;
    session.ensure_off(machine)?;
    session.no_leftovers("after a machine died and was stopped")?;
    session.restore(machine)
}

fn end_is_reported(session: &Session, machine: &str) -> Result<State> {
    let end = session.wait_for_event(|event| event.end_of(machine));
    end.ok_or_else(|| {
        CheckFailure::Failed(format!("{machine} died, but the plugin reported no state_changed"))
    })
}

/// Repeats each start with a longer deadline, from zero on, until it succeeds: the deadline then passes at every
/// stage of a start.
pub fn start_deadlines(session: &Session) -> Result {
    let capabilities = session.capabilities()?;
    for call in [Call::RestoreStart, Call::NorestoreStart].iter().filter(|call| call.is_offered(capabilities))
    {
        start_with_short_deadlines(session, call)?;
        session.stop(session.machine())?;
        session.no_leftovers("after stop")?;
    }
    session.restore(session.machine())
}

fn start_with_short_deadlines(session: &Session, call: &Call) -> Result {
    let machine = session.machine();
    let mut limit = Duration::ZERO;
    while !finished_in_time(session, call, machine, limit)? {
        session.has_state(machine, State::Poweroff)?;
        session.no_leftovers(&format!("after {} that timed out after {limit:?}", call.name()))?;
        limit = longer_limit(session, limit * 3 / 2)?;
    }
    session.has_state(machine, State::Running)
}

pub fn deadlines(session: &Session) -> Result {
    let capabilities = session.capabilities()?;
    let calls = [
        Call::State,
        Call::Screenshot(session.path("screen-short-deadline")),
        Call::DumpMemory(session.path("dump-short-deadline"), DumpFormat::Elf),
        Call::AcpiStop,
        Call::Stop,
    ];
    version_with_zero_deadline(session)?;
    calls
        .iter()
        .filter(|call| call.is_offered(capabilities))
        .try_for_each(|call| call_with_short_deadlines(session, call))?;
    session.restore(session.machine())
}

fn call_with_short_deadlines(session: &Session, call: &Call) -> Result {
    let machine = session.machine();
    let mut limit = Duration::ZERO;
    loop {
        session.restore(machine)?;
        let finished = finished_in_time(session, call, machine, limit)?;
        session.ensure_off(machine)?;
        session.no_leftovers(&format!("after {} with a deadline of {limit:?} and a stop", call.name()))?;
        if finished {
            return Ok(());
        }
        // After the stop: an abandoned call of the hypervisor could still have written until then.
        call.file().map_or(Ok(()), |file| session.no_file_at(file))?;
        limit = longer_limit(session, limit * 4)?;
    }
}

fn longer_limit(session: &Session, limit: Duration) -> Result<Duration> {
    demand!(limit < session.timeout(), "a call that must succeed did not do so within {limit:?}");
    Ok(limit + Duration::from_millis(1))
}

/// Reports whether the call succeeded in time. Demands that any other result is a timeout.
fn finished_in_time(session: &Session, call: &Call, machine: &str, limit: Duration) -> Result<bool> {
    match session.attempt(call, machine, limit)? {
        Outcome::Success(()) => Ok(true),
        Outcome::Refusal(error) if error.kind() == ErrorKind::Timeout => Ok(false),
        Outcome::Refusal(error) => Err(failed(
            &format!("{} with a deadline of {limit:?} must succeed or time out, but returned", call.name()),
            &error,
        )),
    }
}

fn version_with_zero_deadline(session: &Session) -> Result {
    match session.try_call("version", Duration::ZERO, Instance::version)? {
        Outcome::Refusal(error) if error.kind() != ErrorKind::Timeout => {
            Err(failed("version with a deadline of zero", &error))
        }
        _ => Ok(()),
    }
}
