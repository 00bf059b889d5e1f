//! `conf/machineries/example.yaml`, as types.
//!
//! `machinery::config` reads the keys that all machineries share (`ip`, `platform`, `tags` and so on), and adds file,
//! line and key to every error. This module defines the keys of this machinery only.

use std::path::PathBuf;

use machinery::config::{ConfigFile, Configured, Machines, expect_interface, renamed_keys, text};
use machinery::{Error, MachineInfo, Result, Setup};
use machinery_backend::MachineKeys;
use serde::Deserialize;

/// The file. `deny_unknown_fields` reports a misspelt key at once; it would otherwise be ignored.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// The network interface for captures, for machines without their own.
    #[serde(deserialize_with = "text")]
    interface: String,
    /// The folder for the folders of runs.
    #[serde(default, alias = "disk_dir")]
    run_dir: Option<PathBuf>,
    machines: Machines<OwnKeys>,
}

/// One machine's own keys, in the same mapping as the shared ones.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnKeys {
    /// The hypervisor's name for the machine.
    #[serde(deserialize_with = "text")]
    pub label: String,
    /// The number in the snapshot's memory.
    pub snapshot: u32,
    /// The time after which the guest powers itself off, in milliseconds.
    #[serde(default, alias = "lives_ms")]
    pub poweroff_after_ms: Option<u64>,
}

/// The keys with a new name, as (old, new). The old name is accepted until the next release.
const RENAMED: &[(&str, &str)] = &[("lives_ms", "poweroff_after_ms"), ("disk_dir", "run_dir")];

/// The configuration, which is valid.
#[derive(Debug)]
pub struct Config {
    /// The keys of all machines, in the order of the file.
    pub keys: Vec<Keys>,
    pub warnings: Vec<String>,
}

impl Config {
    /// Reads the file. The error lists all problems, so that the operator can correct them together.
    pub fn read(setup: &Setup) -> Result<Config> {
        let file: File = setup.config.parse()?;
        if let Some(problems) = Error::all(file.problems(&setup.config)) {
            return Err(problems);
        }
        Ok(Config { warnings: file.warnings(&setup.config), keys: file.keys(setup) })
    }
}

impl File {
    /// Returns a warning for each key that has a new name.
    fn warnings(&self, file: &ConfigFile) -> Vec<String> {
        let machines = self.machines.iter().map(|machine| vec!["machines", &machine.name]);
        let places = machines.chain([Vec::new()]);
        places.flat_map(|place| renamed_keys(file, &place, RENAMED)).collect()
    }

    fn problems(&self, file: &ConfigFile) -> Vec<Error> {
        // The interface already checks that names are unique.
        let mut problems = self.machines.duplicates(file, |machine| {
            vec![
                ("ip", Some(&machine.shared.ip)),
                ("label", Some(&machine.own.label)),
                ("mac_address", machine.shared.mac_address.as_deref()),
            ]
        });
        problems.extend(expect_interface(file, &["interface"], &self.interface).err());
        problems
    }

    fn keys(self, setup: &Setup) -> Vec<Keys> {
        let run_dir = self.run_dir.unwrap_or_else(|| setup.state_dir.clone());
        let keys = |Configured { name, shared, own }: Configured<OwnKeys>| {
            let (label, snapshot) = (own.label.clone(), Some(own.snapshot.to_string()));
            let info = MachineInfo::new(&name, &shared, label, snapshot, &self.interface);
            Keys { info, own, run_dir: run_dir.clone() }
        };
        self.machines.into_iter().map(keys).collect()
    }
}

/// The keys of one machine: its info for Cuckoo, and its own keys. A reload replaces a machine whose keys differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    pub info: MachineInfo,
    pub own: OwnKeys,
    /// The folder that has the folder of its run.
    pub run_dir: PathBuf,
}

impl MachineKeys for Keys {
    fn info(&self) -> &MachineInfo {
        &self.info
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_key_is_reported_with_its_line_and_its_new_name() {
        let machine =
            |keys: &str| format!("{{label: a, ip: 10.0.0.1, platform: x, os_version: 1, snapshot: 1{keys}}}");
        let warnings = |keys: &str| {
            let text = format!("interface: lo\nmachines:\n  a: {}\n", machine(keys));
            let file = ConfigFile { path: "/c/example.yaml".into(), text };
            file.parse::<File>().unwrap().warnings(&file)
        };
        assert_eq!(warnings(", poweroff_after_ms: 5"), [""; 0]);
        let old = warnings(", lives_ms: 5");
        assert_eq!(old.len(), 1);
        assert!(old[0].starts_with("/c/example.yaml:3: machines.a.lives_ms: "), "{old:?}");
        assert!(old[0].contains("`poweroff_after_ms`"), "{old:?}");
    }
}
