//! The resources that a process holds.

use std::fs;

use crate::Result;
use crate::error::Context;

/// What a process holds.
#[derive(Debug, Clone)]
pub struct ProcessResources {
    /// Open descriptors.
    pub files: usize,
    /// Threads.
    pub threads: usize,
    /// Memory that is its own or shared, in KiB.
    pub resident_kib: usize,
    /// The numbers of its children, with spaces between.
    pub children: String,
}

impl ProcessResources {
    /// It has no children, and otherwise hardly more than it held `before`: what grows with every round
    /// of many is much more.
    ///
    /// # Panics
    /// It has.
    #[track_caller]
    pub fn assert_no_growth_since(&self, before: &ProcessResources) {
        assert_eq!(self.children, "", "the host has children left");
        assert!(self.files <= before.files + 8, "{before:?}, {self:?}");
        assert!(self.threads <= before.threads + 8, "{before:?}, {self:?}");
        assert!(self.resident_kib <= before.resident_kib * 3 / 2 + 32 * 1024, "{before:?}, {self:?}");
    }

    /// Reads the resources of a process.
    ///
    /// # Errors
    /// The process has ended.
    pub(crate) fn of(pid: u32) -> Result<ProcessResources> {
        let proc = format!("/proc/{pid}");
        let what = || format!("reading {proc}");
        let list = |name: &str| fs::read_dir(format!("{proc}/{name}")).context(what);
        let tasks: Vec<_> = list("task")?.flatten().collect();
        let status = fs::read_to_string(format!("{proc}/status")).context(what)?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
        Ok(ProcessResources {
            files: list("fd")?.count(),
            threads: tasks.len(),
            resident_kib: resident.trim().trim_end_matches(" kB").parse().context(what)?,
            // A thread may end meanwhile; its children are another's then.
            children: tasks
                .iter()
                .map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default())
                .collect(),
        })
    }
}
