//! Giving machines to tasks, one task at a time, and which one to a task that names none.
//!
//! The rules of choice are those of Cuckoo3's machine list (`MachinesList.find_available` in
//! `common/machines.py`): a name counts alone; else the first available machine, in the order of
//! the configuration, with the platform, the version and all the tags that are asked for. A version
//! counts only together with a platform. `architecture` is ours, and so is that a task gets what it
//! has already, or what is reserved for it, before anything else.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use machinery::MachineInfo;
use thiserror::Error;

use super::standing::{Hold, Unavailable};
use super::{Fleet, Machine, Roll};

/// What a task asks for; what is empty may be anything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// A machine's name; then nothing else counts.
    pub name: String,
    /// Its operating system's family.
    pub platform: String,
    /// That system's version.
    pub os_version: String,
    /// Its processor's architecture.
    pub architecture: String,
    /// What must be installed in it.
    pub tags: Vec<String>,
}

impl Wanted {
    fn fits(&self, info: &MachineInfo) -> bool {
        let any = |wanted: &str, has: &str| wanted.is_empty() || wanted == has;
        any(&self.platform, &info.platform)
            && (self.platform.is_empty() || any(&self.os_version, &info.os_version))
            && any(&self.architecture, &info.architecture)
            && self.tags.iter().all(|tag| info.tags.contains(tag))
    }
}

/// A task that gets no machine.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NotGiven {
    /// There is no machine of that name.
    #[error("Machine with name {0} does not exist")]
    NoSuchMachine(String),
    /// No machine is as wanted.
    #[error("No machine is as wanted: see the list for those there are")]
    NoneFits,
    /// All that are as wanted are another's.
    #[error("No machine is available: all that are as wanted are locked, reserved or disabled")]
    NoneAvailable,
    /// The one that was named is.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// Two captures would write over each other.
    #[error("Machine {other} is locked with the same pcap_path {path}: give each its own", path = .path.display())]
    PcapTaken {
        /// Whose capture it is.
        other: String,
        /// Where to.
        path: PathBuf,
    },
}

impl Fleet {
    /// Gives the machine to a task; tells whether that is new.
    ///
    /// # Errors
    /// It is not available to that task, or its capture would go where another's goes.
    pub fn lock(&self, machine: &Arc<Machine>, hold: &Hold) -> Result<bool, NotGiven> {
        let _giving = self.giving.lock().unwrap_or_else(PoisonError::into_inner);
        self.roll().give(machine, hold)
    }

    /// Keeps the machine for a task; tells whether that is new.
    ///
    /// # Errors
    /// It is not available to that task.
    pub fn reserve(&self, machine: &Arc<Machine>, task_id: &str) -> Result<bool, NotGiven> {
        self.roll().expect_member(machine)?;
        Ok(machine.reserve(task_id)?)
    }

    /// Gives the task the first machine that will do; tells whether that is new.
    ///
    /// # Errors
    /// None will.
    pub fn acquire(&self, wanted: &Wanted, hold: &Hold) -> Result<(Arc<Machine>, bool), NotGiven> {
        let _giving = self.giving.lock().unwrap_or_else(PoisonError::into_inner);
        let roll = self.roll();
        let mut fitting: Vec<_> = roll.fitting(wanted).collect();
        // Stable: among equals, the order is that of the configuration.
        fitting.sort_by_key(|machine| machine.status().standing.distance_to(hold));
        let mut last = None;
        for machine in fitting {
            match roll.give(machine, hold) {
                Ok(new) => return Ok((Arc::clone(machine), new)),
                Err(error @ NotGiven::PcapTaken { .. }) => return Err(error),
                Err(error) => last = Some(error),
            }
        }
        Err(match (last, wanted.name.as_str()) {
            (None, "") => NotGiven::NoneFits,
            (None, name) => NotGiven::NoSuchMachine(name.to_owned()),
            (Some(_), "") => NotGiven::NoneAvailable,
            (Some(error), _) => error,
        })
    }
}

impl Roll {
    fn give(&self, machine: &Arc<Machine>, hold: &Hold) -> Result<bool, NotGiven> {
        self.expect_member(machine)?;
        let others = self.machines().iter().filter(|other| !Arc::ptr_eq(other, machine));
        if let Some(path) = &hold.pcap_path
            && let Some(other) = others
                .into_iter()
                .find(|other| other.hold().is_some_and(|of| of.pcap_path.as_ref() == Some(path)))
        {
            return Err(NotGiven::PcapTaken { other: other.name().to_owned(), path: path.clone() });
        }
        Ok(machine.lock(hold)?)
    }

    /// A machine that somebody still knows may have been removed from the configuration.
    fn expect_member(&self, machine: &Arc<Machine>) -> Result<(), NotGiven> {
        if self.is_member(machine) { Ok(()) } else { Err(NotGiven::NoSuchMachine(machine.name().to_owned())) }
    }

    /// The machines that would do, in the order of the configuration.
    fn fitting<'a>(&'a self, wanted: &'a Wanted) -> impl Iterator<Item = &'a Arc<Machine>> {
        self.machines().iter().filter(|machine| match wanted.name.as_str() {
            "" => wanted.fits(&machine.info()),
            name => machine.name() == name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows() -> MachineInfo {
        MachineInfo {
            name: "win10_1".into(),
            label: "win10_1".into(),
            ip: "10.0.0.1".into(),
            platform: "windows".into(),
            os_version: "10".into(),
            tags: vec!["office".into(), "dotnet".into()],
            snapshot: None,
            architecture: "amd64".into(),
            interface: None,
            agent_port: 8000,
            mac_address: None,
        }
    }

    fn wanted(platform: &str, os_version: &str, architecture: &str, tags: &[&str]) -> Wanted {
        Wanted {
            name: String::new(),
            platform: platform.into(),
            os_version: os_version.into(),
            architecture: architecture.into(),
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        }
    }

    #[test]
    fn all_that_is_asked_for_must_be_there() {
        for wanted in [
            wanted("", "", "", &[]),
            wanted("windows", "", "", &[]),
            wanted("windows", "10", "amd64", &["dotnet"]),
            wanted("", "", "", &["dotnet", "office"]),
        ] {
            assert!(wanted.fits(&windows()), "{wanted:?}");
        }
        for wanted in [
            wanted("linux", "", "", &[]),
            wanted("windows", "7", "", &[]),
            wanted("", "", "x86", &[]),
            wanted("", "", "", &["dotnet", "java"]),
        ] {
            assert!(!wanted.fits(&windows()), "{wanted:?}");
        }
    }

    #[test]
    fn a_version_without_a_platform_does_not_count() {
        assert!(wanted("", "7", "", &[]).fits(&windows()));
    }
}
