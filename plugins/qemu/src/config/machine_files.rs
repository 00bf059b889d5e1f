//! One machine of the configuration: its keys, its files, and its arguments.

use std::path::{Path, PathBuf};

use machinery::{Error, MachineInfo, Result};
use machinery_backend::jail::{JailMode, UserRange};
use machinery_backend::{ImageFile, MachineKeys, overlay_path};

use super::section::PrepareOptions;
use crate::machineinfo::StartArgs;

/// One machine of the configuration. A reload replaces the machine if any of this has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineFiles {
    pub info: MachineInfo,
    pub disk: PathBuf,
    pub snapshot: PathBuf,
    pub disposable: PathBuf,
    /// The file that `start_args` were read from; QEMU runs in its folder.
    pub machineinfo: PathBuf,
    /// The arguments when the configuration was read; empty if they could not be read.
    pub start_args: StartArgs,
    /// The reason why the arguments could not be read, if they could not.
    pub args_error: Option<Error>,
    /// The interface where the machine's traffic can be captured, if it differs from that of all other
    /// machines.
    pub own_interface: Option<String>,
    pub keep_disk: bool,
    pub prepare: PrepareOptions,
    pub allow_shared_writes: bool,
    pub jail: JailMode,
    /// The users of the machines, where the host is root.
    pub jail_users: UserRange,
}

impl MachineKeys for MachineFiles {
    fn info(&self) -> &MachineInfo {
        &self.info
    }

    fn unique(&self) -> Vec<(&'static str, Option<&str>)> {
        let info = &self.info;
        vec![
            ("qcow2_path", self.disk.to_str()),
            // A machine's disk must not be at the path of another machine's overlay, either.
            ("qcow2_path", self.disposable.to_str()),
            ("snapshot_path", self.snapshot.to_str()),
            ("ip", Some(&info.ip)),
            ("mac_address", info.mac_address.as_deref()),
        ]
    }
}

impl MachineFiles {
    /// Returns the images that each run has an overlay of: the disk, and the images in the arguments.
    pub fn images(&self) -> Vec<ImageFile> {
        let disk = ImageFile { path: self.disk.clone(), format: Some("qcow2".to_owned()) };
        let others = self.start_args.opened().images.iter().map(|image| image.source.clone());
        std::iter::once(disk).chain(others).collect()
    }

    /// Returns the paths of a run's overlays, in the order of the images.
    pub fn overlays(&self) -> Vec<PathBuf> {
        let count = self.start_args.opened().images.len() + 1;
        (0..count).map(|n| overlay_path(&self.disposable, n)).collect()
    }

    /// Describes the writes of a run that the next run would find; `None` if every run is clean.
    pub fn shared_writes(&self) -> Option<String> {
        let shared: Vec<String> = self.start_args.opened().shared.iter().map(ToString::to_string).collect();
        (!shared.is_empty()).then(|| shared.join("; "))
    }

    /// Returns the warning about a machine whose runs are not clean, if the operator allows that.
    pub fn shared_writes_warning(&self) -> Option<String> {
        let shared = self.shared_writes().filter(|_| self.allow_shared_writes)?;
        Some(format!(
            "a run leaves its changes to the next one (allow_shared_writes). Its start_args have {shared}"
        ))
    }

    /// Refuses a machine whose runs would not be clean, unless the operator allows them.
    ///
    /// # Errors
    /// A run would change something that the next run finds, and the operator has not allowed that.
    pub fn expect_clean_runs(&self) -> Result<()> {
        match self.shared_writes().filter(|_| !self.allow_shared_writes) {
            None => Ok(()),
            Some(shared) => Err(Error::configuration(format!(
                "a run would leave its changes to the next one. Its start_args have {shared}"
            ))
            .advice(format!(
                "Remove it, make it read-only (readonly=on), or use an image file, of which each run gets an overlay. \
                 To accept it, set machineries.qemu.machines.{}.allow_shared_writes: true in machinery-host.yaml",
                self.info.name
            ))),
        }
    }

    /// Returns the folder in which QEMU runs: the machine's own, so relative paths in `start_args` start
    /// there.
    pub fn folder(&self) -> &Path {
        self.machineinfo.parent().unwrap_or(Path::new("/"))
    }

    /// Reports whether the arguments in machineinfo.json have changed since they were read.
    pub fn has_other_args(&self) -> bool {
        StartArgs::read(&self.machineinfo).is_ok_and(|args| args != self.start_args)
    }
}
