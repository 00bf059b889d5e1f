//! A machine's folder.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use super::{GuestProbe, Qemu, Vm};
use crate::Result;

/// A machine as VMCloak leaves it. Its files are its own: a test may change, spoil or delete them. It
/// has its guest's [`GuestProbe`].
#[derive(Debug, Clone)]
pub struct MachineFolder {
    /// The folder that holds all the rest.
    pub dir: PathBuf,
    /// The disk that the snapshot belongs to. Runs write to an overlay of it, never to it.
    pub disk: PathBuf,
    /// The memory snapshot.
    pub snapshot: PathBuf,
    /// `machineinfo.json`.
    pub machineinfo: PathBuf,
    /// The QEMU arguments in [`MachineFolder::machineinfo`].
    pub start_args: Vec<String>,
    /// How its guest is reached.
    pub probe: GuestProbe,
}

impl MachineFolder {
    /// Restores the machine with nothing but QEMU, on `disk` (an overlay, if it is to be kept).
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
