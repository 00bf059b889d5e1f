//! `import cape`: reads the machines in the configuration of CAPE's modules `kvm` and `kvmremote`.
//!
//! The file is one of Python's configparser: a section `[kvm]` with the list `machines`, and a section for each machine.
//! CAPE reads several such files, and a later one overrides keys of an earlier one. Source: `lib/cuckoo/common/config.py`
//! and `lib/cuckoo/common/abstracts.py` of CAPEv2.
//!
//! A machine gets the `label` as its name, because CAPE's tasks name machines by their label.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use configparser::ini::{Ini, IniDefault};
use machinery::{Error, Place, Result};

use super::entry::{Found, Machine, Origin};
use super::given::Given;
use super::outcome::collect_all;

/// The modules of CAPE whose machines are domains of libvirt.
const MODULES: [&str; 2] = ["kvm", "kvmremote"];

/// The keys with another name in CAPE: ours first, then CAPE's.
const RENAMED_KEYS: [(&str, &str); 2] = [("architecture", "arch"), ("name", "label")];

/// CAPE's keys of a machine that have an equivalent here.
const KEYS: [&str; 7] = ["label", "snapshot", "ip", "platform", "arch", "interface", "tags"];

/// CAPE's tags for the versions of Windows, without `win`.
const WINDOWS: [&str; 7] = ["xp", "vista", "7", "8", "8.1", "10", "11"];

/// The arguments of the command.
#[derive(Debug, Clone, Args)]
pub struct Cape {
    /// CAPE's kvm.conf; of several files, the later ones override keys of the earlier ones
    #[arg(required = true)]
    files: Vec<PathBuf>,
    #[command(flatten)]
    given: Given,
}

/// Reads the machines of CAPE.
///
/// # Errors
/// A file cannot be read, or is not one of these modules. A listed machine has no section or no label. The options
/// name another machine.
pub fn find(cape: &Cape) -> Result<Found> {
    let conf = Conf::read(&cape.files)?;
    let listed = conf.listed()?;
    let mut machines = collect_all(listed.iter().map(|section| conf.machine(section)))?;
    cape.given.expect_names(machines.iter().map(|machine| machine.name.as_str()))?;
    machines.iter_mut().for_each(|machine| cape.given.apply(machine));
    let unlisted = conf.unlisted(&listed).map(|section| {
        let reason = format!("it is not among the machines of [{}]", conf.module);
        (section.to_owned(), reason)
    });
    Ok(Found {
        left_out: unlisted.collect(),
        notes: conf.without_equivalent(&listed).into_iter().collect(),
        dsn: conf.value(conf.module, "dsn"),
        interface: conf.value(conf.module, "interface"),
        machines,
    })
}

/// The files, as one.
struct Conf {
    /// The last file, which errors name.
    path: PathBuf,
    text: String,
    module: &'static str,
    /// The values of each section, by keys in lowercase.
    sections: BTreeMap<String, HashMap<String, String>>,
}

impl Conf {
    fn read(files: &[PathBuf]) -> Result<Conf> {
        let mut defaults = IniDefault::default();
        defaults.default_section = "DEFAULT".to_owned();
        // Python's configparser keeps the case of sections, and has no comments behind a value.
        (defaults.case_sensitive, defaults.multiline) = (true, true);
        defaults.enable_inline_comments = false;
        let mut ini = Ini::new_from_defaults(defaults);
        let mut conf =
            Conf { path: PathBuf::new(), text: String::new(), module: MODULES[0], sections: BTreeMap::new() };
        for path in files {
            conf.text = fs::read_to_string(path).map_err(|error| Error::io("read", path, &error))?;
            conf.path.clone_from(path);
            ini.read_and_append(conf.text.clone()).map_err(|error| not_ini(path, &error))?;
        }
        for (section, values) in ini.get_map_ref() {
            let given = values.iter().filter_map(|(key, value)| Some((key, value.as_ref()?.trim())));
            let given = given.filter(|(_, value)| !value.is_empty());
            // `%%` is a percent sign.
            let given = given.map(|(key, value)| (key.to_lowercase(), value.replace("%%", "%")));
            conf.sections.insert(section.clone(), given.collect());
        }
        conf.module = conf.find_module()?;
        Ok(conf)
    }

    fn find_module(&self) -> Result<&'static str> {
        let known = MODULES.into_iter().find(|module| self.sections.contains_key(*module));
        known.ok_or_else(|| {
            let mut others = self.sections.iter().filter(|(_, keys)| keys.contains_key("machines"));
            let reason = match others.next() {
                Some((other, _)) => {
                    format!("the machines of CAPE's module '{other}' are no domains of libvirt")
                }
                None => "there is no section [kvm] or [kvmremote]".to_owned(),
            };
            let place = Place { file: self.path.clone(), line: None, key: None };
            Error::configuration(reason).place(place).advice("Give CAPE's kvm.conf or kvmremote.conf")
        })
    }

    /// Returns a value of the section, or else of `[DEFAULT]`.
    fn value(&self, section: &str, key: &str) -> Option<String> {
        let of = |section: &str| self.sections.get(section)?.get(key).cloned();
        of(section).or_else(|| of("DEFAULT"))
    }

    /// Returns the sections of the listed machines, each once.
    fn listed(&self) -> Result<Vec<String>> {
        let text = self.value(self.module, "machines").unwrap_or_default();
        let mut seen = BTreeSet::new();
        let names = text.split(',').map(str::trim).filter(|name| !name.is_empty() && seen.insert(*name));
        let names: Vec<String> = names.map(str::to_owned).collect();
        if names.is_empty() {
            return Err(self.error(self.module, "machines", "no machine is listed"));
        }
        Ok(names)
    }

    fn unlisted<'a>(&'a self, listed: &'a [String]) -> impl Iterator<Item = &'a str> {
        let is_machine =
            |name: &&String| *name != self.module && *name != "DEFAULT" && !listed.contains(name);
        self.sections.keys().filter(is_machine).map(String::as_str)
    }

    fn machine(&self, section: &str) -> Result<Machine> {
        if !self.sections.contains_key(section) {
            let reason = format!("there is no section [{section}]");
            return Err(self
                .error(self.module, "machines", reason)
                .advice("Add the section, or remove the machine from the list"));
        }
        let value = |key| self.value(section, key);
        let label = value("label").ok_or_else(|| {
            let reason = "there is no label, the name of the domain";
            self.error(section, "label", reason).advice("Add it; `virsh list --all` shows the names")
        })?;
        let place = self.place(section, section.to_owned());
        let mut machine = Machine::new(&label, Origin { place: Some(place), renamed: &RENAMED_KEYS });
        let tags: Vec<String> = value("tags").map(|tags| words(&tags)).unwrap_or_default();
        let platform = value("platform").map(|platform| platform.to_lowercase());
        let is_windows = platform.as_deref() == Some("windows");
        machine.set("os_version", windows_of(&tags).filter(|_| is_windows));
        machine.set("label", Some(label));
        machine.set("snapshot", value("snapshot"));
        machine.set("ip", value("ip"));
        machine.set("platform", platform);
        machine.set("architecture", value("arch").map(|arch| architecture_of(&arch)));
        machine.set("interface", value("interface").or_else(|| self.value(self.module, "interface")));
        machine.set("tags", Some(tags).filter(|tags| !tags.is_empty()));
        Ok(machine)
    }

    /// Names the keys of listed machines that have no equivalent here.
    fn without_equivalent(&self, listed: &[String]) -> Option<String> {
        let keys = listed.iter().filter_map(|section| self.sections.get(section)).flatten();
        let is_default = |key: &str, value: &str| {
            key == "reserved" && matches!(value.to_lowercase().as_str(), "no" | "false" | "off" | "0")
        };
        let others = keys.filter(|(key, value)| !KEYS.contains(&key.as_str()) && !is_default(key, value));
        let others: BTreeSet<&str> = others.map(|(key, _)| key.as_str()).collect();
        let names = others.into_iter().collect::<Vec<_>>().join(", ");
        (!names.is_empty()).then(|| {
            format!(
                "these keys of CAPE have no equivalent, and were left out: {names}. Add them to the hosted.conf that \
                 `export cape` prints"
            )
        })
    }

    fn error(&self, section: &str, key: &str, reason: impl Into<String>) -> Error {
        Error::configuration(reason).place(self.place(section, format!("{section}.{key}")))
    }

    fn place(&self, section: &str, key: String) -> Place {
        let head = format!("[{section}]");
        let line = self.text.lines().position(|line| line.trim() == head).map(|line| line + 1);
        Place { file: self.path.clone(), line, key: Some(key) }
    }
}

fn not_ini(path: &Path, error: &str) -> Error {
    Error::configuration(format!("this is not a configuration of CAPE: {error}")).place(Place {
        file: path.to_owned(),
        line: None,
        key: None,
    })
}

fn words(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Returns the version of Windows that the tags name, if they name a single one.
fn windows_of(tags: &[String]) -> Option<String> {
    let versions = tags.iter().map(|tag| tag.to_lowercase());
    let versions = versions.filter_map(|tag| tag.strip_prefix("win").map(str::to_owned));
    let mut versions = versions.filter(|version| WINDOWS.contains(&version.as_str()));
    let first = versions.next()?;
    versions.all(|other| other == first).then_some(first)
}

/// Returns Cuckoo's word for an architecture.
fn architecture_of(arch: &str) -> String {
    let arch = arch.to_lowercase();
    if arch == "x64" { "amd64".to_owned() } else { arch }
}

#[cfg(test)]
mod tests;
