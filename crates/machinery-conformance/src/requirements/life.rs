//! The machinery's own life: its load, its shutdown, and its events in between.

use std::time::Duration;

use machinery::{DumpFormat, State};

use crate::call::Call;
use crate::report::Result;
use crate::session::Session;

/// Enough time for a call that is refused.
const SHORT_DEADLINE: Duration = Duration::from_secs(1);

pub fn off_after_load(session: &Session) -> Result {
    session.machines().try_for_each(|machine| session.has_state(machine, State::Poweroff))?;
    session.no_leftovers("after load")
}

pub fn shutdown(session: &Session) -> Result {
    let machine = session.machine();
    session.restore(machine)?;
    session.stop(machine)?;
    session.shut_down()?;
    session.no_leftovers("after shutdown")?;
    for call in [Call::State, Call::Stop, Call::RestoreStart, Call::Stop] {
        // Any result is acceptable, as long as the call returns.
        let _ = session.attempt(&call, machine, SHORT_DEADLINE)?;
    }
    session.no_leftovers("after calls that followed the shutdown")
}

/// Makes a run with every kind of event. It also checks the events of earlier requirements again, because some
/// may have come late.
pub fn reports(session: &Session) -> Result {
    let (capabilities, machine) = (session.capabilities()?, session.machine());
    if capabilities.prepare {
        session.succeeds(&Call::Prepare, machine)?;
    }
    session.restore(machine)?;
    if capabilities.dump_memory {
        session.succeeds(&Call::DumpMemory(session.path("dump"), DumpFormat::Elf), machine)?;
    }
    session.stop(machine)?;
    session.events_are_valid()
}
