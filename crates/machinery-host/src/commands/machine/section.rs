//! The section of a machine in `machinery-host.yaml`, and the lock of the configuration.

use std::fs::File;
use std::io;

use machinery::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use serde_yaml::Mapping;

use super::context::MACHINERY;
use crate::commands::import::Section;
use crate::cwd::Cwd;

/// Returns the machine's section of `machinery-host.yaml`.
pub fn section_of(name: &str) -> Section<'_> {
    Section { machinery: MACHINERY, machine: name }
}

/// Removes the section of a machine that the configuration does not have, unless somebody has changed the section.
///
/// # Errors
/// The section cannot be removed.
pub fn withdraw(cwd: &Cwd, name: &str, keys: &Mapping) -> Result<()> {
    let _lock = lock_configuration(cwd)?;
    let (section, path) = (section_of(name), cwd.host_yaml());
    if section.content(&path)?.as_ref() == Some(keys) {
        section.remove(&path)?;
    }
    Ok(())
}

/// Waits until no other command changes the configuration. The lock ends with the file.
///
/// # Errors
/// The folder of the host's state cannot be locked.
pub fn lock_configuration(cwd: &Cwd) -> Result<File> {
    let folder = cwd.state();
    let failed = |error: io::Error| Error::io("lock", &folder, &error);
    let file = File::open(&folder).map_err(failed)?;
    flock(&file, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
    Ok(file)
}
