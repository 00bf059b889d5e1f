//! `import`: adds the machines of another tool to the configuration file of their machinery.
//!
//! The file is the operator's and has comments. So the import inserts one block of text at the end of the
//! `machines` mapping and leaves all other text as it is. Then it parses the text before and after. Both must
//! differ by the new machines only; otherwise the file stays unchanged.
//!
//! ```text
//! source ─▶ machines ─▶ new, unchanged or in conflict? ─▶ insert ─▶ verify ─▶ check ─▶ replace
//! (vmcloak, libvirt, cape)        (here)                  (text)    (here)   (plugin)  (replace)
//! ```
//!
//! The file is written after all checks have passed. One machine in conflict stops the whole import, so that
//! no partial import remains. So does one that lacks a value; all such values are asked for in one message.

mod accept;
mod candidate;
mod cape;
mod edit;
mod entry;
mod given;
mod libvirt;
mod outcome;
mod replace;
mod section;
mod text;
mod vmcloak;

use std::path::Path;

use clap::{Args, Subcommand};
use machinery::config::{ConfigFile, Configured, Machines, is_machine_name};
use machinery::{Error, Result};
use serde_yaml::{Mapping, Value};

pub use accept::{Check, without_lines};
use accept::{expect_accepted, problems_of};
use candidate::{Candidate, ExistingMachines, OwnKeys, entry_of, values};
use edit::expect_content;
pub use edit::{apply, remove, restore, set, without};
use entry::{Found, Machine};
pub use libvirt::LOCAL;
use libvirt::Libvirt;
pub use libvirt::qemu::{Disks, Domain as DomainForQemu, Options as OptionsForQemu};
use libvirt::qemu::{Options, Target};
pub use libvirt::virsh::Virsh;
pub use libvirt::xml::{Domain, Network};
pub use outcome::{Imported, Skipped};
pub use section::Section;

/// The initial texts of new configuration files.
pub const QEMU_DEFAULT: &str = include_str!("../../../../../conf/machineries/qemu.yaml");
const KVM_DEFAULT: &str = include_str!("../../../../../conf/machineries/kvm.yaml");

/// The libvirt of a `kvm.yaml` that does not name one.
pub const DEFAULT_DSN: &str = "qemu:///system";

/// The arguments of the command.
#[derive(Debug, Clone, Args)]
pub struct Import {
    #[command(subcommand)]
    source: Source,
    /// Print the new entries, and write nothing
    #[arg(long, global = true)]
    dry_run: bool,
    /// Refuse each problem that the configuration has only with the new machines.
    #[arg(skip)]
    is_strict: bool,
}

/// The tools whose machines can be imported.
#[derive(Debug, Clone, Subcommand)]
enum Source {
    /// Import machines that VMCloak made into conf/machineries/qemu.yaml
    Vmcloak(vmcloak::Vmcloak),
    /// Import domains of libvirt into conf/machineries/kvm.yaml
    Libvirt(Box<Libvirt>),
    /// Import the machines of CAPE's kvm.conf into conf/machineries/kvm.yaml
    Cape(cape::Cape),
}

impl Import {
    /// Returns the import of the machine in this folder, which has a description as VMCloak writes it. The plugin has to
    /// accept the machine.
    pub fn of_folder(folder: &Path) -> Import {
        let folders = vec![folder.to_owned()];
        Import { source: Source::Vmcloak(vmcloak::Vmcloak { folders }), dry_run: false, is_strict: true }
    }

    /// Returns the import of this domain, whose machine has its name and these values. The plugin has to accept the machine.
    pub fn of_domain(dsn: &str, label: &str, values: &[(&str, String)]) -> Import {
        let (domains, given) = (vec![label.to_owned()], given::Given::of(label, values));
        let (dsn, options) = (Some(dsn.to_owned()), Options::default());
        let source = Source::Libvirt(Box::new(Libvirt { domains, dsn, target: None, options, given }));
        Import { source, dry_run: false, is_strict: true }
    }

    /// Reports whether the import makes machines of `qemu` of domains.
    pub fn makes_machines(&self) -> bool {
        matches!(&self.source, Source::Libvirt(libvirt) if libvirt.target == Some(Target::Qemu))
    }

    /// Returns the domains that become machines of `qemu`. `kvm_yaml` has values that the operator has not given.
    ///
    /// # Errors
    /// The file or libvirt cannot be read. A domain lacks a value, is on, or has a part that cannot come over.
    pub fn domains_for_qemu(&self, kvm_yaml: &Path) -> Result<Vec<DomainForQemu>> {
        let Source::Libvirt(libvirt) = &self.source else { return Ok(Vec::new()) };
        let mut given = libvirt.given.clone();
        let known = read_existing(kvm_yaml)?.map(|file| file.parse::<ExistingMachines>()).transpose()?;
        let configured = known.as_ref().and_then(|known| known.dsn.as_deref()).unwrap_or(DEFAULT_DSN);
        let dsn = libvirt.dsn.as_deref().unwrap_or(configured);
        for entry in known.iter().flat_map(|known| known.machines.iter()) {
            let Some(label) = entry.own.label() else { continue };
            if entry.own.dsn().unwrap_or(configured) == dsn {
                values(entry).iter().for_each(|(key, value)| given.complete(label, key, value));
            }
        }
        libvirt::find_for_qemu(libvirt, dsn, &given)
    }

    /// Returns the options of machines of `qemu`.
    pub fn options(&self) -> Options {
        match &self.source {
            Source::Libvirt(libvirt) => libvirt.options.clone(),
            _ => Options::default(),
        }
    }

    /// Reports whether nothing is to be written.
    pub fn is_dry(&self) -> bool {
        self.dry_run
    }

    /// Returns the same import, which writes nothing.
    pub fn dry(self) -> Import {
        Import { dry_run: true, ..self }
    }

    /// Returns the machinery that gets the machines.
    pub fn machinery(&self) -> &'static str {
        match &self.source {
            Source::Vmcloak(_) => "qemu",
            Source::Libvirt(libvirt) if libvirt.target == Some(Target::Qemu) => "qemu",
            Source::Libvirt(_) | Source::Cape(_) => "kvm",
        }
    }

    fn default_text(&self) -> &'static str {
        if self.machinery() == "qemu" { QEMU_DEFAULT } else { KVM_DEFAULT }
    }

    fn find(&self, dsn: &str) -> Result<Found> {
        match &self.source {
            Source::Vmcloak(vmcloak) => vmcloak::find(vmcloak),
            Source::Libvirt(libvirt) => libvirt::find(libvirt, dsn),
            Source::Cape(cape) => cape::find(cape),
        }
    }

    /// Reports whether a problem that the plugin has found refuses the machine. The command `check` reports other
    /// problems, such as a missing bridge.
    fn is_refusal(&self, problem: &str, machine: &str) -> bool {
        match self.machinery() {
            "qemu" => problem.contains(&format!(": machines.{machine}.machineinfo_path: ")),
            _ => {
                problem.starts_with(&format!("machine '{machine}': "))
                    || problem.contains(&format!(": machines.{machine}.label: "))
            }
        }
    }
}

/// Adds the machines of another tool to the configuration file.
///
/// A machine with an equal entry in the file is skipped. The import refuses machines that the plugin refuses.
/// Without a plugin, the import only warns.
///
/// # Errors
/// The source cannot be read. A machine lacks a value, or the plugin refuses it. It differs from its entry in
/// the file. Two machines would share an address, a domain or a file. The text cannot be edited. The file stays
/// unchanged then.
pub fn import(import: &Import, path: &Path, check: Check<'_>) -> Result<Imported> {
    run(import, path, check).map_err(|error| error.action("import"))
}

fn run(import: &Import, path: &Path, check: Check<'_>) -> Result<Imported> {
    let existing = read_existing(path)?;
    let is_new = existing.is_none();
    let before = existing.as_ref().map_or_else(String::new, |file| file.text.clone());
    let mut file = existing.unwrap_or_else(|| default_file(import, path));
    let known = file.parse::<ExistingMachines>()?;
    let dsn = known.dsn.as_deref().unwrap_or(DEFAULT_DSN);
    let mut found = import.find(dsn)?;
    if is_new {
        set_defaults(&mut file, &found);
    } else if let Some(other) = found.dsn.take().filter(|other| other != dsn) {
        found.machines.iter_mut().for_each(|machine| machine.set("dsn", Some(other.as_str())));
    }

    let skip = |(name, reason): &(String, String)| Skipped { name: name.clone(), reason: reason.clone() };
    let mut imported = Imported {
        skipped: found.left_out.iter().map(skip).collect(),
        notes: found.notes,
        ..Imported::default()
    };
    let new = new_machines(&file, &known.machines, found.machines, &mut imported.skipped)?;
    if !new.is_empty() {
        let text = text::insert(&file, &new)?;
        verify(&file, &text, &new)?;
        let known = import.is_strict.then(|| problems_of(&file, check)).transpose()?;
        let checked = check(ConfigFile { path: file.path, text: text.clone() });
        let is_refusal = |text: &str| new.iter().any(|machine| import.is_refusal(text, &machine.name));
        let other = expect_accepted(checked, is_refusal, known.as_deref())?;
        let note = |other| format!("`check` reports another problem of {}: {other}", import.machinery());
        imported.notes.extend(other.map(note));
        if !import.dry_run {
            replace::replace(path, &before, &text)?;
        }
    }
    imported.dry_run = import.dry_run.then(|| text::machines(&new));
    for machine in new {
        imported.notes.extend(machine.notes.iter().map(|note| format!("machine '{}': {note}", machine.name)));
        imported.added.push(machine.name);
    }
    Ok(imported)
}

/// Reads the file; `None` if it is missing or empty.
fn read_existing(path: &Path) -> Result<Option<ConfigFile>> {
    if !path.exists() {
        return Ok(None);
    }
    ConfigFile::read(path).map(|file| Some(file).filter(|file| !file.text.trim().is_empty()))
}

/// Returns the commented default.
fn default_file(import: &Import, path: &Path) -> ConfigFile {
    ConfigFile { path: path.to_owned(), text: import.default_text().to_owned() }
}

/// Sets the keys above the machines of a new file.
fn set_defaults(file: &mut ConfigFile, found: &Found) {
    for (key, value) in [("dsn", &found.dsn), ("interface", &found.interface)] {
        if let Some(value) = value {
            file.text = text::with_value(&file.text, key, value);
        }
    }
}

/// Returns the machines that are new. Adds equal entries of the file to `skipped`, and domains whose name no entry can have.
/// All other machines are errors.
fn new_machines(
    file: &ConfigFile,
    known: &Machines<OwnKeys>,
    machines: Vec<Machine>,
    skipped: &mut Vec<Skipped>,
) -> Result<Vec<Machine>> {
    let mut problems = Vec::new();
    let mut new: Vec<Candidate> = Vec::new();
    for mut machine in machines {
        let old = entry_of(&machine, known.iter());
        if old.is_none() && machine.has("label") && !is_machine_name(&machine.name) {
            let reason = "its name cannot be that of a machine: write its entry by hand, with its `label`";
            skipped.push(Skipped { name: machine.name, reason: reason.to_owned() });
            continue;
        }
        let faults = if old.is_none() { machine.take_faults() } else { Vec::new() };
        if !faults.is_empty() {
            problems.extend(faults);
            continue;
        }
        let candidate = match Candidate::new(machine, old) {
            Ok(candidate) => candidate,
            Err(error) => {
                problems.push(error);
                continue;
            }
        };
        if let Some(old) = old {
            match candidate.differing_keys(old) {
                keys if keys.is_empty() => skipped.push(unchanged(file, &candidate, old)),
                keys => problems.push(differs(file, &candidate.machine, old, &keys)),
            }
            continue;
        }
        if let Some(twin) = new.iter().find(|other| other.machine.name == candidate.machine.name) {
            problems.push(same_name(&candidate.machine, &twin.machine));
            continue;
        }
        let others = known.iter().chain(new.iter().map(|other| &other.entry));
        problems.extend(others.filter_map(|other| candidate.conflict(other)));
        new.push(candidate);
    }
    match Error::all(problems) {
        None => Ok(new.into_iter().map(|candidate| candidate.machine).collect()),
        Some(problems) => Err(problems),
    }
}

fn unchanged(file: &ConfigFile, candidate: &Candidate, old: &Configured<OwnKeys>) -> Skipped {
    let (name, machine) = (file.path.file_name().unwrap_or_default().display(), &candidate.machine);
    let mut reason = match old.name == machine.name {
        true => format!("{name} has this machine already, unchanged"),
        false => format!("{name} has its domain already, as the machine '{}', unchanged", old.name),
    };
    let ip = &candidate.entry.shared.ip;
    if *ip != old.shared.ip {
        reason += &format!(". Its guest has the address {ip} now: reserve one in libvirt's network");
    }
    Skipped { name: machine.name.clone(), reason }
}

fn differs(file: &ConfigFile, machine: &Machine, old: &Configured<OwnKeys>, keys: &[&str]) -> Error {
    let reason = format!("the file has this machine already, with another {}", keys.join(", "));
    file.error(&["machines", &old.name], reason).machine(&machine.name).advice(format!(
        "Remove this entry to import it again from {}, or leave the machine out of the import",
        machine.origin
    ))
}

fn same_name(machine: &Machine, twin: &Machine) -> Error {
    machine
        .error("name", format!("{} has the same name", twin.origin))
        .advice("Import only one of the two, or give one another name")
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
    expect_content(file, text, expected)
}

#[cfg(test)]
mod tests;
