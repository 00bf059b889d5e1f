//! The rules by which a task can have a machine.
//!
//! A machine is *available* to a task if it is not disabled, not reserved for another task and not locked.
//! The words, their order and the reasons are those of Cuckoo3's `common/machines.py`. Beyond that, a task
//! may lock a machine that is reserved for it. It may also repeat its lock, because a reply can be lost.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::quarantine::Quarantine;
use crate::client_file::{ClientFile, NamedFile, Owner, PassedFile};

/// A task's lock on a machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskLock {
    /// The task that has the machine.
    pub task_id: String,
    /// The user of the client that has locked the machine, if the host has recorded it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// The file for the captured traffic. Without it, no traffic is captured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcap_path: Option<PathBuf>,
    /// The file for a memory dump whose request names no file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_dump_path: Option<PathBuf>,
    /// The user who has named the paths, unless that is root or the host's user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
    /// True if the task has passed a descriptor for the captured traffic.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pcap_passed: bool,
    /// That descriptor. It is lost when the host ends.
    #[serde(skip)]
    pub pcap_file: Option<PassedFile>,
}

impl TaskLock {
    /// Returns the file for a memory dump whose request names no file.
    pub fn memory_dump(&self) -> Option<ClientFile> {
        let named = |path| ClientFile::Named(NamedFile { path, owner: self.owner });
        self.memory_dump_path.clone().map(named)
    }

    /// Returns the file for the captured traffic: the passed one, or else the named one.
    pub fn pcap(&self) -> Option<ClientFile> {
        let named = |path| ClientFile::Named(NamedFile { path, owner: self.owner });
        let passed = self.pcap_file.clone().map(ClientFile::Passed);
        passed.or_else(|| self.pcap_path.clone().map(named))
    }

    /// Reports whether this lock is `other` again. A lock whose descriptor was lost with an earlier host may get
    /// another one. The users may differ: root may repeat a lock of the host's user.
    pub fn is_repeated_by(&self, other: &TaskLock) -> bool {
        let is_lost = self.pcap_passed && self.pcap_file.is_none();
        let pcap_file = other.pcap_file.clone().filter(|_| !is_lost);
        *self == TaskLock { uid: self.uid, pcap_file, ..other.clone() }
    }
}

/// The lock and the reservation of a machine, and its place in the pool. They outlive the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Availability {
    /// The lock of the task that has the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<TaskLock>,
    /// The time of the lock, in seconds since 1970, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub locked_since: Option<u64>,
    /// The task that the machine is reserved for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserved_by: Option<String>,
    /// The reason why an operator or the host has disabled the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disabled: Option<String>,
    /// The quarantine of a machine that a failure has taken out of the pool, and that the host tries again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quarantine: Option<Quarantine>,
    /// The errors of the run of the task that holds the machine, or held it last: see [`run_errors`](super::run_errors).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub run_errors: Vec<String>,
    /// True if that run is lost. Otherwise its errors make it incomplete.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub run_lost: bool,
    /// The reason why a command holds the machine. It is out of the pool until the command releases it, and then as it was
    /// before. A new host determines this anew.
    #[serde(skip)]
    pub held: Option<String>,
    /// The reason why the plugin cannot use the machine at present. A new host determines this anew.
    #[serde(skip)]
    pub unusable: Option<String>,
}

/// The reason why a machine is not available.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The machine is disabled, for this reason.
    Disabled(String),
    /// The machine is reserved for this task.
    Reserved(String),
    /// This task has locked the machine.
    Locked(String),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Disabled(reason) => write!(f, "Machine is disabled. Reason: {reason}"),
            Reason::Reserved(task) => write!(f, "Machine is reserved by {task}"),
            Reason::Locked(task) => write!(f, "Machine is locked by: {task}"),
        }
    }
}

/// A lock or a reservation is refused.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("Machine {machine} is unavailable and cannot be {wanted}. {reason}")]
pub struct Unavailable {
    /// The machine.
    pub machine: String,
    /// The request: `locked` or `reserved`.
    pub wanted: &'static str,
    /// The reason.
    pub reason: Reason,
}

/// A lock or a reservation cannot be released, because it does not exist.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NotHeld {
    /// The machine is not locked.
    #[error("Cannot unlock machine {0}. Machine is not locked.")]
    NotLocked(String),
    /// Another task has locked the machine.
    #[error("Cannot unlock machine {machine}. Machine is locked by: {holder}")]
    OfAnother {
        /// The machine.
        machine: String,
        /// That task.
        holder: String,
    },
    /// The machine is not reserved.
    #[error("Cannot unreserve machine {0}. Machine is not reserved.")]
    NotReserved(String),
}

impl Availability {
    /// Reports whether there is nothing to save.
    pub fn is_plain(&self) -> bool {
        self.lock.is_none()
            && self.reserved_by.is_none()
            && self.disabled.is_none()
            && self.quarantine.is_none()
            && self.run_errors.is_empty()
    }

    /// Returns the reason why the machine is out of the pool, if it is.
    pub fn disabled_reason(&self) -> Option<&str> {
        let failed = self.quarantine.as_ref().map(|quarantine| quarantine.reason.as_str());
        self.held.as_deref().or(self.disabled.as_deref()).or(failed).or(self.unusable.as_deref())
    }

    /// Returns the rank of the machine for this lock: 0 if the task has it, 1 if it is reserved, 2 otherwise.
    pub fn affinity(&self, lock: &TaskLock) -> u8 {
        match self {
            Availability { lock: Some(own), .. } if own.is_repeated_by(lock) => 0,
            Availability { reserved_by: Some(task), .. } if *task == lock.task_id => 1,
            _ => 2,
        }
    }

    /// Returns the reason why the machine is not available to that task.
    pub fn unavailable_reason(&self, task_id: &str) -> Option<Reason> {
        if let Some(reason) = self.disabled_reason() {
            return Some(Reason::Disabled(reason.to_owned()));
        }
        if let Some(task) = self.reserved_by.as_ref().filter(|task| *task != task_id) {
            return Some(Reason::Reserved(task.clone()));
        }
        self.lock.as_ref().map(|lock| Reason::Locked(lock.task_id.clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::client_file::{Descriptor, DescriptorBudget};

    fn task_lock(task_id: &str) -> TaskLock {
        TaskLock { task_id: task_id.into(), ..TaskLock::default() }
    }

    /// Returns a temporary file that a client has passed.
    async fn passed_file() -> PassedFile {
        let permit = Arc::new(DescriptorBudget::default()).permits(7, 1).unwrap().remove(0);
        Descriptor::new(tempfile::tempfile().unwrap().into(), permit).checked().await.unwrap()
    }

    #[test]
    fn unavailable_reason_is_disabled_before_reserved_before_locked() {
        let mut availability = Availability {
            lock: Some(task_lock("a")),
            reserved_by: Some("b".into()),
            disabled: Some("broken".into()),
            quarantine: Some(Quarantine::new("QEMU was killed")),
            unusable: Some("no snapshot".into()),
            ..Availability::default()
        };
        let why = |availability: &Availability| {
            availability.unavailable_reason("c").map(|reason| reason.to_string())
        };
        assert_eq!(why(&availability).unwrap(), "Machine is disabled. Reason: broken");
        availability.disabled = None;
        assert_eq!(why(&availability).unwrap(), "Machine is disabled. Reason: QEMU was killed");
        availability.quarantine = None;
        assert_eq!(why(&availability).unwrap(), "Machine is disabled. Reason: no snapshot");
        availability.unusable = None;
        assert_eq!(why(&availability).unwrap(), "Machine is reserved by b");
        availability.reserved_by = None;
        assert_eq!(why(&availability).unwrap(), "Machine is locked by: a");
        availability.lock = None;
        assert_eq!(why(&availability), None);
    }

    #[test]
    fn reservation_makes_machine_unavailable_to_other_tasks_only() {
        let availability = Availability { reserved_by: Some("a".into()), ..Availability::default() };
        assert_eq!(availability.unavailable_reason("a"), None);
        assert_eq!(availability.unavailable_reason("b"), Some(Reason::Reserved("a".into())));
    }

    #[test]
    fn availability_is_read_when_an_older_host_has_written_it() {
        let old = r#"{"lock": {"task_id": "t"}, "disabled": "smells", "from the future": 1}"#;
        let read: Availability = serde_json::from_str(old).unwrap();
        assert_eq!((read.locked_since, &read.quarantine), (None, &None));
        assert_eq!((read.lock.unwrap().task_id.as_str(), read.disabled.as_deref()), ("t", Some("smells")));
    }

    #[test]
    fn availability_is_plain_only_when_there_is_nothing_to_save() {
        let plain = Availability::default();
        assert!(plain.is_plain());
        assert!(Availability { unusable: Some("no snapshot".into()), ..plain.clone() }.is_plain());
        for saved in [
            Availability { lock: Some(task_lock("a")), ..plain.clone() },
            Availability { reserved_by: Some("a".into()), ..plain.clone() },
            Availability { disabled: Some("broken".into()), ..plain.clone() },
            Availability { quarantine: Some(Quarantine::new("QEMU was killed")), ..plain.clone() },
            Availability { run_errors: vec!["QEMU was killed".into()], ..plain.clone() },
        ] {
            assert!(!saved.is_plain(), "{saved:?}");
        }
    }

    #[test]
    fn affinity_ranks_own_lock_before_own_reservation_before_anything_else() {
        let locked = Availability { lock: Some(task_lock("a")), ..Availability::default() };
        assert_eq!(locked.affinity(&task_lock("a")), 0);
        assert_eq!(locked.affinity(&task_lock("b")), 2);
        let other_file = TaskLock { pcap_path: Some("/p".into()), ..task_lock("a") };
        assert_eq!(locked.affinity(&other_file), 2);
        let reserved = Availability { reserved_by: Some("a".into()), ..Availability::default() };
        assert_eq!((reserved.affinity(&task_lock("a")), reserved.affinity(&task_lock("b"))), (1, 2));
    }

    #[tokio::test]
    async fn lock_is_repeated_with_another_descriptor_only_when_its_own_was_lost() {
        let passed = passed_file().await;
        let other = passed_file().await;
        let lock = TaskLock { pcap_passed: true, pcap_file: Some(passed), ..task_lock("a") };
        let repeated = TaskLock { pcap_file: Some(other), ..lock.clone() };
        assert!(lock.is_repeated_by(&lock) && !lock.is_repeated_by(&repeated));
        let lost = TaskLock { pcap_file: None, ..lock.clone() };
        assert!(lost.is_repeated_by(&repeated));
        assert!(!lost.is_repeated_by(&TaskLock { task_id: "b".into(), ..repeated.clone() }));
        assert!(!task_lock("a").is_repeated_by(&repeated), "a lock without a capture gets none");
    }

    #[tokio::test]
    async fn files_of_a_lock_are_the_passed_one_or_the_named_ones_with_their_owner() {
        let named = |path: &str| ClientFile::Named(NamedFile { path: path.into(), owner: None });
        let lock =
            TaskLock { pcap_path: Some("/p".into()), memory_dump_path: Some("/d".into()), ..task_lock("a") };
        assert_eq!(format!("{:?}", lock.pcap()), format!("{:?}", Some(named("/p"))));
        assert_eq!(format!("{:?}", lock.memory_dump()), format!("{:?}", Some(named("/d"))));
        assert!(task_lock("a").pcap().is_none() && task_lock("a").memory_dump().is_none());
        let passed = passed_file().await;
        let lock = TaskLock { pcap_file: Some(passed), ..lock };
        assert!(matches!(lock.pcap(), Some(ClientFile::Passed(_))));
    }
}
