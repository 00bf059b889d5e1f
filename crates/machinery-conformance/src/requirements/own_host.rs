//! Requirements that need a host process of its own: one that is killed, and one whose resources are counted.

use std::time::Duration;

use machinery::host::Instance;
use machinery::{ErrorKind, Setup, State};

use crate::call::Outcome;
use crate::host_process::{HostProcess, Job, Reply, Request, Start};
use crate::plugin_under_test::GRACE;
use crate::processes::{self, Process};
use crate::report::{CheckFailure, Result, demand};
use crate::session::Session;

/// The least number of runs that shows a leak of each run.
const LEAK_ROUNDS: usize = 5;

pub fn no_leaks(session: &Session) -> Result {
    let rounds = session.spec().rounds.max(LEAK_ROUNDS);
    let mut host = start(session, session.machine(), Job::CountResources { rounds })?;
    match host.wait()? {
        Reply::Counted(growth) => {
            demand!(growth.is_empty(), "after {rounds} runs, the host has {}", growth.join(", "));
            Ok(())
        }
        reply => unexpected(&reply),
    }
}

pub fn killed_host(session: &Session) -> Result {
    let machine = session.machine();
    // A host that adopts does not know before whether the plugin does.
    let setup = Setup { adopts: !offers_adopt(session)?, ..session.plugin().setup.clone() };
    let mut host = running(session, machine, Start::Restored, prepared_beside(session, machine)?)?;
    let started = host.kill()?;
    let mut next = Session::load_with(session.plugin(), &setup, session.folder())?;
    let result = next.list_machines().and_then(|()| nothing_is_left(&next, machine, &started));
    result.and(next.close())
}

/// Demands that the next host finds nothing of the killed one, and that the machine starts again.
fn nothing_is_left(session: &Session, machine: &str, started: &[Process]) -> Result {
    session.machines().try_for_each(|machine| session.has_state(machine, State::Poweroff))?;
    let running: Vec<String> =
        processes::running(started).iter().map(|left| format!("{} ({})", left.name, left.id)).collect();
    demand!(
        running.is_empty(),
        "the host was killed and the next one loaded, but these processes still run: {}",
        running.join(", ")
    );
    session.no_leftovers("after a host was killed and the next one loaded")?;
    session.restore(machine)?;
    session.is_alive(machine)?;
    session.stop(machine)?;
    session.no_leftovers("after stop")
}

/// Reports whether the plugin has the method `adopt`. Demands that it finds no run, because there is none.
pub fn offers_adopt(session: &Session) -> Result<bool> {
    match adopt(session, session.machine())? {
        Outcome::Refusal(error) if error.kind() == ErrorKind::Unsupported => Ok(false),
        outcome => {
            let adopted = outcome.expect_success("adopt without a run")?;
            demand!(!adopted, "adopt returned true, but no host had left a run");
            Ok(true)
        }
    }
}

/// Calls `adopt`, and returns the plugin's result.
pub fn adopt(session: &Session, machine: &str) -> Result<Outcome<bool>> {
    let name = machine.to_owned();
    let call = move |instance: &Instance, deadline| instance.adopt(&name, deadline);
    session.try_call(&format!("adopt of {machine}"), session.timeout(), call)
}

/// Returns another machine than that one, if there is one and the machinery offers `prepare`.
pub fn prepared_beside<'s>(session: &'s Session, machine: &str) -> Result<Option<&'s str>> {
    // A session whose machinery was dropped has no capabilities any more.
    let offers = session.capabilities()?.prepare;
    Ok(session.machines().find(|other| *other != machine).filter(|_| offers))
}

/// Starts a host process, in which the machine runs and the other one is prepared.
pub fn running(session: &Session, machine: &str, how: Start, prepare: Option<&str>) -> Result<HostProcess> {
    let mut host = start(session, machine, Job::Run { start: how, prepare: prepare.map(str::to_owned) })?;
    match host.wait()? {
        Reply::Running => Ok(host),
        reply => unexpected(&reply),
    }
}

/// Starts a host process of the plugin. The machinery of the session is dropped first, because two hosts must not
/// share the machines.
fn start(session: &Session, machine: &str, job: Job) -> Result<HostProcess> {
    let Some(program) = &session.spec().host_program else {
        return Err(CheckFailure::Skipped(
            "no program becomes a host process: BackendSpec::host_program".to_owned(),
        ));
    };
    session.unload()?;
    let plugin = session.plugin();
    let request = Request {
        plugin: plugin.plugin.path().to_owned(),
        setup: plugin.setup.clone(),
        machine: machine.to_owned(),
        timeout: session.timeout(),
        job,
    };
    let patience: Duration = session.timeout() + GRACE;
    HostProcess::start(program, &request, patience)
}

fn unexpected<T>(reply: &Reply) -> Result<T> {
    Err(CheckFailure::Failed(format!("the host process sent an unexpected reply: {reply:?}")))
}
