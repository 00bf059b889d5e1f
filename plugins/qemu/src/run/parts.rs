//! The parts of a run, and its purpose.

use std::fs::File;
use std::path::PathBuf;

use machinery::RestoreReadiness;
use machinery_backend::jail::Cgroup;
use machinery_backend::{Overlays, Share};

use super::cell::MachineCell;
use super::record::RecordFile;
use crate::version::Version;

/// The parts of a run, beside its process.
pub struct Parts {
    pub machine: String,
    pub version: Version,
    pub overlays: Overlays,
    /// The files that QEMU writes, the overlays among them.
    pub writes: Vec<PathBuf>,
    /// The sockets that are removed with the run.
    pub sockets: Vec<PathBuf>,
    pub cgroup: Option<Cgroup>,
    /// The state of the run's own TPM. An adopted run has none.
    pub tpm: Option<File>,
    /// The network of an isolated machine.
    pub cell: MachineCell,
    pub record: RecordFile,
}

/// The purpose of a run.
pub enum Purpose {
    /// The guest is resumed at once.
    Run,
    /// The run builds a template, or loads a standby.
    Preparation,
    /// A later restore resumes the guest.
    Standby {
        /// The machine's readiness without this standby.
        without: RestoreReadiness,
        /// The standby's share of the memory budget.
        share: Option<Share>,
    },
}
