//! Adds a finished machine to the configuration, and has a running host load it.

use std::path::{Path, PathBuf};

use machinery::config::{ConfigFile, is_machine_name};
use machinery::{Error, Level, RestoreReadiness, Result};
use rustix::fs::{Access, access};
use serde::Serialize;
use serde_json::json;
use serde_yaml::Mapping;

use super::context::{Context, KVM, MACHINERY};
use super::domain::INSTALLED;
use super::host::reload;
use super::info::Info;
use super::section::{lock_configuration, section_of};
use crate::commands::import::{Import, QEMU_DEFAULT, import, without_lines};
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

/// Expects that the name is valid, and that no machine has the name, an address or the network card, and that this user
/// can add an entry. `section` is the machine's section of `machinery-host.yaml` that will be written. The machine of `kvm`
/// with the name `replaced` may have them, because its entry is removed.
///
/// # Errors
/// A machine has one of them, the user cannot, or the section cannot be added.
pub fn expect_free(
    context: &Context<'_>,
    name: &str,
    addresses: &[String],
    mac: Option<&str>,
    section: Option<&Mapping>,
    replaced: Option<&str>,
) -> Result<()> {
    let (cwd, config) = (context.cwd, context.config);
    expect_writable(&cwd.machinery_yaml(context.machinery))?;
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
            if machinery == KVM && replaced == Some(other) {
                continue;
            }
            if other == name {
                return Err(file
                    .error(&["machines", name], "a machine of this name exists")
                    .advice("Give another name"));
            }
            let of_other = |key: &str| keys.get(key).and_then(serde_yaml::Value::as_str);
            let has_ip = addresses.iter().any(|ip| of_other("ip") == Some(ip));
            let has_mac = mac.is_some() && of_other("mac_address") == mac;
            if let Some(key) = [("ip", has_ip), ("mac_address", has_mac)].iter().find(|(_, has)| *has) {
                let reason = format!("the machine '{other}' has this {}, too", key.0);
                let place = file.error(&["machines", other, key.0], reason);
                return Err(place.machine(name).advice("Give another one"));
            }
        }
    }
    let ip = addresses.first().map(String::as_str).unwrap_or_default();
    expect_accepted_beside_clones(context, name, ip, mac, section)
}

/// Expects that this user can replace the configuration file, before a guest has booted for nothing.
///
/// # Errors
/// The user cannot.
pub fn expect_writable(yaml: &Path) -> Result<()> {
    let existing = yaml.ancestors().skip(1).find(|folder| folder.exists()).unwrap_or(yaml);
    access(existing, Access::WRITE_OK | Access::EXEC_OK).map_err(|error| {
        let failed = Error::io("add a machine to", yaml, &error.into());
        failed.advice(format!("Run the command as a user who may write to {}", existing.display()))
    })
}

/// The keys whose values no two machines have.
const UNIQUE: [&str; 3] = ["name", "ip", "mac_address"];

/// Asks the plugin of `qemu`, which knows all clones, whether one has the name, the address or the network card, and whether
/// the section is right.
fn expect_accepted_beside_clones(
    context: &Context<'_>,
    name: &str,
    ip: &str,
    mac: Option<&str>,
    section: Option<&Mapping>,
) -> Result<()> {
    // Without the machinery, there may be no plugin that knows them.
    if context.machinery != MACHINERY && !is_listed(MACHINERY, &context.config.machineries) {
        return Ok(());
    }
    let mut host = context.config.clone();
    if let Some(section) = section {
        let file = ConfigFile { path: context.cwd.host_yaml(), text: String::new() };
        let file = host.host_file.take().unwrap_or(file);
        let text = section_of(name).added_to(&file, section)?;
        host.host_file = Some(ConfigFile { text, ..file });
    }
    let path = context.cwd.machinery_yaml(MACHINERY);
    let mut config: Mapping = match path.exists() {
        true => ConfigFile::read(&path)?.parse()?,
        false if section.is_none() => return Ok(()),
        false => serde_yaml::from_str(QEMU_DEFAULT).unwrap_or_default(),
    };
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
    let report = context.check_of(MACHINERY, ConfigFile { path, text }, &host)?;
    let is_taken = |text: &str| {
        UNIQUE.iter().any(|key| text.contains(&format!(": machines.{name}.{key}: ")))
            || text.contains(&format!(": machineries.{MACHINERY}.machines.{name}."))
    };
    let problems = report.findings().iter().filter(|finding| finding.level == Level::Problem);
    match problems.map(|finding| without_lines(&finding.text)).find(|text| is_taken(text)) {
        None => Ok(()),
        Some(problem) => Err(Error::configuration(problem)),
    }
}

/// Adds the machine in that folder to the configuration, and has a running host load it. `first` changes other files of the
/// configuration before that, and has the record of the unfinished machine undo this if the machine is not added.
///
/// # Errors
/// The configuration cannot be changed, or refuses the machine.
pub fn publish(
    context: &Context<'_>,
    info: &Info,
    folder: &Path,
    ready: RestoreReadiness,
    first: impl FnOnce() -> Result<()>,
) -> Result<Made> {
    (context.step)("adding the machine to the configuration");
    let _lock = lock_configuration(context.cwd)?;
    first()?;
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
pub fn expect_domain_accepted(context: &Context<'_>, info: &Info, folder: &Path) -> Result<()> {
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
