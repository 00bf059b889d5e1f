//! `cuckoo-machinery import vmcloak`: machines that VMCloak made become entries of `qemu.yaml`.
//!
//! The file belongs to its operator, and has comments. So it is not read, changed and written anew;
//! one block of text is put in where the `machines` mapping ends. What a parser makes of the text
//! before and after must then differ by the new machines and by nothing else, or the file is left
//! alone.
//!
//! ```text
//! folders ─▶ read each machineinfo.json ─▶ new, unchanged or in conflict? ─▶ insert ─▶ verify ─▶ check ─▶ replace
//!            (vmcloak)                      (here)                           (text)   (here)    (plugin) (replace)
//! ```
//!
//! Nothing is written before everything has been checked, and what is in conflict stops the whole
//! import: half an import would be one more thing to find out about.

mod replace;
mod text;
mod vmcloak;

use std::fs;
use std::path::{Path, PathBuf};

use machinery::config::{ConfigFile, Configured, Machines, empty_as_none};
use machinery::{Error, Level, Report, Result};
use serde::{Deserialize, Serialize};
use serde_yaml::{Mapping, Value};

use vmcloak::Machine;

/// What a new `qemu.yaml` starts from.
const DEFAULT: &str = include_str!("../../../../../conf/machineries/qemu.yaml");

/// What no two machines may share.
const UNIQUE: [&str; 5] = ["ip", "mac_address", "qcow2_path", "snapshot_path", "machineinfo_path"];

/// What an import did.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Imported {
    /// The names of the machines that are in the file now, and were not before.
    pub added: Vec<String>,
    /// What was left as it is.
    pub skipped: Vec<Skipped>,
}

/// A machine that was not added, although nothing is wrong with it.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// The machine's name; of an unfinished one, its folder's.
    pub name: String,
    /// Why, for people.
    pub reason: String,
}

/// Asks the plugin `qemu` to check content before it is written.
pub type Check<'a> = &'a dyn Fn(ConfigFile) -> Result<Report>;

/// Adds the machines of VMCloak's folders to `qemu.yaml`. A folder is a machine's own or one that
/// holds such folders. A machine that is in the file already, just so, is skipped. What the plugin
/// refuses in a machine's arguments, the import refuses; if there is no plugin to ask, it only warns.
///
/// # Errors
/// A folder without machines, a `machineinfo.json` that is incomplete or has arguments that the plugin
/// refuses, a machine that is in the file but differs, an address or file that two machines would share,
/// a file that cannot be edited. The file is then as it was.
pub fn vmcloak(qemu_yaml: &Path, folders: &[PathBuf], check: Check<'_>) -> Result<Imported> {
    import(qemu_yaml, folders, check).map_err(|error| error.action("import"))
}

fn import(qemu_yaml: &Path, folders: &[PathBuf], check: Check<'_>) -> Result<Imported> {
    let file = current(qemu_yaml)?;
    let known = file.parse::<Known>()?.machines;
    let found = vmcloak::find(folders)?;
    let machines = every(found.files.iter().map(|path| vmcloak::read(path).and_then(Candidate::new)))?;

    let mut skipped = found.unfinished;
    let new = sort(&file, &known, machines, &mut skipped)?;
    if !new.is_empty() {
        let text = text::insert(&file, &new)?;
        verify(&file, &text, &new)?;
        accepted(check(ConfigFile { path: file.path, text: text.clone() }), &new)?;
        replace::replace(qemu_yaml, &text)?;
    }
    Ok(Imported { added: new.into_iter().map(|machine| machine.name).collect(), skipped })
}

/// The file as it is, or the commented default where there is none.
fn current(path: &Path) -> Result<ConfigFile> {
    if path.exists() {
        let file = ConfigFile::read(path)?;
        if !file.text.trim().is_empty() {
            return Ok(file);
        }
    }
    Ok(ConfigFile { path: path.to_owned(), text: DEFAULT.to_owned() })
}

/// The part of `qemu.yaml` that an import compares with, read as the machinery reads it.
#[derive(Deserialize)]
struct Known {
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

/// A machine to import, beside what the machinery will read of its entry.
struct Candidate {
    machine: Machine,
    entry: Configured<Paths>,
}

impl Candidate {
    /// Reads the entry as the machinery will: what it would refuse is better refused now.
    fn new(machine: Machine) -> Result<Self> {
        let file = ConfigFile { path: machine.source.clone(), text: text::alone(&machine) };
        let entries = file.parse::<Known>().map_err(|error| machine.refused(&error))?.machines;
        match entries.into_iter().next() {
            Some(entry) => Ok(Candidate { machine, entry }),
            None => Err(machine.error("name", "it makes no entry")),
        }
    }
}

/// The machines that are new. Those the file has already are skipped, the rest are errors.
fn sort(
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
            match differing(old, &candidate.entry) {
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
        problems.extend(others.filter_map(|other| clash(&candidate, other)));
        new.push(candidate);
    }
    match Error::all(problems) {
        None => Ok(new.into_iter().map(|candidate| candidate.machine).collect()),
        Some(problems) => Err(problems),
    }
}

fn unchanged(name: &str) -> Skipped {
    Skipped { name: name.to_owned(), reason: "it is there already, unchanged".to_owned() }
}

fn differs(file: &ConfigFile, machine: &Machine, keys: &[&str]) -> Error {
    file.error(&["machines", &machine.name], format!("it is there already, with another {}", keys.join(", ")))
        .machine(&machine.name)
        .advice(format!(
            "Remove this entry to have it made anew from {}, or leave that folder out of the import",
            machine.source.display()
        ))
}

fn same_name(machine: &Machine, twin: &Machine) -> Error {
    machine
        .error("name", format!("{} has the same name", twin.source.display()))
        .advice("Import only one of the two, or give one another name in its machineinfo.json")
}

/// An error if the two would share what no two machines may.
fn clash(candidate: &Candidate, other: &Configured<Paths>) -> Option<Error> {
    let (ours, theirs) = (values(&candidate.entry), values(other));
    let mut shared = ours.iter().filter(|value| UNIQUE.contains(&value.0) && !value.1.is_empty());
    let (key, value) = shared.find(|value| theirs.contains(value))?;
    let reason = format!("'{value}' is already the {key} of machine '{}'", other.name);
    Some(
        candidate
            .machine
            .error(vmcloak::name_of(key), reason)
            .advice(format!("Give each machine its own {key}, or leave one of the two out")),
    )
}

/// The keys in which two entries differ.
fn differing(old: &Configured<Paths>, new: &Configured<Paths>) -> Vec<&'static str> {
    let pairs = values(old).into_iter().zip(values(new));
    pairs.filter(|(old, new)| old != new).map(|(_, (key, _))| key).collect()
}

/// All keys of an entry in a form that can be compared: paths resolved, and tags sorted, because
/// VMCloak writes them in a random order.
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

/// The new text must say what the old one said and the new machines, and nothing else.
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
        _ => Err(text::not_editable(file, "it is written in a way that text cannot safely be added to")),
    }
}

/// Expects that the plugin accepts the arguments of all new machines. Other findings, such as a missing
/// bridge, are left to `check`.
fn accepted(checked: Result<Report>, new: &[Machine]) -> Result<()> {
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

/// All results, or all errors as one.
fn every<T>(results: impl Iterator<Item = Result<T>>) -> Result<Vec<T>> {
    let mut problems = Vec::new();
    let kept = results.filter_map(|result| result.map_err(|error| problems.push(error)).ok()).collect();
    match Error::all(problems) {
        None => Ok(kept),
        Some(problems) => Err(problems),
    }
}

#[cfg(test)]
mod tests;
