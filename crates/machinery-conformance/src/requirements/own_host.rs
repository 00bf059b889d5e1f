//! Requirements that need a host process of its own: one that is killed, and one whose resources are counted.

use std::time::Duration;

use machinery::State;

use crate::host_process::{HostProcess, Job, Reply, Request};
use crate::plugin_under_test::GRACE;
use crate::processes::{self, Process};
use crate::report::{CheckFailure, Result, demand};
use crate::session::Session;

/// The least number of runs that shows a leak of each run.
const LEAK_ROUNDS: usize = 5;

pub fn no_leaks(session: &Session) -> Result {
    let rounds = session.spec().rounds.max(LEAK_ROUNDS);
    let mut host = start(session, Job::CountResources { rounds })?;
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
    let other =
        session.machines().nth(1).filter(|_| session.capabilities().is_ok_and(|offered| offered.prepare));
    let mut host = start(session, Job::Run { prepare: other.map(str::to_owned) })?;
    match host.wait()? {
        Reply::Running => {}
        reply => return unexpected(&reply),
    }
    let started = host.kill()?;
    let mut next = Session::load(session.plugin(), session.folder())?;
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

/// Starts a host process of the plugin. The machinery of the session is dropped first, because two hosts must not
/// share the machines.
fn start(session: &Session, job: Job) -> Result<HostProcess> {
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
        machine: session.machine().to_owned(),
        timeout: session.timeout(),
        job,
    };
    let patience: Duration = session.timeout() + GRACE;
    HostProcess::start(program, &request, patience)
}

fn unexpected(reply: &Reply) -> Result {
    Err(CheckFailure::Failed(format!("the host process sent an unexpected reply: {reply:?}")))
}
