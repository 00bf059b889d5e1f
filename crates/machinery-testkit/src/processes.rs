//! The processes of this system.

use std::fs;

use rustix::process::Pid;

use crate::Result;
use crate::error::Context;

/// Returns the first child of that process's main thread, if it has one.
pub fn child(parent: Pid) -> Result<Option<Pid>> {
    let parent = parent.as_raw_nonzero();
    let path = format!("/proc/{parent}/task/{parent}/children");
    let children = fs::read_to_string(&path).context(|| format!("reading {path}"))?;
    Ok(children.split_whitespace().next().and_then(|child| Pid::from_raw(child.parse().ok()?)))
}

/// Returns all processes, with their command lines. A process that has ended has an empty one.
pub fn list() -> Result<Vec<(Pid, String)>> {
    let entries = fs::read_dir("/proc").context(|| "listing processes".to_owned())?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let with_command = |pid: Pid| {
        let command = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
        Some((pid, String::from_utf8_lossy(&command).trim_end_matches('\0').replace('\0', " ")))
    };
    Ok(pids.filter_map(Pid::from_raw).filter_map(with_command).collect())
}
