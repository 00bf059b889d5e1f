//! Starts and stops, as in every analysis.

use std::thread;
use std::time::{Duration, Instant};

use machinery::{ErrorKind, State};

use crate::call::Call;
use crate::report::{CheckFailure, Result, demand};
use crate::session::Session;

/// The shortest start that can show whether `state` waits for it.
const MIN_START: Duration = Duration::from_millis(50);

pub fn restore_start(session: &Session) -> Result {
    let machine = session.machine();
    session.restore(machine)?;
    session.is_alive(machine)?;
    session.is_refused(&Call::RestoreStart, machine, ErrorKind::UnexpectedState)?;
    session.is_alive(machine)
}

pub fn stop(session: &Session) -> Result {
    let machine = session.machine();
    session.is_refused(&Call::Stop, machine, ErrorKind::StateReached)?;
    session.restore(machine)?;
    session.stop(machine)?;
    session.no_leftovers("after stop")?;
    session.is_refused(&Call::Stop, machine, ErrorKind::StateReached)?;
    session.has_state(machine, State::Poweroff)
}

pub fn clean_every_time(session: &Session) -> Result {
    if session.spec().counts.is_none() {
        return Err(CheckFailure::Skipped("nothing shows where a run began: BackendSpec::counts".to_owned()));
    }
    for _ in 0..session.spec().rounds {
        session.machines().try_for_each(|machine| one_run(session, machine))?;
        session.no_leftovers("after stop")?;
    }
    Ok(())
}

pub fn norestore_start(session: &Session) -> Result {
    if !session.capabilities()?.norestore_start {
        return not_offered("norestore_start");
    }
    let machine = session.machine();
    session.succeeds(&Call::NorestoreStart, machine)?;
    session.has_state(machine, State::Running)?;
    session.is_cold_started(machine)?;
    session.is_alive(machine)?;
    session.is_refused(&Call::NorestoreStart, machine, ErrorKind::UnexpectedState)?;
    session.is_refused(&Call::RestoreStart, machine, ErrorKind::UnexpectedState)?;
    session.stop(machine)?;
    session.no_leftovers("after stop")?;
    session.restore(machine)
}

pub fn acpi_stop(session: &Session) -> Result {
    if !session.capabilities()?.acpi_stop {
        return not_offered("acpi_stop");
    }
    let machine = session.machine();
    session.is_refused(&Call::AcpiStop, machine, ErrorKind::StateReached)?;
    session.restore(machine)?;
    session.succeeds(&Call::AcpiStop, machine)?;
    session.has_state(machine, State::Poweroff)?;
    session.no_leftovers("after acpi_stop")?;
    session.is_refused(&Call::AcpiStop, machine, ErrorKind::StateReached)?;
    session.is_refused(&Call::Stop, machine, ErrorKind::StateReached)?;
    session.restore(machine)
}

pub fn prepare(session: &Session) -> Result {
    if !session.capabilities()?.prepare {
        return not_offered("prepare");
    }
    let machine = session.machine();
    session.succeeds(&Call::Prepare, machine)?;
    session.has_state(machine, State::Poweroff)?;
    session.restore(machine)?;
    // Any result is acceptable, but the call must not touch a running machine.
    let _ = session.attempt(&Call::Prepare, machine, session.timeout())?;
    session.is_alive(machine)
}

pub fn in_parallel(session: &Session) -> Result {
    if session.machines().count() < 2 {
        return Err(CheckFailure::Skipped("there is only one machine".to_owned()));
    }
    let rounds = |machine: &str| (0..session.spec().rounds).try_for_each(|_| one_run(session, machine));
    let results: Vec<Result> = thread::scope(|scope| {
        let threads: Vec<_> =
            session.machines().map(|machine| scope.spawn(move || rounds(machine))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| suite_panicked())).collect()
    });
    results.into_iter().collect::<Result>()?;
    session.no_leftovers("after stop")
}

pub fn state_at_any_time(session: &Session) -> Result {
    let machine = session.machine();
    let mut waits = Vec::new();
    for _ in 0..session.spec().rounds {
        let (start, longest_wait) = query_state_during_start(session, machine)?;
        session.stop(machine)?;
        // One good round is enough: a busy computer can delay any single call.
        if start < MIN_START || longest_wait < start / 2 {
            return Ok(());
        }
        waits.push(format!("{longest_wait:?} of {start:?}"));
    }
    Err(CheckFailure::Failed(format!("state waits for a start of the machine: {}", waits.join(", "))))
}

/// Makes one run. Demands that the plugin does not report its end, or the end of an earlier run.
fn one_run(session: &Session, machine: &str) -> Result {
    session.restore(machine)?;
    let before = session.events().len();
    session.is_alive(machine)?;
    let events = session.events();
    let end = events.iter().skip(before).find(|event| event.end_of(machine).is_some());
    demand!(end.is_none(), "{machine} runs, but the plugin reported its end: {end:?}");
    session.stop(machine)
}

/// Returns the duration of a start, and the longest duration of a call of `state` during it.
fn query_state_during_start(session: &Session, machine: &str) -> Result<(Duration, Duration)> {
    thread::scope(|scope| {
        let starting = scope.spawn(|| {
            let began = Instant::now();
            session.restore(machine).map(|()| began.elapsed())
        });
        let mut longest = Duration::ZERO;
        while !starting.is_finished() {
            let began = Instant::now();
            session.succeeds(&Call::State, machine)?;
            longest = longest.max(began.elapsed());
        }
        let start = starting.join().unwrap_or_else(|_| suite_panicked())?;
        Ok((start, longest))
    })
}

fn not_offered(call: &str) -> Result {
    Err(CheckFailure::Skipped(format!("the machinery does not offer {call}")))
}

fn suite_panicked<T>() -> Result<T> {
    Err(CheckFailure::Failed("the suite itself panicked".to_owned()))
}
