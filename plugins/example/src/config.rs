//! `conf/machineries/example.yaml`, as types.

use std::collections::BTreeMap;

use machinery::config::{ConfigFile, Machines, null_as_default};
use machinery::{Capabilities, Error, MachineInfo, Result, Setup};
use serde::Deserialize;

/// The actions that delays and faults can be given for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    RestoreStart,
    NorestoreStart,
    Stop,
    AcpiStop,
    DumpMemory,
    Screenshot,
    Prepare,
    State,
}

/// What goes wrong in an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// It returns an error.
    Fail,
    /// It does not return for ten minutes, whatever its deadline.
    Hang,
    /// It waits until its deadline has passed, and says so.
    Timeout,
    /// It panics.
    Panic,
    /// It says it is done and has done nothing.
    Lie,
}

/// What is optional in the interface, and can be left out for a test.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Able {
    norestore_start: bool,
    acpi_stop: bool,
    dump_memory: bool,
    screenshot: bool,
    /// Off unless asked for: it is not what most tests are about.
    prepare: bool,
}

impl Default for Able {
    fn default() -> Self {
        Able { norestore_start: true, acpi_stop: true, dump_memory: true, screenshot: true, prepare: false }
    }
}

impl From<Able> for Capabilities {
    fn from(able: Able) -> Self {
        Capabilities {
            norestore_start: able.norestore_start,
            acpi_stop: able.acpi_stop,
            dump_memory: able.dump_memory,
            screenshot: able.screenshot,
            prepare: able.prepare,
        }
    }
}

/// One machine's own keys.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnKeys {
    pub label: String,
    /// The counter's value in the snapshot.
    #[serde(default = "snapshot")]
    pub snapshot: u32,
    /// How long each action takes, in milliseconds.
    #[serde(default, deserialize_with = "null_as_default")]
    pub delays_ms: BTreeMap<Action, u64>,
    /// What goes wrong in it.
    #[serde(default, deserialize_with = "null_as_default")]
    pub faults: BTreeMap<Action, Fault>,
    /// The fault shows only this many times; always, if not given.
    #[serde(default)]
    pub fault_times: Option<u32>,
    /// The machine powers itself off this long after a start, in milliseconds.
    #[serde(default)]
    pub dies_after_ms: Option<u64>,
}

fn snapshot() -> u32 {
    1000
}

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    interface: String,
    #[serde(default)]
    pub capabilities: Able,
    pub machines: Machines<OwnKeys>,
}

impl Config {
    pub fn read(setup: &Setup) -> Result<Config> {
        let config: Config = setup.config.parse()?;
        match Error::all(config.problems(&setup.config)) {
            None => Ok(config),
            Some(problems) => Err(problems),
        }
    }

    fn problems(&self, file: &ConfigFile) -> Vec<Error> {
        self.machines.duplicates(file, |machine| {
            vec![
                ("ip", Some(&machine.shared.ip)),
                ("label", Some(&machine.own.label)),
                ("mac_address", machine.shared.mac_address.as_deref()),
            ]
        })
    }

    pub fn infos(&self) -> Vec<MachineInfo> {
        let info = |machine: &machinery::config::Configured<OwnKeys>| {
            let snapshot = Some(machine.own.snapshot.to_string());
            MachineInfo::new(
                &machine.name,
                &machine.shared,
                machine.own.label.clone(),
                snapshot,
                &self.interface,
            )
        };
        self.machines.iter().map(info).collect()
    }
}
