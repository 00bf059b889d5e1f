//! A machine to import beside the entries that a file already has.

use std::fs;

use machinery::config::{ConfigFile, Configured, Machines, empty_as_none};
use machinery::{Error, Result};
use serde::Deserialize;

use super::entry::{Machine, NEEDED};
use super::text;

/// The keys whose values no two machines may share.
const UNIQUE: [&str; 6] = ["label", "ip", "mac_address", "qcow2_path", "snapshot_path", "machineinfo_path"];

/// The content of a configuration file, as far as an import needs it.
#[derive(Debug, Deserialize)]
pub struct ExistingMachines {
    #[serde(default, deserialize_with = "empty_as_none")]
    pub dsn: Option<String>,
    #[serde(default)]
    pub machines: Machines<OwnKeys>,
}

/// The keys of an entry that only one machinery has.
#[derive(Debug, Clone, Deserialize)]
pub struct OwnKeys {
    #[serde(default, deserialize_with = "empty_as_none")]
    label: Option<String>,
    #[serde(default, deserialize_with = "empty_as_none")]
    dsn: Option<String>,
    #[serde(default, deserialize_with = "empty_as_none")]
    snapshot: Option<String>,
    #[serde(default, deserialize_with = "empty_as_none")]
    qcow2_path: Option<String>,
    #[serde(default, deserialize_with = "empty_as_none")]
    snapshot_path: Option<String>,
    #[serde(default, deserialize_with = "empty_as_none")]
    machineinfo_path: Option<String>,
}

impl OwnKeys {
    /// Returns the domain of a machine of `kvm`.
    pub fn label(&self) -> Option<&str> {
        self.label.as_deref()
    }

    /// Returns the address of its libvirt, if it names one.
    pub fn dsn(&self) -> Option<&str> {
        self.dsn.as_deref()
    }
}

/// A machine to import, and its entry as the machinery will read it.
#[derive(Debug)]
pub struct Candidate {
    pub machine: Machine,
    pub entry: Configured<OwnKeys>,
}

impl Candidate {
    /// Reads the entry as the machinery will, so that the import refuses values that the machinery would
    /// refuse. `known` has the values of keys that the machine lacks.
    ///
    /// # Errors
    /// The machinery would refuse a value, or the name.
    pub fn new(machine: Machine, known: Option<&Configured<OwnKeys>>) -> Result<Self> {
        // The name of a domain may be none of a machine, while its entry has one.
        let name = known.map_or(&machine.name, |known| &known.name);
        let mut complete = Machine::new(name, machine.origin.clone());
        complete.keys.clone_from(&machine.keys);
        for (key, value) in known.map(values).into_iter().flatten() {
            if NEEDED.iter().any(|needed| needed.0 == key) && !machine.has(key) {
                complete.set(key, Some(value));
            }
        }
        let text = text::machines(std::slice::from_ref(&complete));
        let file = ConfigFile { path: "the entry".into(), text };
        let entries = file.parse::<ExistingMachines>().map_err(|error| machine.refused(&error))?.machines;
        match entries.into_iter().next() {
            Some(entry) => Ok(Candidate { machine, entry }),
            None => Err(machine.error("name", "no entry can be made of this name")),
        }
    }

    /// Returns an error if both machines have the same value for a key that must be unique.
    pub fn conflict(&self, other: &Configured<OwnKeys>) -> Option<Error> {
        let (ours, theirs) = (values(&self.entry), values(other));
        // A label is unique in its libvirt.
        let is_unique =
            |key| UNIQUE.contains(&key) && (key != "label" || self.entry.own.dsn == other.own.dsn);
        let mut shared = ours.iter().filter(|value| is_unique(value.0) && !value.1.is_empty());
        let (key, value) = shared.find(|value| theirs.contains(value))?;
        let reason = format!("'{value}' is already the {key} of machine '{}'", other.name);
        let advice = format!("Give each machine its own {key}, or leave one of the two out");
        Some(self.machine.error(key, reason).advice(advice))
    }

    /// Returns the keys that both entries have, with different values. An address that may change is no difference, and
    /// another libvirt is one.
    pub fn differing_keys(&self, old: &Configured<OwnKeys>) -> Vec<&'static str> {
        let pairs = values(old).into_iter().zip(values(&self.entry));
        let differ = pairs.filter(|(old, new)| old.1 != new.1 && !old.1.is_empty() && !new.1.is_empty());
        let keys = differ.map(|(_, (key, _))| key).filter(|key| self.machine.has(key));
        let keys = keys.filter(|key| *key != "ip" || !self.machine.has_changing_ip);
        let is_elsewhere = self.machine.has("label") && self.entry.own.dsn != old.own.dsn;
        is_elsewhere.then_some("dsn").into_iter().chain(keys).collect()
    }
}

/// Finds the entry of the machine: the one of its name, or else the one of its domain.
pub fn entry_of<'a>(
    machine: &Machine,
    entries: impl Iterator<Item = &'a Configured<OwnKeys>> + Clone,
) -> Option<&'a Configured<OwnKeys>> {
    let value =
        |key: &str| machine.keys.iter().find(|(own, _)| *own == key).and_then(|(_, value)| value.as_str());
    let (label, dsn) = (value("label"), value("dsn"));
    let is_its_domain = |entry: &&'a Configured<OwnKeys>| {
        label.is_some() && entry.own.label.as_deref() == label && entry.own.dsn.as_deref() == dsn
    };
    let mut named = entries.clone();
    let named = named.find(|entry| entry.name == machine.name);
    named.or_else(|| entries.into_iter().find(is_its_domain))
}

/// Returns the keys of an entry in a comparable form. Paths are resolved, and tags are sorted because VMCloak
/// writes them in random order.
pub fn values(machine: &Configured<OwnKeys>) -> [(&'static str, String); 13] {
    let Configured { name: _, shared, own } = machine;
    let mut tags = shared.tags.clone();
    tags.sort();
    [
        ("label", own.label.clone().unwrap_or_default()),
        ("snapshot", own.snapshot.clone().unwrap_or_default()),
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
