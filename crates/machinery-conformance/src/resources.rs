//! The resources of this process, to find those that each run leaks.

use std::fs;
use std::process;

use machinery::Setup;
use serde::{Deserialize, Serialize};

use crate::folders;
use crate::processes;

/// Numbers of resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    descriptors: usize,
    threads: usize,
    /// Children that run.
    children: usize,
    /// Children that have ended, and were not waited for.
    zombies: usize,
    /// Files, sockets and folders of the machinery.
    files: usize,
}

impl Resources {
    /// Counts the resources of this process, and the files of the machinery.
    pub fn count(setup: &Setup) -> Self {
        let entries = |folder: &str| fs::read_dir(folder).map_or(0, Iterator::count);
        let children = processes::children(process::id());
        let zombies = children.iter().filter(|child| child.is_zombie()).count();
        Resources {
            descriptors: entries("/proc/self/fd"),
            threads: entries("/proc/self/task"),
            children: children.len() - zombies,
            zombies,
            files: folders::list_all(setup).len(),
        }
    }

    /// Describes each number that has grown by at least `least`.
    pub fn growth(&self, before: &Self, least: usize) -> Vec<String> {
        let numbers = [
            ("open descriptors", self.descriptors, before.descriptors),
            ("threads", self.threads, before.threads),
            ("child processes", self.children, before.children),
            ("zombies: child processes that ended and were not waited for", self.zombies, before.zombies),
            ("files in its folders", self.files, before.files),
        ];
        let grown = numbers.into_iter().filter(|(_, now, before)| now.saturating_sub(*before) >= least);
        grown.map(|(name, now, before)| format!("{} more {name}", now - before)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_found_when_each_run_leaks() {
        let before = Resources { descriptors: 10, threads: 2, children: 0, zombies: 1, files: 3 };
        let after = Resources { descriptors: 110, threads: 6, children: 0, zombies: 6, files: 0 };
        assert_eq!(
            after.growth(&before, 5),
            [
                "100 more open descriptors",
                "5 more zombies: child processes that ended and were not waited for"
            ]
        );
    }
}
