//! Adds a finished machine to the configuration, and has a running host load it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use machinery::config::{ConfigFile, is_machine_name};
use machinery::{Error, Level, RestoreReadiness, Result};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde_json::json;
use serde_yaml::Mapping;

use super::context::{Context, MACHINERY};
use super::domain::INSTALLED;
use super::host::reload;
use super::info::Info;
use crate::commands::import::{Import, import, without_lines};
use crate::cwd::Cwd;
use crate::plugin::search::is_listed;

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

/// Expects that the name is valid, and that no machine has the name, the address or the network card.
///
/// # Errors
/// One has it.
pub fn expect_free(context: &Context<'_>, name: &str, ip: &str, mac: Option<&str>) -> Result<()> {
    let (cwd, config) = (context.cwd, context.config);
    if !is_machine_name(name) {
        return Err(Error::configuration(format!("{name:?} is no name of a machine"))
            .advice("Use letters, digits, '_', '-' and '.'"));
    }
    for machinery in config.machineries.iter().map(String::as_str).chain([context.machinery]) {
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
            for (key, value) in values.into_iter().filter(|(_, value)| value.is_some()) {
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
    expect_free_of_clones(context, name, ip, mac)
}

/// The keys whose values no two machines have.
const UNIQUE: [&str; 3] = ["name", "ip", "mac_address"];

/// Asks the plugin, which knows all clones, whether one has the name, the address or the network card.
fn expect_free_of_clones(context: &Context<'_>, name: &str, ip: &str, mac: Option<&str>) -> Result<()> {
    let path = context.cwd.machinery_yaml(MACHINERY);
    // Without the machinery, there may be no plugin that knows them.
    let is_listed = context.machinery == MACHINERY || is_listed(MACHINERY, &context.config.machineries);
    if !is_listed || !path.exists() {
        return Ok(());
    }
    let mut config: Mapping = ConfigFile::read(&path)?.parse()?;
    let machines = config.entry("machines".into()).or_insert(serde_yaml::Value::Null);
    if machines.is_null() {
        *machines = Mapping::new().into();
    }
    let none = |file: &str| format!("/none/{name}/{file}");
    let entry = json!({
        "qcow2_path": none("disk"), "snapshot_path": none("memory"), "machineinfo_path": none("info"),
        "ip": ip, "mac_address": mac, "platform": "windows", "os_version": "10", "architecture": "amd64",
    });
    if let (Some(machines), Ok(entry)) = (machines.as_mapping_mut(), serde_yaml::to_value(entry)) {
        machines.insert(name.into(), entry);
    }
    let text = serde_yaml::to_string(&config).unwrap_or_default();
    let report = (context.check)(MACHINERY, ConfigFile { path, text })?;
    let is_taken = |text: &str| UNIQUE.iter().any(|key| text.contains(&format!(": machines.{name}.{key}: ")));
    let problems = report.findings().iter().filter(|finding| finding.level == Level::Problem);
    match problems.map(|finding| without_lines(&finding.text)).find(|text| is_taken(text)) {
        None => Ok(()),
        Some(problem) => Err(Error::configuration(problem)),
    }
}

/// Adds the machine in that folder to the configuration, and has a running host load it.
///
/// # Errors
/// The configuration cannot be changed, or refuses the machine.
pub fn publish(context: &Context<'_>, info: &Info, folder: &Path, ready: RestoreReadiness) -> Result<Made> {
    (context.step)("adding the machine to the configuration");
    let _lock = lock_configuration(context.cwd)?;
    let check = |file| context.check(file);
    let added = import(&import_of(info, folder), &context.cwd.machinery_yaml(context.machinery), &check)?;
    let mut notes = added.notes;
    notes.extend(reload(context.cwd));
    Ok(Made { machine: info.machine.name.clone(), folder: folder.to_owned(), ready, notes })
}

/// Expects that the configuration takes the machine of a domain, before the guest boots.
///
/// # Errors
/// The configuration cannot be changed, or refuses the machine.
pub fn expect_accepted(context: &Context<'_>, info: &Info, folder: &Path) -> Result<()> {
    let mut info = info.clone();
    if let Some(domain) = &mut info.machine.domain {
        INSTALLED.clone_into(&mut domain.snapshot);
    }
    let check = |file| context.check(file);
    import(&import_of(&info, folder).dry(), &context.cwd.machinery_yaml(context.machinery), &check).map(drop)
}

/// Returns the import of the machine, which makes its entry.
fn import_of(info: &Info, folder: &Path) -> Import {
    let machine = &info.machine;
    let Some(domain) = &machine.domain else { return Import::of_folder(folder) };
    let values = [
        ("snapshot", domain.snapshot.clone()),
        ("ip", machine.ip.clone()),
        ("platform", machine.os_name.clone()),
        ("os_version", machine.os_version.clone()),
        ("interface", machine.bridge.clone()),
        ("agent_port", machine.agent_port.to_string()),
        ("tags", machine.tags.join(",")),
    ];
    Import::of_domain(&domain.dsn, &domain.label, &values)
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
