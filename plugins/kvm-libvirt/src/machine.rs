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
//! | `prepare`, `restore`, `stop`, `query` | the host's actions |
//! | `events` | the events of the domain and of the connection |

mod base;
mod conditions;
mod end;
mod events;
mod image;
mod prepare;
mod query;
mod restore;
mod run;
mod standby;
mod state;
mod stop;

pub use base::Machine;

use std::path::Path;
use std::sync::Arc;

use machinery::{Deadline, DumpFormat, MachineInfo, Result, State};
use machinery_backend::{Backend, PrepareOrigin, Reloadable};

use crate::config::Keys;
use crate::shared::Kvm;

impl Reloadable for Machine {
    type Keys = Keys;

    fn key_name(keys: &Keys) -> &str {
        &keys.info.name
    }

    fn unique(keys: &Keys) -> Vec<(&'static str, Option<&str>)> {
        keys.info.unique()
    }

    fn keys(&self) -> &Keys {
        &self.keys
    }
}

impl Backend for Machine {
    type Shared = Kvm;

    fn info(&self) -> &MachineInfo {
        Machine::info(self)
    }

    fn state(self: &Arc<Self>, deadline: Deadline) -> Result<State> {
        Machine::state(self, deadline)
    }

    fn restore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        Machine::restore_start(self, deadline)
    }

    fn norestore_start(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        Machine::norestore_start(self, deadline)
    }

    fn stop(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        Machine::stop(self, deadline)
    }

    fn acpi_stop(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        Machine::acpi_stop(self, deadline)
    }

    fn dump_memory(self: &Arc<Self>, path: &Path, format: DumpFormat, deadline: Deadline) -> Result<()> {
        Machine::dump_memory(self, path, format, deadline)
    }

    fn screenshot(self: &Arc<Self>, path: &Path, deadline: Deadline) -> Result<()> {
        Machine::screenshot(self, path, deadline)
    }

    fn prepare(self: &Arc<Self>, origin: PrepareOrigin, deadline: Deadline) -> Result<()> {
        Machine::prepare(self, origin, deadline)
    }

    fn ensure_off(&self, deadline: Deadline) -> Result<()> {
        Machine::ensure_off(self, deadline)
    }

    fn discard_standby(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        Machine::discard_standby(self, deadline)
    }

    fn end(self: &Arc<Self>, deadline: Deadline) -> Result<()> {
        Machine::end(self, deadline)
    }
}
