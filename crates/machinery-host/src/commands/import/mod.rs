//! `import vmcloak`: adds the machines that VMCloak made to `qemu.yaml`.
//!
//! The file is the operator's and has comments. So the import inserts one block of text at the end of the
//! `machines` mapping and leaves all other text as it is. Then it parses the text before and after. Both must
//! differ by the new machines only; otherwise the file stays unchanged.
//!
//! ```text
//! folders ─▶ read each machineinfo.json ─▶ new, unchanged or in conflict? ─▶ insert ─▶ verify ─▶ check ─▶ replace
//!            (vmcloak)                      (here)                           (text)   (here)    (plugin) (replace)
//! ```
//!
//! The file is written after all checks have passed. One machine in conflict stops the whole import, so that
//! no partial import remains.

mod outcome;
mod replace;
mod text;
mod vmcloak;

use std::fs;
use std::path::{Path, PathBuf};

use machinery::config::{ConfigFile, Configured, Machines, empty_as_none};
use machinery::{Error, Level, Report, Result};
use serde::Deserialize;
use serde_yaml::{Mapping, Value};

use outcome::collect_all;
pub use outcome::{Imported, Skipped};
use vmcloak::Machine;

/// The initial text of a new `qemu.yaml`.
const DEFAULT: &str = include_str!("../../../../../conf/machineries/qemu.yaml");

/// The keys whose values no two machines may share.
const UNIQUE: [&str; 5] = ["ip", "mac_address", "qcow2_path", "snapshot_path", "machineinfo_path"];

/// Asks the plugin `qemu` to check the content of the file before it is written.
pub type Check<'a> = &'a dyn Fn(ConfigFile) -> Result<Report>;

/// Adds the machines of VMCloak's folders to `qemu.yaml`.
///
/// A folder is a machine's own folder, or holds such folders. A machine with an equal entry in the file is
/// skipped. The import refuses arguments that the plugin refuses. Without a plugin, the import only warns.
///
/// # Errors
/// A folder has no machines. A `machineinfo.json` is incomplete, or the plugin refuses its arguments. A machine
/// differs from its entry in the file. Two machines would share an address or a file. The text cannot be edited.
/// The file stays unchanged then.
pub fn vmcloak(qemu_yaml: &Path, folders: &[PathBuf], check: Check<'_>) -> Result<Imported> {
    import(qemu_yaml, folders, check).map_err(|error| error.action("import"))
}

fn import(qemu_yaml: &Path, folders: &[PathBuf], check: Check<'_>) -> Result<Imported> {
    let file = read_or_default(qemu_yaml)?;
    let known = file.parse::<ExistingMachines>()?.machines;
    let found = vmcloak::find(folders)?;
    let machines = collect_all(found.files.iter().map(|path| vmcloak::read(path).and_then(Candidate::new)))?;

    let mut skipped: Vec<Skipped> = found.unfinished.iter().map(|folder| unfinished(folder)).collect();
    let new = new_machines(&file, &known, machines, &mut skipped)?;
    if !new.is_empty() {
        let text = text::insert(&file, &new)?;
        verify(&file, &text, &new)?;
        expect_accepted(check(ConfigFile { path: file.path, text: text.clone() }), &new)?;
        replace::replace(qemu_yaml, &text)?;
    }
    Ok(Imported { added: new.into_iter().map(|machine| machine.name).collect(), skipped })
}

/// Reads the file, or returns the commented default if the file is missing or empty.
fn read_or_default(path: &Path) -> Result<ConfigFile> {
    if path.exists() {
        let file = ConfigFile::read(path)?;
        if !file.text.trim().is_empty() {
            return Ok(file);
        }
    }
    Ok(ConfigFile { path: path.to_owned(), text: DEFAULT.to_owned() })
}

/// The machines of a `qemu.yaml`, read as the machinery reads them.
#[derive(Deserialize)]
struct ExistingMachines {
    #[serde(default)]
    machines: Machines<Paths>,
}

#[derive(Deserialize)]
struct Paths {
    #[serde(default, deserialize_with = "empty_as_none")]
    qcow2_path: Option<String>,
    #[serde(default, deserialize_with = "empty_as_none")]
    snapshot_path: Option<String>,
    #[serde(default, deserialize_with = "empty_as_none")]
    machineinfo_path: Option<String>,
}

/// A machine to import, and its entry as the machinery will read it.
struct Candidate {
    machine: Machine,
    entry: Configured<Paths>,
}

impl Candidate {
    /// Reads the entry as the machinery will, so that the import refuses values that the machinery would
    /// refuse.
    fn new(machine: Machine) -> Result<Self> {
        let file = ConfigFile { path: machine.source.clone(), text: text::single_machine(&machine) };
        let entries = file.parse::<ExistingMachines>().map_err(|error| machine.refused(&error))?.machines;
        match entries.into_iter().next() {
            Some(entry) => Ok(Candidate { machine, entry }),
            None => Err(machine.error("name", "no entry can be made of this name")),
        }
    }
}

/// Returns the machines that are new, and adds equal entries of the file to `skipped`. All other machines are
/// errors.
fn new_machines(
    file: &ConfigFile,
    known: &Machines<Paths>,
    candidates: Vec<Candidate>,
    skipped: &mut Vec<Skipped>,
) -> Result<Vec<Machine>> {
    let mut problems = Vec::new();
    let mut new: Vec<Candidate> = Vec::new();
    for candidate in candidates {
        let name = &candidate.machine.name;
        if let Some(old) = known.iter().find(|old| old.name == *name) {
            match differing_keys(old, &candidate.entry) {
                keys if keys.is_empty() => skipped.push(unchanged(name)),
                keys => problems.push(differs(file, &candidate.machine, &keys)),
            }
            continue;
        }
        if let Some(twin) = new.iter().find(|other| other.machine.name == *name) {
            problems.push(same_name(&candidate.machine, &twin.machine));
            continue;
        }
        let others = known.iter().chain(new.iter().map(|other| &other.entry));
        problems.extend(others.filter_map(|other| conflict(&candidate, other)));
        new.push(candidate);
    }
    match Error::all(problems) {
        None => Ok(new.into_iter().map(|candidate| candidate.machine).collect()),
        Some(problems) => Err(problems),
    }
}

fn unfinished(folder: &Path) -> Skipped {
    let name = folder.file_name().unwrap_or(folder.as_os_str()).display().to_string();
    Skipped { name, reason: format!("its folder has no {}", vmcloak::FILE_NAME) }
}

fn unchanged(name: &str) -> Skipped {
    Skipped { name: name.to_owned(), reason: "qemu.yaml has this machine already, unchanged".to_owned() }
}

fn differs(file: &ConfigFile, machine: &Machine, keys: &[&str]) -> Error {
    file.error(
        &["machines", &machine.name],
        format!("the file has this machine already, with another {}", keys.join(", ")),
    )
    .machine(&machine.name)
    .advice(format!(
        "Remove this entry to import it again from {}, or leave that folder out of the import",
        machine.source.display()
    ))
}

fn same_name(machine: &Machine, twin: &Machine) -> Error {
    machine
        .error("name", format!("{} has the same name", twin.source.display()))
        .advice("Import only one of the two, or give one another name in its machineinfo.json")
}

/// Returns an error if both machines have the same value for one of the [`UNIQUE`] keys.
fn conflict(candidate: &Candidate, other: &Configured<Paths>) -> Option<Error> {
    let (ours, theirs) = (values(&candidate.entry), values(other));
    let mut shared = ours.iter().filter(|value| UNIQUE.contains(&value.0) && !value.1.is_empty());
    let (key, value) = shared.find(|value| theirs.contains(value))?;
    let reason = format!("'{value}' is already the {key} of machine '{}'", other.name);
    Some(
        candidate
            .machine
            .error(vmcloak::vmcloak_key(key), reason)
            .advice(format!("Give each machine its own {key}, or leave one of the two out")),
    )
}

/// Returns the keys in which two entries differ.
fn differing_keys(old: &Configured<Paths>, new: &Configured<Paths>) -> Vec<&'static str> {
    let pairs = values(old).into_iter().zip(values(new));
    pairs.filter(|(old, new)| old != new).map(|(_, (key, _))| key).collect()
}

/// Returns the keys of an entry in a comparable form. Paths are resolved, and tags are sorted because VMCloak
/// writes them in random order.
fn values(machine: &Configured<Paths>) -> [(&'static str, String); 11] {
    let Configured { name: _, shared, own } = machine;
    let mut tags = shared.tags.clone();
    tags.sort();
    [
        ("qcow2_path", resolved(own.qcow2_path.as_ref())),
        ("snapshot_path", resolved(own.snapshot_path.as_ref())),
        ("machineinfo_path", resolved(own.machineinfo_path.as_ref())),
        ("ip", shared.ip.clone()),
        ("platform", shared.platform.clone()),
        ("os_version", shared.os_version.clone()),
        ("architecture", shared.architecture.clone()),
        ("interface", shared.interface.clone().unwrap_or_default()),
        ("agent_port", shared.agent_port.to_string()),
        ("mac_address", shared.mac_address.clone().unwrap_or_default()),
        ("tags", tags.join(", ")),
    ]
}

fn resolved(path: Option<&String>) -> String {
    let Some(path) = path else { return String::new() };
    fs::canonicalize(path).map_or_else(|_| path.clone(), |real| real.display().to_string())
}

/// Expects that the new text differs from the old one by these machines only.
fn verify(file: &ConfigFile, text: &str, machines: &[Machine]) -> Result<()> {
    let mut expected: Mapping = file.parse()?;
    let section = expected.entry("machines".into()).or_insert(Value::Null);
    if section.is_null() {
        *section = Mapping::new().into();
    }
    if let Value::Mapping(section) = section {
        section.extend(machines.iter().map(|machine| (machine.name.clone().into(), machine.entry())));
    }
    match serde_yaml::from_str::<Mapping>(text) {
        Ok(got) if got == expected => Ok(()),
        _ => Err(text::not_editable(file, "text cannot be added safely to a file of this form")),
    }
}

/// Expects that the plugin accepts the arguments of all new machines. The command `check` reports other
/// problems, such as a missing bridge.
fn expect_accepted(checked: Result<Report>, new: &[Machine]) -> Result<()> {
    let report = match checked {
        Ok(report) => report,
        Err(error) => {
            tracing::warn!(%error, "the machines' start_args were not checked");
            return Ok(());
        }
    };
    let is_about = |text: &str, machine: &Machine| {
        text.contains(&format!(": machines.{}.machineinfo_path: ", machine.name))
    };
    let problems = report.findings().iter().filter(|finding| finding.level == Level::Problem);
    let refused = problems.filter(|finding| new.iter().any(|machine| is_about(&finding.text, machine)));
    Error::all(refused.map(|finding| Error::configuration(&finding.text)).collect()).map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests;
