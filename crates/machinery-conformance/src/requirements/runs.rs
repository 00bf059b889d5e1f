//! Starting and stopping, as every analysis does.

use std::thread;
use std::time::{Duration, Instant};

use machinery::{ErrorKind, State};

use crate::call::Call;
use crate::report::{CheckFailure, Result, demand};
use crate::session::Session;

/// A start that is over sooner is too short to tell whether anything waited for it.
const TELLING: Duration = Duration::from_millis(50);

pub fn restore_start(session: &Session) -> Result {
    let machine = session.machine();
    session.restore(machine)?;
    session.lives(machine)?;
    session.refuses(&Call::RestoreStart, machine, ErrorKind::UnexpectedState)?;
    session.lives(machine)
}

pub fn stop(session: &Session) -> Result {
    let machine = session.machine();
    session.refuses(&Call::Stop, machine, ErrorKind::StateReached)?;
    session.restore(machine)?;
    session.stop(machine)?;
    session.nothing_is_left("after stop")?;
    session.refuses(&Call::Stop, machine, ErrorKind::StateReached)?;
    session.is(machine, State::Poweroff)
}

pub fn clean_every_time(session: &Session) -> Result {
    if session.spec().counts.is_none() {
        return Err(CheckFailure::Skipped("no way is known to tell where a run began".to_owned()));
    }
    for _ in 0..session.spec().rounds {
        session.machines().try_for_each(|machine| one_run(session, machine))?;
        session.nothing_is_left("after stop")?;
    }
    Ok(())
}

pub fn norestore_start(session: &Session) -> Result {
    if !session.capabilities()?.norestore_start {
        return is_missing("norestore_start");
    }
    let machine = session.machine();
    session.does(&Call::NorestoreStart, machine)?;
    session.is(machine, State::Running)?;
    session.is_cold(machine)?;
    session.lives(machine)?;
    session.refuses(&Call::NorestoreStart, machine, ErrorKind::UnexpectedState)?;
    session.refuses(&Call::RestoreStart, machine, ErrorKind::UnexpectedState)?;
    session.stop(machine)?;
    session.nothing_is_left("after stop")?;
    session.restore(machine)
}

pub fn acpi_stop(session: &Session) -> Result {
    if !session.capabilities()?.acpi_stop {
        return is_missing("acpi_stop");
    }
    let machine = session.machine();
    session.refuses(&Call::AcpiStop, machine, ErrorKind::StateReached)?;
    session.restore(machine)?;
    session.does(&Call::AcpiStop, machine)?;
    session.is(machine, State::Poweroff)?;
    session.nothing_is_left("after acpi_stop")?;
    session.refuses(&Call::AcpiStop, machine, ErrorKind::StateReached)?;
    session.refuses(&Call::Stop, machine, ErrorKind::StateReached)?;
    session.restore(machine)
}

pub fn prepare(session: &Session) -> Result {
    if !session.capabilities()?.prepare {
        return is_missing("prepare");
    }
    let machine = session.machine();
    session.does(&Call::Prepare, machine)?;
    session.is(machine, State::Poweroff)?;
    session.restore(machine)?;
    // Whatever it says about a running machine, that machine is not its to touch.
    let _ = session.attempt(&Call::Prepare, machine, session.timeout())?;
    session.lives(machine)
}

pub fn in_parallel(session: &Session) -> Result {
    if session.machines().count() < 2 {
        return Err(CheckFailure::Skipped("there is only one machine".to_owned()));
    }
    let rounds = |machine: &str| (0..session.spec().rounds).try_for_each(|_| one_run(session, machine));
    let results: Vec<Result> = thread::scope(|scope| {
        let threads: Vec<_> =
            session.machines().map(|machine| scope.spawn(move || rounds(machine))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| is_panicked())).collect()
    });
    results.into_iter().collect::<Result>()?;
    session.nothing_is_left("after stop")
}

pub fn state_at_any_time(session: &Session) -> Result {
    let machine = session.machine();
    let mut waits = Vec::new();
    for _ in 0..session.spec().rounds {
        let (start, longest_wait) = ask_during_start(session, machine)?;
        session.stop(machine)?;
        // Once is enough: on a busy machine anything can take long, but never everything.
        if start < TELLING || longest_wait < start / 2 {
            return Ok(());
        }
        waits.push(format!("{longest_wait:?} of {start:?}"));
    }
    Err(CheckFailure::Failed(format!("state waits while the machine is being started: {}", waits.join(", "))))
}

/// A run like any other, of which nothing alarming is told: not even the end of the run before.
fn one_run(session: &Session, machine: &str) -> Result {
    session.restore(machine)?;
    let before = session.heard().len();
    session.lives(machine)?;
    let heard = session.heard();
    let alarm = heard.iter().skip(before).find(|heard| heard.end_of(machine).is_some());
    demand!(alarm.is_none(), "{machine} runs, and yet this was told: {alarm:?}");
    session.stop(machine)
}

/// How long a start took, and the longest that `state` took meanwhile.
fn ask_during_start(session: &Session, machine: &str) -> Result<(Duration, Duration)> {
    thread::scope(|scope| {
        let starting = scope.spawn(|| {
            let began = Instant::now();
            session.restore(machine).map(|()| began.elapsed())
        });
        let mut longest = Duration::ZERO;
        while !starting.is_finished() {
            let began = Instant::now();
            session.does(&Call::State, machine)?;
            longest = longest.max(began.elapsed());
        }
        let start = starting.join().unwrap_or_else(|_| is_panicked())?;
        Ok((start, longest))
    })
}

fn is_missing(what: &str) -> Result {
    Err(CheckFailure::Skipped(format!("the machinery does not offer {what}")))
}

fn is_panicked<T>() -> Result<T> {
    Err(CheckFailure::Failed("the suite itself panicked".to_owned()))
}
