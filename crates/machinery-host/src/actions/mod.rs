//! Actions on machines: their queues, their rules, and how they call plugins.
//!
//! Each machine has a [`worker`] with a queue: one action at a time for one machine, in order of arrival,
//! machines in parallel. The worker runs an action with the [`executor`], by the rules of Cuckoo3.
//!
//! An idle worker has its plugin *prepare* the next restore. A stop or a cold start cancels the preparation.
//! A reload *pauses* the workers of free machines.
//!
//! | file | content |
//! | --- | --- |
//! | [`queues`] | the queues of all machines |
//! | [`message`] | what a queue carries: requests and pauses |
//! | [`worker`] | takes messages from one queue |
//! | [`preparation`], [`prepare_permits`] | a preparation under way, and its cancellation; its permit |
//! | [`permits`] | the permits of restores and preparations, for each hypervisor |
//! | [`executor`] | runs one action by the rules |
//! | [`record`] | records an action that has ended |
//! | [`failure`] | the failure of an action |
//! | [`healing`] | tries a machine in quarantine |
//! | [`overrun`] | stops a run that lasts longer than `max_run` |
//! | [`overdue`] | notices an action that takes longer than its calls may |
//! | [`screen`] | the screen of a machine, for somebody who watches it |
//! | [`inspection`] | a dump or a screenshot, from the plugin to the client |
//! | [`plugin_calls`] | the calls into the plugin of one machine |
//! | [`context`] | what all executors share: settings, permits, failures |
//! | [`capture`] | begins and ends the capture of a machine's traffic |
//! | [`diagnose`] | asks plugins which machines they cannot use |
//! | [`metrics`], [`histogram`] | counts and durations of actions |

pub mod adoption;
pub mod capture;
pub mod context;
pub mod diagnose;
pub mod executor;
pub mod failure;
pub mod healing;
pub mod histogram;
pub mod inspection;
#[cfg(test)]
pub mod lab;
pub mod message;
pub mod metrics;
pub mod overdue;
pub mod overrun;
pub mod permits;
pub mod plugin_calls;
pub mod preparation;
pub mod prepare_permits;
pub mod queues;
pub mod record;
pub mod screen;
pub mod worker;

use machinery::{DumpFormat, State};

use crate::client_file::{ClientFile, Content};

/// An action on a machine.
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
        /// The file to write.
        file: ClientFile,
        /// The format of the file.
        format: DumpFormat,
    },
    /// See [`Machinery::screenshot`](machinery::Machinery::screenshot).
    Screenshot {
        /// The file to write.
        file: ClientFile,
    },
    /// Stops the machine if the host has started its run, and leaves every other run alone.
    StopOwn,
    /// Stops the host's own run, because it has lasted longer than `max_run`.
    StopOverrun,
    /// Restores and stops a machine in quarantine. If that works, the machine is back in the pool.
    Heal,
    /// See [`Machinery::prepare`](machinery::Machinery::prepare) and
    /// [`Machinery::prepare_automatically`](machinery::Machinery::prepare_automatically).
    Prepare(PrepareOrigin),
}

/// The reason for preparing a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrepareOrigin {
    /// A client has requested the preparation.
    Request,
    /// The host prepares the machine by itself.
    Automatic,
}

impl Action {
    /// Returns the action's name in the protocol.
    pub fn name(&self) -> &'static str {
        match self {
            Action::RestoreStart => "restore_start",
            Action::NorestoreStart => "norestore_start",
            Action::Stop | Action::StopOwn | Action::StopOverrun => "stop",
            Action::AcpiStop => "acpi_stop",
            Action::DumpMemory { .. } => "dump_memory",
            Action::Screenshot { .. } => "screenshot",
            Action::Heal => "heal",
            Action::Prepare(_) => "prepare",
        }
    }

    /// Returns the file that the action writes, and the content that it must have.
    pub fn output(&self) -> Option<(&ClientFile, Content)> {
        match self {
            Action::DumpMemory { file, .. } => Some((file, Content::Dump)),
            Action::Screenshot { file } => Some((file, Content::Picture)),
            _ => None,
        }
    }

    /// Returns the state of the machine after the action, if the action changes it.
    pub fn expected_state(&self) -> Option<State> {
        match self {
            Action::RestoreStart | Action::NorestoreStart => Some(State::Running),
            Action::Stop | Action::StopOwn | Action::StopOverrun | Action::AcpiStop | Action::Heal => {
                Some(State::Poweroff)
            }
            Action::DumpMemory { .. } | Action::Screenshot { .. } | Action::Prepare(_) => None,
        }
    }
}

/// The result of an action; the error is the reason that the client reads.
pub type ActionResult = Result<(), String>;

/// The way in which the host ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Its machines end with it.
    Stop,
    /// The next host adopts its machines, where their machinery supports that.
    HandOver,
}

/// The reason for refusing an action while the host ends.
pub const CLOSING: &str =
    "the machinery host is shutting down and takes no new action: ask again when it is back";

/// The reason for refusing an action on a machine that is not configured any more.
pub const REMOVED: &str = "the machine was removed from the configuration";
