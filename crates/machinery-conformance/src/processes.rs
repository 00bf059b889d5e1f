//! The processes of this computer, as `/proc` shows them.

use std::collections::HashSet;
use std::fs;

/// A process. Its start time distinguishes it from a later one with the same id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub id: u32,
    pub name: String,
    parent: u32,
    is_zombie: bool,
    started: u64,
}

impl Process {
    /// Reports whether the process has ended, and waits for its parent.
    pub fn is_zombie(&self) -> bool {
        self.is_zombie
    }
}

/// Returns the children of the process.
pub fn children(parent: u32) -> Vec<Process> {
    let mut found = all();
    found.retain(|process| process.parent == parent);
    found
}

/// Returns the children of the process, their children, and so on.
pub fn descendants(of: u32) -> Vec<Process> {
    let all = all();
    let mut family = HashSet::from([of]);
    let mut found = Vec::new();
    loop {
        let is_new = |process: &&Process| family.contains(&process.parent) && !family.contains(&process.id);
        let next: Vec<Process> = all.iter().filter(is_new).cloned().collect();
        if next.is_empty() {
            return found;
        }
        family.extend(next.iter().map(|process| process.id));
        found.extend(next);
    }
}

/// Returns those of the processes that still run.
pub fn running(processes: &[Process]) -> Vec<Process> {
    let mut now = all();
    now.retain(|now| {
        let is_same = |then: &Process| then.id == now.id && then.started == now.started;
        !now.is_zombie && processes.iter().any(is_same)
    });
    now
}

fn all() -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // A process may end meanwhile.
    ids.filter_map(|id| parse(id, &fs::read_to_string(format!("/proc/{id}/stat")).ok()?)).collect()
}

/// Parses `/proc/<id>/stat`. The name is in parentheses, and may contain any character.
fn parse(id: u32, stat: &str) -> Option<Process> {
    let (start, rest) = stat.rsplit_once(')')?;
    let (_, name) = start.split_once('(')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse().ok();
    Some(Process {
        id,
        name: name.to_owned(),
        parent: fields.get(1)?.parse().ok()?,
        is_zombie: matches!(fields.first(), Some(&("Z" | "X"))),
        started: number(19)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{self, Command, Stdio};

    #[test]
    fn descendants_run_until_they_are_killed() {
        let mut shell = Command::new("sh");
        let mut shell = shell.args(["-c", "sleep 60; true"]).stdout(Stdio::null()).spawn().unwrap();
        let id = shell.id();
        let is_child = |children: Vec<Process>| children.iter().any(|child| child.id == id);
        assert!(is_child(children(process::id())) && is_child(descendants(process::id())));
        let child: Vec<Process> =
            children(process::id()).into_iter().filter(|child| child.id == id).collect();
        assert_eq!(running(&child).len(), 1);
        descendants(id).iter().for_each(|sleep| {
            let killed = Command::new("sh").args(["-c", &format!("kill {}", sleep.id)]).status().unwrap();
            assert!(killed.success());
        });
        shell.kill().unwrap();
        assert!(children(process::id()).iter().any(|child| child.id == id));
        shell.wait().unwrap();
        assert!(running(&child).is_empty() && !is_child(children(process::id())));
    }

    #[test]
    fn name_with_parentheses_is_parsed() {
        let process =
            parse(7, "7 (a) b) Z 5 7 7 0 -1 4 0 0 0 0 1 2 3 4 20 0 1 0 99 1000 200 more\n").unwrap();
        assert_eq!((process.name.as_str(), process.parent, process.started), ("a) b", 5, 99));
        assert!(process.is_zombie());
        assert_eq!(parse(7, "7 a"), None);
    }
}
