//! Adds a finished machine to the configuration, and has a running host load it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use machinery::config::{ConfigFile, is_machine_name};
use machinery::{Error, RestoreReadiness, Result};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde_yaml::Mapping;

use super::context::{Context, MACHINERY};
use super::host::reload;
use crate::commands::import::{Import, import};
use crate::config::Config;
use crate::cwd::Cwd;

/// A machine that was made, or changed.
#[derive(Debug, Serialize)]
pub struct Made {
    pub machine: String,
    pub folder: PathBuf,
    /// The readiness of a restore, without a standby.
    pub ready: RestoreReadiness,
    /// Facts that the operator has to know.
    pub notes: Vec<String>,
}

/// Expects that the name is valid, that no machine has it, and that none of the machinery has this address or network
/// card.
///
/// # Errors
/// One has it.
pub fn expect_free(cwd: &Cwd, config: &Config, name: &str, ip: &str, mac: Option<&str>) -> Result<()> {
    if !is_machine_name(name) {
        return Err(Error::configuration(format!("{name:?} is no name of a machine"))
            .advice("Use letters, digits, '_', '-' and '.'"));
    }
    for machinery in config.machineries.iter().map(String::as_str).chain([MACHINERY]) {
        // A file that cannot be read is reported by whatever needs it.
        let Ok(file) = ConfigFile::read(&cwd.machinery_yaml(machinery)) else { continue };
        let Some(machines) = file.parse_at::<Mapping>(&["machines"])? else { continue };
        for (other, keys) in &machines {
            let other = other.as_str().unwrap_or_default();
            if other == name {
                return Err(file
                    .error(&["machines", name], "a machine of this name exists")
                    .advice("Give another name"));
            }
            let values = [("ip", Some(ip)), ("mac_address", mac)];
            for (key, value) in
                values.into_iter().filter(|(_, value)| machinery == MACHINERY && value.is_some())
            {
                if keys.get(key).and_then(serde_yaml::Value::as_str) == value {
                    let reason = format!("the machine '{other}' has this {key}, too");
                    return Err(file
                        .error(&["machines", other, key], reason)
                        .machine(name)
                        .advice("Give another one"));
                }
            }
        }
    }
    Ok(())
}

/// Adds the machine in that folder to the configuration, and has a running host load it.
///
/// # Errors
/// The configuration cannot be changed, or refuses the machine.
pub fn publish(context: &Context<'_>, name: &str, folder: &Path, ready: RestoreReadiness) -> Result<Made> {
    (context.step)("adding the machine to the configuration");
    let _lock = lock_configuration(context.cwd)?;
    let added = import(&Import::of_folder(folder), &context.cwd.machinery_yaml(MACHINERY), context.check)?;
    let mut notes = added.notes;
    notes.extend(reload(context.cwd));
    Ok(Made { machine: name.to_owned(), folder: folder.to_owned(), ready, notes })
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
