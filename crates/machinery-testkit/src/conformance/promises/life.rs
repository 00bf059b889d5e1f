//! The machinery's own life: loading, ending, and what it tells meanwhile.

use std::time::Duration;

use machinery::State;

use crate::conformance::call::Call;
use crate::conformance::ears::Heard;
use crate::conformance::report::{Result, demand};
use crate::conformance::session::Session;

/// Time enough to be refused.
const A_MOMENT: Duration = Duration::from_secs(1);

/// No machine runs because a machinery was loaded.
pub fn off_after_load(session: &Session) -> Result {
    session.machines().try_for_each(|machine| session.is(machine, State::Poweroff))?;
    session.nothing_is_left("after load")
}

/// After shutdown nothing is left, and whoever calls all the same does no harm.
pub fn shutdown(session: &Session) -> Result {
    let machine = session.machine();
    session.restore(machine)?;
    session.stop(machine)?;
    session.end()?;
    session.nothing_is_left("after shutdown")?;
    for call in [Call::State, Call::Stop, Call::RestoreStart, Call::Stop] {
        // Any answer will do, as long as it is one.
        let _ = session.attempt(&call, machine, A_MOMENT)?;
    }
    session.nothing_is_left("after calls that came too late")
}

/// Whatever was told while all promises were tried was about the machinery's own machines.
pub fn reports(session: &Session) -> Result {
    let infos = session.answer("machines", |instance, _| instance.machines())?;
    let known = |name: &str| infos.iter().any(|info| info.name == name);
    for heard in session.suite().ears.since(0) {
        match &heard {
            Heard::Changed { machine, .. } => demand!(known(machine), "no machine has this name: {heard:?}"),
            Heard::Progress { machine, fraction } => {
                demand!(known(machine), "no machine has this name: {heard:?}");
                demand!((0.0..=1.0).contains(fraction), "{heard:?} is not within 0 and 1");
            }
        }
    }
    Ok(())
}
