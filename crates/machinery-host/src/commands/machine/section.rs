//! The section of a machine in `machinery-host.yaml`, and the lock of the configuration.

use std::fs::File;
use std::io;

use machinery::{Error, Result};
use rustix::fs::{FlockOperation, flock};
use serde_yaml::Mapping;

use super::context::MACHINERY;
use crate::commands::import::Section;
use crate::config::Config;
use crate::cwd::Cwd;

/// Returns the machine's section of `machinery-host.yaml`.
pub fn section_of(name: &str) -> Section<'_> {
    Section { machinery: MACHINERY, machine: name }
}

/// Expects that `machinery-host.yaml` has no section for a machine that is to be removed, which a host refuses without an
/// entry.
///
/// # Errors
/// It has one.
pub fn expect_no_section(config: &Config, machinery: &str, name: &str) -> Result<()> {
    let key = ["machineries", machinery, "machines", name];
    let Some(file) = &config.host_file else { return Ok(()) };
    let machines = file.parse_at::<Mapping>(&key[..3])?.unwrap_or_default();
    if machines.contains_key(name) {
        return Err(file
            .error(&key, "this section is about the machine, and a host refuses it once the machine is gone")
            .machine(name)
            .advice("Remove the section, and repeat the command"));
    }
    Ok(())
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
