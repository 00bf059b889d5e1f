//! One machine: the actions on its domain, and the events of it.
//!
//! ```text
//!              prepare                 restore_start
//!        off ──────────▶ standby ──────────────────────▶ running ── stop, its end ──▶ off
//!         ▲                 │                              ▲
//!         └── discarded ◀───┘  restore_start,              │
//!        off ───────────────── norestore_start ────────────┘
//! ```
//!
//! The host sees a standby as a machine that is off: its domain is *hidden*.
//!
//! An action returns when libvirt answers, and libvirt reports by events the changes of the domain. Both
//! arrive in different threads, so an action that ends a run waits for both.
//!
//! | module | content, from the bottom up |
//! | --- | --- |
//! | `state` | the state that the plugin keeps, under one lock |
//! | `base` | the machine: its operations, its reports to the host |
//! | `run` | an own run: marker, disks, end |
//! | `end` | the ways to end a domain, and calls that timed out |
//! | `conditions` | the conditions of a preparation |
//! | `standby` | the standby: resume, replacement, end |
//! | `image` | the save image |
//! | `prepare`, `restore`, `stop` | the longer actions of the host; the others are here |
//! | `events` | the events of the domain and of the connection |

mod base;
mod conditions;
mod end;
mod events;
mod image;
#[cfg(test)]
mod lab;
mod prepare;
mod restore;
mod run;
mod standby;
mod state;
mod stop;

pub use base::Machine;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use machinery::{Deadline, DumpFormat, Result, State};
use machinery_backend::{Backend, Operation, PrepareOrigin, Reloadable, refuse};

use virt::connect::Connect;

use crate::config::Keys;
use crate::console;
use crate::inspect;
use crate::restore::Start;
use base::END_EVENT_TIMEOUT;

impl Reloadable for Machine {
    type Keys = Keys;
    fn keys(&self) -> &Keys {
        &self.keys
    }
}

impl Backend for Machine {
    fn state(self: &Arc<Self>, deadline: Deadline) -> Result<State> {
        deadline.check("libvirt to report the domain's state")?;
        if self.lock().operation() == Operation::Starting {
            return Ok(State::Starting);
        }
        if self.is_hidden() {
            return Ok(State::Poweroff);
        }
        if !self.abandoned_call_has_ended(deadline) {
            return Ok(State::Starting);
        }
        let (state, why) = self.query_state(deadline)?;
        if state == State::Error {
            // The answer carries no reason, and this state needs one.
            self.report_state(state, &why);
        }
        Ok(state)
    }

    fn restore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.start(Start::Restored, deadline)
    }

    fn norestore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.start(Start::Cold, deadline)
    }

    fn stop(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        // The host also stops a machine to cancel its preparation. That must not end somebody else's run.
        let is_preparing = self.lock().operation() == Operation::Preparing;
        self.stop_by(if is_preparing { Machine::destroy_own } else { Machine::destroy }, deadline)
    }

    fn acpi_stop(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.press_power_button(deadline)
    }

    fn dump_memory(self: &Arc<Self>, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        self.ensure_visible()?;
        let progress = |fraction| self.shared.host.progress(self.name(), fraction);
        inspect::dump_memory(&self.connection, self.label(), path, format, &progress, deadline)
    }

    fn screenshot(self: &Arc<Self>, path: &Path, deadline: Deadline) -> Result<()> {
        self.ensure_visible()?;
        inspect::screenshot(&self.connection, self.label(), path, deadline)
    }

    fn console(self: &Arc<Self>, deadline: Deadline) -> Result<OwnedFd> {
        self.ensure_visible()?;
        console::connect(&self.connection, self.label(), deadline)
    }

    fn prepare(self: &Arc<Self>, origin: PrepareOrigin, deadline: Deadline) -> Result<()> {
        self.prepare_next(origin, deadline)
    }

    fn ensure_off(&self, deadline: Deadline) -> Result<()> {
        // The host receives the event of an end a moment before the end is recorded here.
        match self.work.wait_while(deadline.within(END_EVENT_TIMEOUT), |state| state.has_run).has_run {
            true => Err(refuse::on_in_reload(self.name())),
            false => Ok(()),
        }
    }

    fn discard_standby(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        self.discard(deadline)
    }

    fn give_standby_back(self: &Arc<Self>, why: &str, deadline: Deadline) -> Result<()> {
        self.give_back(why, deadline)
    }

    fn adopt(self: &Arc<Self>, deadline: Deadline) -> Result<bool> {
        let machine = Arc::clone(self);
        let adopt = move |connect: &Connect| machine.adopt_run(connect);
        self.connection.ask(deadline, "libvirt to find the domain", adopt)
    }

    fn hand_over(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        // The next host cannot know what happens to a standby meanwhile.
        if self.has_run() { Ok(()) } else { self.end(deadline) }
    }

    fn end(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        if self.has_anything_to_end() { self.stop_by(Machine::destroy_own, deadline) } else { Ok(()) }
    }
}
