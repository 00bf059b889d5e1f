//! The program that has started this host, and the time: for an operator who finds the host, and for programs that start hosts.

use std::fs;
use std::os::unix::process::parent_id;
use std::process;
use std::time::UNIX_EPOCH;

/// The origin of this host.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The number of its process.
    pub pid: u32,
    /// The time of its start, in milliseconds since 1970. It distinguishes a host from the one that it has replaced.
    pub started: u64,
    /// The program that has started it.
    pub started_by: String,
}

impl Origin {
    /// Returns the origin of this process, which starts now.
    pub fn of_this_process() -> Self {
        let started = UNIX_EPOCH.elapsed().unwrap_or_default().as_millis();
        Origin {
            pid: process::id(),
            started: u64::try_from(started).unwrap_or(u64::MAX),
            started_by: program(parent_id()),
        }
    }
}

/// Returns the name and the number of a process.
fn program(pid: u32) -> String {
    // The parent of a process of another PID namespace is 0.
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("{} (process {pid})", name.trim_end()),
        Err(_) => "a process that is not known here".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origin_is_this_process_and_its_parent() {
        let origin = Origin::of_this_process();
        assert_eq!(origin.pid, process::id());
        assert!(origin.started_by.ends_with(&format!("(process {})", parent_id())), "{}", origin.started_by);
        assert_eq!(program(0), "a process that is not known here");
    }
}
