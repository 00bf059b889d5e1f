//! The keys of `conf/machineries/qemu.yaml`, as types.

use std::path::PathBuf;

use machinery::config::{Machines, empty_as_none, text};
use serde::Deserialize;

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QemuFile {
    #[serde(deserialize_with = "text")]
    pub interface: String,
    #[serde(default, deserialize_with = "empty_as_none")]
    pub disposable_copy_dir: Option<String>,
    pub binaries: Binaries,
    #[serde(default)]
    pub machines: Machines<OwnKeys>,
}

/// QEMU's programs.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binaries {
    #[serde(deserialize_with = "text")]
    pub qemu_img: PathBuf,
    #[serde(deserialize_with = "text")]
    pub qemu_system_x86_64: PathBuf,
}

/// The keys of a machine that only this machinery has.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnKeys {
    #[serde(deserialize_with = "text")]
    pub qcow2_path: String,
    #[serde(deserialize_with = "text")]
    pub snapshot_path: String,
    #[serde(deserialize_with = "text")]
    pub machineinfo_path: String,
}

impl OwnKeys {
    /// Returns the machine's files, each with its key.
    pub fn paths(&self) -> [(&'static str, &str); 3] {
        [
            ("qcow2_path", &self.qcow2_path),
            ("snapshot_path", &self.snapshot_path),
            ("machineinfo_path", &self.machineinfo_path),
        ]
    }
}
