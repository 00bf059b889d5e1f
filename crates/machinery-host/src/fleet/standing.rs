//! Who has a machine.
//!
//! A machine is *available* to a task if it is not disabled, not locked by another task and not
//! reserved for another. These are the words and the order of Cuckoo3's `common/machines.py`, and
//! its reasons; beyond it, a task may lock what was reserved for it, and may ask again for a lock
//! it has, because an answer can be lost on the way.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A task's hold on a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// The task.
    pub task_id: String,
    /// Where the traffic of its runs is captured to; nowhere if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcap_path: Option<PathBuf>,
    /// Where a memory dump goes that names no other file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_dump_path: Option<PathBuf>,
}

/// Who has a machine, and whether it is in the pool at all. This is what outlives the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// The task that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<Hold>,
    /// The task it is kept for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserved_by: Option<String>,
    /// Why it was taken out of the pool, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disabled: Option<String>,
    /// The reason why the plugin cannot use the machine at present. A new host determines this anew.
    #[serde(skip)]
    pub unusable: Option<String>,
}

/// Why a machine cannot be had now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// It is out of the pool.
    Disabled(String),
    /// It is kept for that task.
    Reserved(String),
    /// That task has it.
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

/// A lock or a reservation that is not given.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("Machine {machine} is unavailable and cannot be {wanted}. {reason}")]
pub struct Unavailable {
    /// Which machine.
    pub machine: String,
    /// What was wanted: `locked` or `reserved`.
    pub wanted: &'static str,
    /// Why not.
    pub reason: Reason,
}

/// A lock or a reservation that cannot be given back, because it is not there.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NotHeld {
    /// Nobody has the machine.
    #[error("Cannot unlock machine {0}. Machine is not locked.")]
    NotLocked(String),
    /// Another task has it.
    #[error("Cannot unlock machine {machine}. Machine is locked by: {holder}")]
    OfAnother {
        /// Which machine.
        machine: String,
        /// Who has it.
        holder: String,
    },
    /// It is kept for nobody.
    #[error("Cannot unreserve machine {0}. Machine is not reserved.")]
    NotReserved(String),
}

impl Standing {
    /// Whether there is nothing to remember.
    pub fn is_plain(&self) -> bool {
        self.lock.is_none() && self.reserved_by.is_none() && self.disabled.is_none()
    }

    /// Returns the reason why the machine is out of the pool, if it is.
    pub fn disabled_reason(&self) -> Option<&str> {
        self.disabled.as_deref().or(self.unusable.as_deref())
    }

    /// How near the machine is to that task: it has it already, it is kept for it, or neither.
    pub fn distance_to(&self, hold: &Hold) -> u8 {
        match self {
            Standing { lock: Some(own), .. } if own == hold => 0,
            Standing { reserved_by: Some(task), .. } if *task == hold.task_id => 1,
            _ => 2,
        }
    }

    /// Why that task cannot have the machine, if it cannot.
    pub fn hindrance(&self, task_id: &str) -> Option<Reason> {
        if let Some(reason) = self.disabled_reason() {
            return Some(Reason::Disabled(reason.to_owned()));
        }
        if let Some(task) = self.reserved_by.as_ref().filter(|task| *task != task_id) {
            return Some(Reason::Reserved(task.clone()));
        }
        self.lock.as_ref().map(|hold| Reason::Locked(hold.task_id.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hold(task_id: &str) -> Hold {
        Hold { task_id: task_id.into(), pcap_path: None, memory_dump_path: None }
    }

    #[test]
    fn disabled_comes_before_reserved_before_locked() {
        let mut standing = Standing {
            lock: Some(hold("a")),
            reserved_by: Some("b".into()),
            disabled: Some("broken".into()),
            unusable: Some("no snapshot".into()),
        };
        let why = |standing: &Standing| standing.hindrance("c").map(|reason| reason.to_string());
        assert_eq!(why(&standing).unwrap(), "Machine is disabled. Reason: broken");
        standing.disabled = None;
        assert_eq!(why(&standing).unwrap(), "Machine is disabled. Reason: no snapshot");
        standing.unusable = None;
        assert_eq!(why(&standing).unwrap(), "Machine is reserved by b");
        standing.reserved_by = None;
        assert_eq!(why(&standing).unwrap(), "Machine is locked by: a");
        standing.lock = None;
        assert_eq!(why(&standing), None);
    }

    #[test]
    fn a_reservation_is_for_its_task() {
        let standing = Standing { reserved_by: Some("a".into()), ..Standing::default() };
        assert_eq!(standing.hindrance("a"), None);
        assert_eq!(standing.hindrance("b"), Some(Reason::Reserved("a".into())));
    }
}
