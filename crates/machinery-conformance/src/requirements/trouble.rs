//! What goes wrong: starts that fail, machines that die, time that is short.

use std::time::{Duration, Instant};

use machinery::host::Instance;
use machinery::{DumpFormat, ErrorKind, State};

use crate::call::Call;
use crate::report::{CheckFailure, Result, demand};
use crate::session::{Session, failed};
use crate::spec::Death;

pub fn failed_start(session: &Session) -> Result {
    let Some(breakage) = &session.spec().breakage else {
        return Err(CheckFailure::Skipped("no way is known to make a start fail".to_owned()));
    };
    let machine = breakage.machine.as_str();
    session.act("spoiling", machine, &breakage.spoil)?;
    let failed = fails_cleanly(session, machine);
    session.act("mending", machine, &breakage.mend)?;
    failed?;
    session.restore(machine)?;
    session.lives(machine)
}

fn fails_cleanly(session: &Session, machine: &str) -> Result {
    let began = Instant::now();
    let error = session.fails(&Call::RestoreStart, machine)?;
    // What cannot succeed is not to be waited for.
    demand!(
        began.elapsed() < session.timeout(),
        "that {machine} cannot start took all the time there was: {error}"
    );
    session.is(machine, State::Poweroff)?;
    session.nothing_is_left("after a start that failed")
}

pub fn diagnose(session: &Session) -> Result {
    let machine = session.machine();
    nothing_is_unusable(session, "before any start")?;
    session.restore(machine)?;
    nothing_is_unusable(session, &format!("while {machine} runs"))?;
    session.lives(machine)?;
    session.stop(machine)?;
    nothing_is_unusable(session, &format!("after {machine} ran"))
}

fn nothing_is_unusable(session: &Session, when: &str) -> Result {
    let names: Vec<String> = session.machines().map(str::to_owned).collect();
    let look = move |instance: &Instance, deadline| instance.diagnose(&names, deadline);
    let diagnoses = session.answer("diagnose", look)?;
    match diagnoses.into_iter().find_map(|diagnosis| diagnosis.unusable.zip(Some(diagnosis.machine))) {
        Some((error, machine)) => {
            Err(failed(&format!("{when}, {machine} is reported as unusable and works"), &error))
        }
        None => Ok(()),
    }
}

pub fn death(session: &Session) -> Result {
    let Some(Death { machine, kill }) = &session.spec().death else {
        return Err(CheckFailure::Skipped("no way is known to end a machine from outside".to_owned()));
    };
    session.does(&Call::RestoreStart, machine)?;
    session.act("ending", machine, kill)?;
    let state = hears_the_end(session, machine)?;
    session.is(machine, state)?;
    session.settle(machine)?;
    session.nothing_is_left("after a machine died and was stopped")?;
    session.restore(machine)
}

fn hears_the_end(session: &Session, machine: &str) -> Result<State> {
    let end = session.wait_to_hear(|heard| heard.end_of(machine));
    end.ok_or_else(|| CheckFailure::Failed(format!("{machine} died, and nobody was told by state_changed")))
}

/// Wherever the end of its time finds it: so it is given more and more, from none at all, until it
/// makes it.
pub fn start_deadlines(session: &Session) -> Result {
    let able = session.capabilities()?;
    for call in [Call::RestoreStart, Call::NorestoreStart].iter().filter(|call| call.is_offered(able)) {
        hurried_start(session, call)?;
        session.stop(session.machine())?;
        session.nothing_is_left("after stop")?;
    }
    session.restore(session.machine())
}

fn hurried_start(session: &Session, call: &Call) -> Result {
    let machine = session.machine();
    let mut limit = Duration::ZERO;
    while !made_it(session, call, machine, limit)? {
        session.is(machine, State::Poweroff)?;
        session.nothing_is_left(&format!("after {} that did not make it in {limit:?}", call.name()))?;
        limit = longer(session, limit * 3 / 2)?;
    }
    session.is(machine, State::Running)
}

pub fn deadlines(session: &Session) -> Result {
    let able = session.capabilities()?;
    let calls = [
        Call::State,
        Call::Screenshot(session.path("screen-in-no-time")),
        Call::DumpMemory(session.path("dump-in-no-time"), DumpFormat::Elf),
        Call::AcpiStop,
        Call::Stop,
    ];
    version_in_no_time(session)?;
    calls.iter().filter(|call| call.is_offered(able)).try_for_each(|call| hurried(session, call))?;
    session.restore(session.machine())
}

fn hurried(session: &Session, call: &Call) -> Result {
    let machine = session.machine();
    let mut limit = Duration::ZERO;
    loop {
        session.restore(machine)?;
        let made_it = made_it(session, call, machine, limit)?;
        session.settle(machine)?;
        session.nothing_is_left(&format!("after {} in {limit:?} and a stop", call.name()))?;
        if made_it {
            return Ok(());
        }
        // Only now: a hypervisor that was left alone with the call might still have written.
        call.file().map_or(Ok(()), |file| session.nothing_is_at(file))?;
        limit = longer(session, limit * 4)?;
    }
}

fn longer(session: &Session, limit: Duration) -> Result<Duration> {
    demand!(limit < session.timeout(), "what ought to succeed did not in {limit:?}");
    Ok(limit + Duration::from_millis(1))
}

/// Whether the call made it in time. That it did not is the only other thing it may say.
fn made_it(session: &Session, call: &Call, machine: &str, limit: Duration) -> Result<bool> {
    match session.attempt(call, machine, limit)? {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::Timeout => Ok(false),
        Err(error) => {
            Err(failed(&format!("{} in {limit:?} ought to time out, it said", call.name()), &error))
        }
    }
}

fn version_in_no_time(session: &Session) -> Result {
    match session.ask("version", Duration::ZERO, Instance::version)? {
        Err(error) if error.kind() != ErrorKind::Timeout => Err(failed("version in no time", &error)),
        _ => Ok(()),
    }
}
