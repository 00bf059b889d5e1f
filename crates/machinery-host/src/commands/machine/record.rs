//! The content of the record of an unfinished machine: everything that a command after it has to know.

use std::io;
use std::path::{Path, PathBuf};

use machinery::{Error, Result, Setup};
use serde::{Deserialize, Serialize};
use serde_yaml::Mapping;

use super::domain::Recorded;
use super::replaced::Replaced;
use super::{host, leftovers};
use crate::cwd::Cwd;

/// The name of the file.
pub const RECORD: &str = "record.json";

/// The content of the file.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Record {
    pub name: String,
    /// The folder of the machine that is made.
    pub folder: PathBuf,
    /// The setup of the plugin, once it has one.
    pub setup: Option<Setup>,
    /// The domain, if the machine is one of the machinery `kvm`.
    #[serde(default)]
    pub domain: Option<Recorded>,
    /// The entries whose machines a host holds while the command is at work.
    #[serde(default)]
    pub held: Vec<String>,
    /// The section of `machinery-host.yaml` that is removed if the configuration does not have the machine.
    #[serde(default)]
    pub section: Option<Mapping>,
    /// The entry of `kvm.yaml` that comes back if the configuration does not have the machine.
    #[serde(default)]
    pub replaced: Option<Replaced>,
}

impl Record {
    /// Returns the machinery of the machine.
    pub fn machinery(&self) -> &'static str {
        leftovers::machinery_of(self.domain.as_ref())
    }

    /// Has a running host release the machines.
    pub fn release(&self, cwd: &Cwd) {
        if self.held.is_empty() {
            return;
        }
        if let Err(error) = host::release(cwd, self.machinery(), &self.held) {
            tracing::warn!(machine = self.name, %error, "the host may still hold the machine: see `enable-machine`");
        }
    }

    /// Writes the record into its folder, as a whole.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(RECORD);
        let written = serde_json::to_vec(self).map_err(io::Error::other).and_then(|text| {
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            io::Write::write_all(&mut file, &text)?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|failed| failed.error)
        });
        written.map(drop).map_err(|error| Error::io("write", &path, &error))
    }
}
