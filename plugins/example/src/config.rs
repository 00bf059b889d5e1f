//! `conf/machineries/example.yaml`, as types.
//!
//! `machinery::config` reads the keys that all machineries share (`ip`, `platform`, `tags` and so on)
//! and finds file, line and key for every error. What is here are the keys of this machinery alone.

use std::path::{Path, PathBuf};

use machinery::config::{ConfigFile, Configured, Machines, expect_interface, text};
use machinery::{Error, MachineInfo, Result, Setup};
use serde::Deserialize;

/// The file. An unknown key is a typing error that would otherwise be found weeks later.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the traffic of machines can be captured that name no interface of their own.
    #[serde(deserialize_with = "text")]
    interface: String,
    /// Where disposable disks go.
    #[serde(default)]
    disk_dir: Option<PathBuf>,
    machines: Machines<OwnKeys>,
}

/// One machine's own keys, which stand beside the shared ones.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnKeys {
    /// What the hypervisor calls it.
    #[serde(deserialize_with = "text")]
    pub label: String,
    /// The number in the snapshot's memory.
    pub snapshot: u32,
    /// The guest powers itself off after it has run so long, in milliseconds.
    #[serde(default)]
    pub poweroff_after_ms: Option<u64>,
}

impl Config {
    /// Reads the file, and tells all that is wrong with it at once: nobody likes to start a host five
    /// times to learn of five typing errors.
    pub fn read(setup: &Setup) -> Result<Config> {
        let config: Config = setup.config.parse()?;
        match Error::all(config.problems(&setup.config)) {
            None => Ok(config),
            Some(problems) => Err(problems),
        }
    }

    fn problems(&self, file: &ConfigFile) -> Vec<Error> {
        // What two machines may not have in common. Names are looked after already.
        let mut problems = self.machines.duplicates(file, |machine| {
            vec![
                ("ip", Some(&machine.shared.ip)),
                ("label", Some(&machine.own.label)),
                ("mac_address", machine.shared.mac_address.as_deref()),
            ]
        });
        problems.extend(expect_interface(file, &["interface"], &self.interface).err());
        for machine in self.machines.iter().filter(|machine| !is_file_name(&machine.own.label)) {
            let reason = format!("'{}' is to be the name of a file", machine.own.label);
            let error = file.error(&["machines", &machine.name, "label"], reason);
            problems.push(error.advice("Use letters, digits, '-', '_' and '.'"));
        }
        problems
    }

    /// All that is to be known of each machine, in the order of the file.
    pub fn keys(self, setup: &Setup) -> Vec<Keys> {
        // What can be made again has a folder that is this machinery's own.
        let disk_dir = self.disk_dir.unwrap_or_else(|| setup.cache_dir.join("disks"));
        let keys = |Configured { name, shared, own }: Configured<OwnKeys>| {
            let (label, snapshot) = (own.label.clone(), Some(own.snapshot.to_string()));
            let disk = disk_dir.join(&label);
            Keys { info: MachineInfo::new(&name, &shared, label, snapshot, &self.interface), own, disk }
        };
        self.machines.into_iter().map(keys).collect()
    }
}

/// One machine: what Cuckoo is told of it, and what is needed to drive it. A machine with other keys is
/// another machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    pub info: MachineInfo,
    pub own: OwnKeys,
    /// Where its disposable disk is while there is a run.
    pub disk: PathBuf,
}

/// What comes from a file and becomes a path has to be looked at first.
fn is_file_name(text: &str) -> bool {
    Path::new(text).file_name().is_some_and(|name| name == text)
}
