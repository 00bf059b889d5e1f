//! A file that the arguments name, and the placeholder for the disk's overlay.

use std::path::PathBuf;

/// The placeholder for the path of the disk's overlay. Source: Cuckoo3's `machineries/modules/qemu.py`.
pub const PLACEHOLDER: &str = "%DISPOSABLE_DISK_PATH%";

/// A file that a guest depends on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    pub path: PathBuf,
    /// The format that the arguments give; QEMU probes the file if there is none.
    pub format: Option<String>,
}

impl Source {
    /// Creates a file that holds no image.
    pub fn of(path: &str) -> Source {
        Source { path: path.into(), format: Some("raw".to_owned()) }
    }
}
