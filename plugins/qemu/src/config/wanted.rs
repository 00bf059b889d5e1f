//! A machine that is wanted: as the two files describe it, before its own files are read.

use std::net::Ipv4Addr;

use machinery::Error;
use machinery::config::{ConfigFile, Configured};

use super::keys::OwnKeys;
use super::section::Section;

/// A machine before its files are read.
pub struct Wanted {
    /// The keys of the machine; a clone has those of its base, with another name and address.
    pub machine: Configured<OwnKeys>,
    /// The machine of `qemu.yaml` that this is a clone of.
    pub clone_of: Option<String>,
    /// The address inside the snapshot, if each run has a network of its own.
    pub guest: Option<Ipv4Addr>,
    /// True if another machine has one of the same files.
    pub is_shared: bool,
    /// The name of the template.
    pub template: String,
    /// True for the first machine of its template.
    pub is_first: bool,
}

impl Wanted {
    /// Returns the name in `qemu.yaml`, which is also that of the options.
    pub fn entry(&self) -> &str {
        self.clone_of.as_deref().unwrap_or(&self.machine.name)
    }

    /// Returns the error about a value that another machine has.
    pub fn taken(&self, files: &Files<'_>, key: &str, value: &str, other: &Wanted) -> Error {
        let other = match &other.clone_of {
            Some(base) => format!("'{}', a clone of '{base}'", other.machine.name),
            None => format!("'{}'", other.machine.name),
        };
        let (reason, advice) = (
            format!("'{value}' is already the {key} of machine {other}"),
            format!("Give each machine its own {key}"),
        );
        self.error(files, key, reason).advice(advice)
    }

    /// Returns an error about a value, at the place that the machine has it from.
    pub fn error(&self, files: &Files<'_>, key: &str, reason: String) -> Error {
        match &self.clone_of {
            Some(base) => {
                let has_range = files.section.machines.get(base).is_some_and(|own| own.clone_ips.is_some());
                files.host_error(base, if has_range && key == "ip" { "clone_ips" } else { "clones" }, reason)
            }
            None => files.own.error(&["machines", &self.machine.name, key], reason),
        }
    }
}

/// The two files.
pub struct Files<'a> {
    pub own: &'a ConfigFile,
    pub host: Option<&'a ConfigFile>,
    pub section: &'a Section,
}

impl Files<'_> {
    /// Returns an error about a machine's key in `machinery-host.yaml`.
    pub fn host_error(&self, machine: &str, key: &str, reason: String) -> Error {
        match self.host {
            Some(host) => host.error(&["machineries", "qemu", "machines", machine, key], reason),
            None => Error::configuration(reason),
        }
    }
}
