//! A clock that jumps while the host runs, by libfaketime. The clock of the computer stays as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Context, Result};

/// The library, below the folder of libraries of the computer's architecture.
const LIBRARY: &str = "faketime/libfaketimeMT.so.1";

/// A clock for hosts.
#[derive(Debug)]
pub struct Clock {
    library: PathBuf,
    /// The file with the difference to the computer's clock.
    file: PathBuf,
}

impl Clock {
    /// Makes a clock with its file in that folder; `None` where libfaketime is missing.
    pub fn new(folder: &Path) -> Option<Self> {
        let folders = ["/usr/lib", "/usr/lib64"].into_iter().filter_map(|folder| fs::read_dir(folder).ok());
        let libraries = folders.flatten().flatten().map(|entry| entry.path().join(LIBRARY));
        let library = libraries.into_iter().find(|path| path.is_file())?;
        Some(Clock { library, file: folder.join("clock") })
    }

    /// Gives a command this clock, which is right until it jumps. Pauses and timeouts are measured by another clock,
    /// which never jumps.
    pub fn apply_to(&self, command: &mut Command) -> Result<()> {
        self.set("+0")?;
        command.env("LD_PRELOAD", &self.library).env("FAKETIME_TIMESTAMP_FILE", &self.file);
        command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        Ok(())
    }

    /// Sets the difference, such as `+365d`.
    pub fn set(&self, difference: &str) -> Result<()> {
        fs::write(&self.file, format!("{difference}\n"))
            .context(|| format!("cannot write {}", self.file.display()))
    }
}
