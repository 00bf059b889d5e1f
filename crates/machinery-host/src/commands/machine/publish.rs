//! Adds a finished machine to the configuration, and has a running host load it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use machinery::config::{ConfigFile, is_machine_name};
use machinery::{Error, RestoreReadiness, Result};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde_json::{Value, json};
use serde_yaml::Mapping;

use super::context::{Context, MACHINERY};
use crate::client::Client;
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

/// Has a running host reload its configuration. Returns a note if it does not.
pub fn reload(cwd: &Cwd) -> Option<String> {
    let answer = ask(cwd, json!({"action": "reload"}))?;
    let why = match answer {
        Ok(answer) if answer["success"] == json!(true) => return None,
        Ok(answer) => answer["reason"].as_str().unwrap_or_default().to_owned(),
        Err(error) => error.to_string(),
    };
    Some(format!("the running host has not reloaded its configuration: {why}"))
}

/// Sends a request to the host; `None` if no host runs.
pub fn ask(cwd: &Cwd, request: Value) -> Option<Result<Value>> {
    let mut client = Client::connect(&cwd.manager_socket()).ok()?;
    Some(client.request(request, |_| ()))
}

/// Expects that a running host does not use the machine.
///
/// # Errors
/// The machine is on, or locked by a task.
pub fn expect_unused(cwd: &Cwd, name: &str) -> Result<()> {
    let Some(list) = ask(cwd, json!({"action": "list"})) else { return Ok(()) };
    let list = list?;
    let machine =
        list["machines"].as_array().into_iter().flatten().find(|machine| machine["name"] == json!(name));
    match machine {
        Some(machine) if machine["locked"] == json!(true) || machine["state"] != json!("poweroff") => {
            let state = machine["state"].as_str().unwrap_or_default();
            let lock = if machine["locked"] == json!(true) { " and locked by a task" } else { "" };
            Err(Error::unexpected_state(format!("the running host uses the machine: it is {state}{lock}"))
                .machine(name)
                .advice("Stop it, or wait until its task has ended"))
        }
        _ => Ok(()),
    }
}

/// Reports whether a running host gives the machine to tasks.
pub fn is_enabled(cwd: &Cwd, name: &str) -> bool {
    let Some(Ok(list)) = ask(cwd, json!({"action": "list"})) else { return false };
    let machines = list["machines"].as_array().into_iter().flatten();
    machines.into_iter().any(|machine| machine["name"] == json!(name) && machine["disabled"] == json!(false))
}

/// Has a running host give the machine to no task, and end its standby: it has the machine's tap and address.
///
/// # Errors
/// The host cannot be asked.
pub fn disable(cwd: &Cwd, name: &str) -> Result<()> {
    let reason = "its snapshot is taken anew";
    ask(cwd, json!({"action": "disable_machine", "machine": name, "reason": reason})).transpose()?;
    expect_unused(cwd, name)?;
    ask(cwd, json!({"action": "stop", "machine": name})).transpose().map(drop)
}

/// Has a running host give the machine to tasks again, and prepare its next restore. Nobody waits for the preparation.
pub fn enable(cwd: &Cwd, name: &str) {
    if let Some(Err(error)) = ask(cwd, json!({"action": "enable_machine", "machine": name})) {
        tracing::warn!(machine = name, %error, "the machine is still disabled: enable it with `enable-machine`");
    }
    let prepare = json!({"action": "prepare", "machine": name});
    let _ = Client::connect(&cwd.manager_socket()).and_then(|client| client.split().0.send(&prepare, None));
}
