//! Faults: starts that fail, machines that die, deadlines that are too short.

use std::time::{Duration, Instant};

use machinery::host::Instance;
use machinery::{DumpFormat, ErrorKind, State};

use crate::call::{Call, Outcome};
use crate::report::{CheckFailure, Result, demand, failed};
use crate::session::Session;
use crate::spec::{Death, Hook, Pause};

/// The time after which an event is late, and the time of a call that need not succeed.
const LATE: Duration = Duration::from_secs(2);

pub fn failed_start(session: &Session) -> Result {
    let Some(breakage) = &session.spec().breakage else {
        return Err(CheckFailure::Skipped(
            "nothing makes a start fail: BackendSpec::breakage, or --break and --mend".to_owned(),
        ));
    };
    let machine = session.machine_or(&breakage.machine);
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
    // A start that cannot succeed must not wait for its deadline, which it may see a moment early.
    demand!(
        began.elapsed() < session.timeout() * 9 / 10,
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
        return Err(CheckFailure::Skipped(
            "nothing kills a machine: BackendSpec::death, or --kill".to_owned(),
        ));
    };
    let machine = session.machine_or(machine);
    let mut waits = Vec::new();
    for _ in 0..session.spec().rounds {
        let wait = is_killed(session, machine, kill)?;
        // One good round is enough: a busy computer can delay any single event.
        if wait < LATE {
            return session.restore(machine);
        }
        waits.push(format!("{wait:?}"));
    }
    let how = format!("the end of {machine} was reported late, after {}", waits.join(", "));
    session.plugin().since_1_1(Err(CheckFailure::Failed(how)))
}

/// Kills the machine in a run. Returns the time until the plugin reported its end.
fn is_killed(session: &Session, machine: &str, kill: &Hook) -> Result<Duration> {
    let before = session.events().len();
    session.succeeds(&Call::RestoreStart, machine)?;
    session.run_hook("killing", machine, kill)?;
    let began = Instant::now();
    let end = session.wait_for_event(before, session.timeout(), |event| event.end_of(machine));
    let wait = began.elapsed();
    let Some(state) = end else {
        let how = format!("{machine} died, but the plugin reported no state_changed");
        return Err(CheckFailure::Failed(how));
    };
    session.has_state(machine, state)?;
    session.ensure_off(machine)?;
    session.no_leftovers("after a machine died and was stopped")?;
    Ok(wait)
}

/// Pauses the machine without the plugin. A state from the plugin's memory is still `running`. A hypervisor that does
/// not answer is no violation, because it may be paused with its guest.
pub fn live_state(session: &Session) -> Result {
    let Some(Pause { machine, pause, resume }) = &session.spec().pause else {
        return Err(CheckFailure::Skipped(
            "nothing pauses a machine: BackendSpec::pause, or --pause and --resume".to_owned(),
        ));
    };
    let machine = session.machine_or(machine);
    session.succeeds(&Call::RestoreStart, machine)?;
    // A plugin may answer the first call from the event of the start.
    session.has_state(machine, State::Running)?;
    session.run_hook("pausing", machine, pause)?;
    let name = machine.to_owned();
    let state = session.try_call("state", LATE, move |instance, deadline| instance.state(&name, deadline));
    session.run_hook("resuming", machine, resume)?;
    demand!(
        !matches!(state?, Outcome::Success(State::Running)),
        "{machine} was paused without the plugin, but its state is still running"
    );
    session.has_state(machine, State::Running)?;
    session.stop(machine)
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
