//! `conf/machineries/example-process.yaml` and the section of `machinery-host.yaml`, as types.

use std::path::PathBuf;

use machinery::config::{Configured, Machines, expect_interface, text};
use machinery::{Error, MachineInfo, Result, Setup, parse_bytes};
use machinery_backend::{MachineKeys, Standby};
use serde::Deserialize;

/// The file. `deny_unknown_fields` reports a misspelt key at once; it would otherwise be ignored.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// The network interface for captures, for machines without their own.
    #[serde(deserialize_with = "text")]
    interface: String,
    /// The program of the hypervisor.
    program: PathBuf,
    machines: Machines<OwnKeys>,
}

/// One machine's own keys, in the same mapping as the shared ones.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct OwnKeys {
    /// The file with the saved state.
    snapshot: PathBuf,
}

/// The section of `machinery-host.yaml`, for keys that Cuckoo's files do not have.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Section {
    standby: Standby,
    #[serde(deserialize_with = "parse_bytes")]
    standby_memory_limit: Option<u64>,
    #[serde(deserialize_with = "parse_bytes")]
    standby_memory_reserve: Option<u64>,
}

/// The configuration, which is valid.
#[derive(Debug)]
pub struct Config {
    pub program: PathBuf,
    pub standby_memory_limit: Option<u64>,
    pub standby_memory_reserve: Option<u64>,
    /// The keys of all machines, in the order of the file.
    pub machines: Vec<Keys>,
}

/// The keys of one machine. A reload replaces a machine whose keys differ, and discards its standby.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    pub info: MachineInfo,
    pub snapshot: PathBuf,
    pub standby: Standby,
}

impl MachineKeys for Keys {
    fn info(&self) -> &MachineInfo {
        &self.info
    }
}

impl Config {
    /// Reads both files. The error lists all problems, so that the operator can correct them together.
    pub fn read(setup: &Setup, name: &str) -> Result<Config> {
        let File { interface, program, machines } = setup.config.parse()?;
        let section: Section = setup.section(name)?;
        let mut problems = machines.duplicates(&setup.config, |machine| {
            vec![("ip", Some(&machine.shared.ip)), ("mac_address", machine.shared.mac_address.as_deref())]
        });
        problems.extend(expect_interface(&setup.config, &["interface"], &interface).err());
        if let Some(problems) = Error::all(problems) {
            return Err(problems);
        }
        let keys = |Configured { name, shared, own }: Configured<OwnKeys>| {
            let snapshot = Some(own.snapshot.display().to_string());
            Keys {
                info: MachineInfo::new(&name, &shared, name.clone(), snapshot, &interface),
                snapshot: own.snapshot,
                standby: section.standby,
            }
        };
        let machines = machines.into_iter().map(keys).collect();
        let Section { standby_memory_limit, standby_memory_reserve, .. } = section;
        Ok(Config { program, standby_memory_limit, standby_memory_reserve, machines })
    }
}
