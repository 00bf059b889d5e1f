//! The machinery's own life: loading, ending, and what it tells meanwhile.

use std::time::Duration;

use machinery::{DumpFormat, State};

use crate::call::Call;
use crate::report::Result;
use crate::session::Session;

/// Time enough to be refused.
const A_MOMENT: Duration = Duration::from_secs(1);

pub fn off_after_load(session: &Session) -> Result {
    session.machines().try_for_each(|machine| session.is(machine, State::Poweroff))?;
    session.nothing_is_left("after load")
}

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

/// A run with all that there is to tell of. What was told of the requirements before it is looked at
/// once more, for something of it may have come late.
pub fn reports(session: &Session) -> Result {
    let (able, machine) = (session.capabilities()?, session.machine());
    if able.prepare {
        session.does(&Call::Prepare, machine)?;
    }
    session.restore(machine)?;
    if able.dump_memory {
        session.does(&Call::DumpMemory(session.path("dump"), DumpFormat::Elf), machine)?;
    }
    session.stop(machine)?;
    session.events_are_valid()
}
