//! The folder of a machine.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use super::{GuestProbe, Qemu, Vm};
use crate::Result;

/// A machine as VMCloak makes it. It has copies of all files, which a test may change or delete.
#[derive(Debug, Clone)]
pub struct MachineFolder {
    /// The folder of the files below.
    pub dir: PathBuf,
    /// The snapshot's disk. Runs write to an overlay of it.
    pub disk: PathBuf,
    /// The memory snapshot.
    pub snapshot: PathBuf,
    /// `machineinfo.json`.
    pub machineinfo: PathBuf,
    /// The QEMU arguments in [`MachineFolder::machineinfo`].
    pub start_args: Vec<String>,
    /// The probe of its guest.
    pub probe: GuestProbe,
}

impl MachineFolder {
    /// Restores the machine with QEMU alone, on `disk`, which may be an overlay.
    pub fn restore(&self, qemu: &Qemu, disk: &Path) -> Result<Vm> {
        Vm::restore(qemu, &self.start_args, disk, &self.snapshot)
    }
}

impl Deref for MachineFolder {
    type Target = GuestProbe;

    fn deref(&self) -> &GuestProbe {
        &self.probe
    }
}
