//! Allocates machines to tasks, one task at a time.
//!
//! The rules are those of Cuckoo3's machine list (`MachinesList.find_available` in `common/machines.py`). A
//! name excludes all other criteria. Otherwise the first available machine with the platform, the version
//! and all tags is chosen, in the order of the configuration. A version counts only together with a
//! platform. Three rules are ours:
//!
//! - `architecture` is a criterion.
//! - A task gets a machine that it has, or that is reserved for it, before any other.
//! - A machine that stands by comes before one with a template, and that before all others. Among equals, the
//!   order stays that of the configuration.

use std::cmp::Reverse;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use machinery::MachineInfo;
use thiserror::Error;

use super::availability::{TaskLock, Unavailable};
use super::{Fleet, Machine, Roster};

/// The criteria for a task's machine. An empty one matches every machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MachineQuery {
    /// The machine's name. It excludes the other criteria.
    pub name: String,
    /// The family of the operating system.
    pub platform: String,
    /// The version of the operating system.
    pub os_version: String,
    /// The architecture of the processor.
    pub architecture: String,
    /// The software that must be installed.
    pub tags: Vec<String>,
}

impl MachineQuery {
    fn matches(&self, info: &MachineInfo) -> bool {
        let any = |wanted: &str, value: &str| wanted.is_empty() || wanted == value;
        any(&self.platform, &info.platform)
            && (self.platform.is_empty() || any(&self.os_version, &info.os_version))
            && any(&self.architecture, &info.architecture)
            && self.tags.iter().all(|tag| info.tags.contains(tag))
    }
}

/// A task gets no machine.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AcquireError {
    /// No machine has that name.
    #[error("Machine with name {0} does not exist")]
    NoSuchMachine(String),
    /// No machine matches the query.
    #[error("No machine is as wanted: see the list for those there are")]
    NoMatch,
    /// All machines that match are unavailable.
    #[error("No machine is available: all that are as wanted are locked, reserved or disabled")]
    NoneAvailable,
    /// The named machine is unavailable.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// Two captures would overwrite each other.
    #[error("Machine {other} is locked with the same pcap_path {path}: give each its own", path = .path.display())]
    PcapTaken {
        /// The machine with the other capture.
        other: String,
        /// The file of both.
        path: PathBuf,
    },
    /// Two captures would overwrite each other.
    #[error("Machine {other} is locked with the same passed file for its capture: pass another one")]
    PcapPassed {
        /// The machine with the other capture.
        other: String,
    },
}

impl Fleet {
    /// Locks the machine for a task. Returns whether the lock is new.
    ///
    /// # Errors
    /// The machine is not available to that task, or another capture writes to the same file.
    pub fn lock(&self, machine: &Arc<Machine>, lock: &TaskLock) -> Result<bool, AcquireError> {
        let _one_at_a_time = self.allocation_lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.roster().allocate(machine, lock)
    }

    /// Reserves the machine for a task. Returns whether the reservation is new.
    ///
    /// # Errors
    /// The machine is not available to that task.
    pub fn reserve(&self, machine: &Arc<Machine>, task_id: &str) -> Result<bool, AcquireError> {
        self.roster().expect_member(machine)?;
        Ok(machine.reserve(task_id)?)
    }

    /// Locks the first machine that matches the query. Returns the machine and whether the lock is new.
    ///
    /// # Errors
    /// No machine matches and is available.
    pub fn acquire(
        &self,
        query: &MachineQuery,
        lock: &TaskLock,
    ) -> Result<(Arc<Machine>, bool), AcquireError> {
        let _one_at_a_time = self.allocation_lock.lock().unwrap_or_else(PoisonError::into_inner);
        let roster = self.roster();
        let mut matching: Vec<_> = roster.matching(query).collect();
        // Stable: among equals, the order is that of the configuration.
        matching.sort_by_cached_key(|machine| {
            let status = machine.status();
            let mode = status.ready.map(|ready| ready.mode).unwrap_or_default();
            (status.availability.affinity(lock), Reverse(mode))
        });
        let mut last = None;
        for machine in matching {
            match roster.allocate(machine, lock) {
                Ok(new) => return Ok((Arc::clone(machine), new)),
                Err(error @ (AcquireError::PcapTaken { .. } | AcquireError::PcapPassed { .. })) => {
                    return Err(error);
                }
                Err(error) => last = Some(error),
            }
        }
        Err(match (last, query.name.as_str()) {
            (None, "") => AcquireError::NoMatch,
            (None, name) => AcquireError::NoSuchMachine(name.to_owned()),
            (Some(_), "") => AcquireError::NoneAvailable,
            (Some(error), _) => error,
        })
    }
}

impl Roster {
    fn allocate(&self, machine: &Arc<Machine>, lock: &TaskLock) -> Result<bool, AcquireError> {
        self.expect_member(machine)?;
        let others = self.machines().iter().filter(|other| !Arc::ptr_eq(other, machine));
        for other in others {
            let Some(of_other) = other.task_lock() else { continue };
            let other = other.name().to_owned();
            if let Some(path) =
                lock.pcap_path.clone().filter(|path| of_other.pcap_path.as_ref() == Some(path))
            {
                return Err(AcquireError::PcapTaken { other, path });
            }
            if lock.pcap_file.is_some() && lock.pcap_file == of_other.pcap_file {
                return Err(AcquireError::PcapPassed { other });
            }
        }
        Ok(machine.lock(lock)?)
    }

    /// Expects that the machine has not been removed from the configuration meanwhile.
    fn expect_member(&self, machine: &Arc<Machine>) -> Result<(), AcquireError> {
        if self.has(machine) { Ok(()) } else { Err(AcquireError::NoSuchMachine(machine.name().to_owned())) }
    }

    /// Returns the machines that match the query, in the order of the configuration.
    fn matching<'a>(&'a self, query: &'a MachineQuery) -> impl Iterator<Item = &'a Arc<Machine>> {
        self.machines().iter().filter(|machine| match query.name.as_str() {
            "" => query.matches(&machine.info()),
            name => machine.name() == name,
        })
    }
}

#[cfg(test)]
mod tests {
    use machinery::{Readiness, RestoreReadiness};

    use super::*;
    use crate::client_file::PassedFile;
    use crate::client_file::passed_file;
    use crate::events::Events;
    use crate::fleet::fake_plugin::{FakePlugin, info};

    fn windows() -> MachineInfo {
        MachineInfo { tags: vec!["office".into(), "dotnet".into()], ..info("win10_1") }
    }

    fn query(platform: &str, os_version: &str, architecture: &str, tags: &[&str]) -> MachineQuery {
        MachineQuery {
            name: String::new(),
            platform: platform.into(),
            os_version: os_version.into(),
            architecture: architecture.into(),
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        }
    }

    #[test]
    fn query_matches_machine_with_all_that_it_names() {
        for query in [
            query("", "", "", &[]),
            query("windows", "", "", &[]),
            query("windows", "10", "amd64", &["dotnet"]),
            query("", "", "", &["dotnet", "office"]),
        ] {
            assert!(query.matches(&windows()), "{query:?}");
        }
        for query in [
            query("linux", "", "", &[]),
            query("windows", "7", "", &[]),
            query("", "", "x86", &[]),
            query("", "", "", &["dotnet", "java"]),
        ] {
            assert!(!query.matches(&windows()), "{query:?}");
        }
    }

    #[test]
    fn query_ignores_version_without_platform() {
        assert!(query("", "7", "", &[]).matches(&windows()));
    }

    fn fleet(names: &[&str]) -> (FakePlugin, Fleet) {
        let (plugin, fleet) = (FakePlugin::default(), Fleet::default());
        let machines = names.iter().map(|name| plugin.machine(name, &Events::default())).collect();
        fleet.set(Roster::new(Vec::new(), machines));
        (plugin, fleet)
    }

    fn lock(task_id: &str, pcap_path: Option<&str>, pcap_file: Option<&PassedFile>) -> TaskLock {
        TaskLock {
            task_id: task_id.into(),
            pcap_path: pcap_path.map(PathBuf::from),
            pcap_file: pcap_file.cloned(),
            ..TaskLock::default()
        }
    }

    #[test]
    fn machine_that_was_removed_is_not_given_to_a_task() {
        let (plugin, fleet) = fleet(&["m"]);
        let removed = plugin.machine("m", &Events::default());
        let expected = || AcquireError::NoSuchMachine("m".into());
        assert_eq!(fleet.lock(&removed, &lock("1", None, None)), Err(expected()));
        assert_eq!(fleet.reserve(&removed, "1"), Err(expected()));
        let machine = fleet.find("m").unwrap();
        assert_eq!((fleet.reserve(&machine, "1"), fleet.reserve(&machine, "1")), (Ok(true), Ok(false)));
        assert_eq!(fleet.lock(&machine, &lock("1", None, None)), Ok(true));
        assert_eq!(fleet.lock(&machine, &lock("1", None, None)), Ok(false));
    }

    #[test]
    fn two_machines_cannot_capture_into_one_file() {
        let (_plugin, fleet) = fleet(&["a", "b"]);
        let [a, b] = ["a", "b"].map(|name| fleet.find(name).unwrap());
        fleet.lock(&a, &lock("1", Some("/p"), None)).unwrap();
        let taken = AcquireError::PcapTaken { other: "a".into(), path: "/p".into() };
        assert_eq!(fleet.lock(&b, &lock("2", Some("/p"), None)), Err(taken));
        assert_eq!(fleet.lock(&a, &lock("1", Some("/p"), None)), Ok(false), "the same machine");
        assert_eq!(fleet.lock(&b, &lock("2", Some("/q"), None)), Ok(true), "another file");
    }

    #[tokio::test]
    async fn two_machines_cannot_capture_into_one_passed_file() {
        let (_plugin, fleet) = fleet(&["a", "b"]);
        let [a, b] = ["a", "b"].map(|name| fleet.find(name).unwrap());
        let one = passed_file(tempfile::tempfile().unwrap()).await.unwrap();
        let other = passed_file(tempfile::tempfile().unwrap()).await.unwrap();
        fleet.lock(&a, &lock("1", None, Some(&one))).unwrap();
        let taken = AcquireError::PcapPassed { other: "a".into() };
        assert_eq!(fleet.lock(&b, &lock("2", None, Some(&one))), Err(taken));
        assert_eq!(fleet.lock(&b, &lock("2", None, Some(&other))), Ok(true), "another file");
        b.unlock(None).unwrap();
        a.unlock(None).unwrap();
        fleet.lock(&a, &lock("1", None, None)).unwrap();
        assert_eq!(fleet.lock(&b, &lock("2", None, None)), Ok(true), "no file at all");
    }

    #[test]
    fn task_gets_its_own_machine_before_a_reserved_one_and_that_before_any_other() {
        let (_plugin, fleet) = fleet(&["a", "b", "c"]);
        let any = MachineQuery::default();
        let acquire = |task: &str| {
            let acquired = fleet.acquire(&any, &lock(task, None, None));
            acquired.map(|(machine, new)| (machine.name().to_owned(), new))
        };
        fleet.reserve(&fleet.find("b").unwrap(), "1").unwrap();
        assert_eq!(acquire("1"), Ok(("b".into(), true)));
        assert_eq!(acquire("1"), Ok(("b".into(), false)));
        assert_eq!(acquire("2"), Ok(("a".into(), true)));
        assert_eq!(acquire("3"), Ok(("c".into(), true)));
        assert_eq!(acquire("4"), Err(AcquireError::NoneAvailable));
        let named = |name: &str| MachineQuery { name: name.into(), ..MachineQuery::default() };
        let no_such = AcquireError::NoSuchMachine("x".into());
        assert_eq!(fleet.acquire(&named("x"), &lock("4", None, None)).err(), Some(no_such));
        let unavailable = fleet.acquire(&named("a"), &lock("4", None, None)).err();
        assert!(matches!(unavailable, Some(AcquireError::Unavailable(_))), "{unavailable:?}");
        let linux = MachineQuery { platform: "linux".into(), ..MachineQuery::default() };
        assert_eq!(fleet.acquire(&linux, &lock("4", None, None)).err(), Some(AcquireError::NoMatch));
    }

    #[test]
    fn machine_that_stands_by_is_acquired_before_one_with_a_template_and_that_before_others() {
        let (_plugin, fleet) = fleet(&["a", "b", "c", "d", "e"]);
        for (name, mode) in [
            ("b", Readiness::Instant),
            ("c", Readiness::Standby),
            ("d", Readiness::Plain),
            ("e", Readiness::Standby),
        ] {
            let ready = RestoreReadiness { mode, ..RestoreReadiness::default() };
            fleet.find(name).unwrap().set_ready(&ready);
        }
        fleet.reserve(&fleet.find("d").unwrap(), "1").unwrap();
        let acquired: Vec<String> = ["1", "2", "3", "4", "5"]
            .map(|task| {
                fleet.acquire(&MachineQuery::default(), &lock(task, None, None)).unwrap().0.name().to_owned()
            })
            .into();
        assert_eq!(acquired, ["d", "c", "e", "b", "a"]);
    }
}
