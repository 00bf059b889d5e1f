//! What can be done with a machine, by whom, and by which rules.
//!
//! Each machine has a [`worker`] with a mailbox: one action at a time for one machine, in the
//! order they came, machines in parallel. The worker runs an action by the [`rules`] of
//! Cuckoo3, and every call into a plugin goes through [`call`], which survives a plugin that does
//! not come back.
//!
//! When there is nothing to do with a machine that is off, its worker has its plugin *prepare* the next
//! restore; a stop or a cold start that comes meanwhile ends that. A new configuration is taken over while the
//! workers of free machines *rest*.

pub mod call;
pub mod diagnose;
pub mod metrics;
pub mod rules;
pub mod worker;

use std::path::PathBuf;

use machinery::DumpFormat;

/// Something to do with a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// See [`Machinery::restore_start`](machinery::Machinery::restore_start).
    RestoreStart,
    /// See [`Machinery::norestore_start`](machinery::Machinery::norestore_start).
    NorestoreStart,
    /// See [`Machinery::stop`](machinery::Machinery::stop).
    Stop,
    /// See [`Machinery::acpi_stop`](machinery::Machinery::acpi_stop).
    AcpiStop,
    /// See [`Machinery::dump_memory`](machinery::Machinery::dump_memory).
    DumpMemory {
        /// Where to.
        path: PathBuf,
        /// As what.
        format: DumpFormat,
    },
    /// See [`Machinery::screenshot`](machinery::Machinery::screenshot).
    Screenshot {
        /// Where to.
        path: PathBuf,
    },
    /// Stops the machine if the host has started its run, and leaves every other run alone.
    StopOwn,
    /// See [`Machinery::prepare`](machinery::Machinery::prepare) and
    /// [`Machinery::prepare_automatically`](machinery::Machinery::prepare_automatically).
    Prepare(Occasion),
}

/// The reason for preparing a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occasion {
    /// A client has asked for the preparation.
    Request,
    /// The host prepares the machine by itself.
    Automatic,
}

impl Action {
    /// Its name in the protocol.
    pub fn name(&self) -> &'static str {
        match self {
            Action::RestoreStart => "restore_start",
            Action::NorestoreStart => "norestore_start",
            Action::Stop | Action::StopOwn => "stop",
            Action::AcpiStop => "acpi_stop",
            Action::DumpMemory { .. } => "dump_memory",
            Action::Screenshot { .. } => "screenshot",
            Action::Prepare(_) => "prepare",
        }
    }
}

/// What an action gets that comes too late.
const CLOSING: &str = "the machinery host is shutting down and takes no new action";

/// How an action ended: well, or with the reason why not.
pub type Outcome = Result<(), String>;
