//! The resources of a process.

use std::fs;

use crate::Result;
use crate::error::Context;

/// The resources of a process.
#[derive(Debug, Clone)]
pub struct ProcessResources {
    /// Open descriptors.
    pub files: usize,
    /// Threads.
    pub threads: usize,
    /// Resident memory, own and shared, in KiB.
    pub resident_kib: usize,
    /// The process ids of its children, separated by spaces.
    pub children: String,
}

impl ProcessResources {
    /// Asserts that there are no children, and hardly more resources than `before`.
    ///
    /// # Panics
    /// There are.
    #[track_caller]
    pub fn assert_no_growth_since(&self, before: &ProcessResources) {
        assert_eq!(self.growth_since(before), None);
    }

    /// Describes children, and resources that have grown since `before`. A leak in each of many rounds exceeds the
    /// tolerance.
    pub fn growth_since(&self, before: &ProcessResources) -> Option<String> {
        let has_grown = !self.children.is_empty()
            || self.files > before.files + 8
            || self.threads > before.threads + 8
            || self.resident_kib > before.resident_kib * 3 / 2 + 32 * 1024;
        has_grown.then(|| format!("before: {before:?}, now: {self:?}"))
    }

    /// Returns the larger one of each resource.
    #[must_use]
    pub fn larger(&self, other: &ProcessResources) -> ProcessResources {
        ProcessResources {
            files: self.files.max(other.files),
            threads: self.threads.max(other.threads),
            resident_kib: self.resident_kib.max(other.resident_kib),
            children: String::new(),
        }
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
            // The children of a thread that ends meanwhile belong to another one.
            children: tasks
                .iter()
                .map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default())
                .collect(),
        })
    }
}
