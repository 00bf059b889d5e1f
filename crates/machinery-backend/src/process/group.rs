//! The process group of a run: the hypervisor, and the processes that its arguments or a wrapper have started.
//!
//! A helper such as `swtpm` ends by itself after its hypervisor, and cleans up then. A helper that is killed at once
//! may leave a lock or a socket behind that makes the next run fail.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, test_kill_process_group, waitpid,
};

/// The time that helpers have to end by themselves after their hypervisor.
const HELPER_GRACE: Duration = Duration::from_secs(1);
/// The time that a process has to end after SIGKILL.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);

/// Waits for the remaining processes in the group of a leader that has ended, kills them after a timeout, and reaps
/// those that are children of this process.
pub fn end_rest(leader: Pid) {
    end_members(leader);
    if test_kill_process_group(leader).is_ok() {
        reap_members(leader);
    }
}

fn end_members(leader: Pid) {
    if wait_for_end(leader, HELPER_GRACE) {
        return;
    }
    let remaining = members(leader);
    tracing::warn!(
        group = number(leader),
        processes = remaining.len(),
        "helpers of the process do not end: killing them"
    );
    for helper in &remaining {
        // The helper may have ended by itself.
        let _ = pidfd_send_signal(helper, Signal::KILL);
    }
    wait_for_end(leader, KILL_TIMEOUT);
}

/// Reaps the children of this process that have ended in the group. The leader is reaped by its owner: another process may
/// have its number by now.
fn reap_members(leader: Pid) {
    let is_ended = |pid: &Pid| {
        let stat = stat(*pid).unwrap_or_default();
        let mut fields = fields(&stat);
        fields.next() == Some("Z") && fields.nth(1) == Some(number(leader).to_string().as_str())
    };
    for ended in pids().filter(|pid| *pid != leader).filter(is_ended) {
        // It may be the child of another process.
        let _ = waitpid(Some(ended), WaitOptions::NOHANG);
    }
}

/// Waits until the group is empty; returns `false` if it is not within that time.
fn wait_for_end(leader: Pid, timeout: Duration) -> bool {
    let until = Instant::now() + timeout;
    while is_left(leader) {
        let members = members(leader);
        let Some(one) = members.first() else { return true };
        let rest = until.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return false;
        }
        let limit = Timespec::try_from(rest).ok();
        // The loop checks the group again, whatever poll returns.
        let _ = retry_on_intr(|| poll(&mut [PollFd::new(one, PollFlags::IN)], limit.as_ref()));
    }
    true
}

/// Reports whether the group still exists. While it exists, no new process can get the leader's number. A living
/// process with that number therefore belongs to another group.
fn is_left(leader: Pid) -> bool {
    test_kill_process_group(leader).is_ok() && !is_living(leader)
}

/// Reports whether the process has not ended. One that has may not have been reaped yet.
pub fn is_living(process: Pid) -> bool {
    stat(process).is_some_and(|stat| !matches!(fields(&stat).next(), None | Some("Z" | "X")))
}

/// Returns the time of the process's start, in clock ticks since the boot.
pub fn started(process: Pid) -> Option<u64> {
    // The field 22; the first of `fields` is the field 3.
    fields(&stat(process)?).nth(19)?.parse().ok()
}

/// Reports whether the process is stopped by a signal or a debugger.
pub fn is_stopped(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    matches!(fields(&stat).next(), Some("T" | "t"))
}

/// Returns the numbers of all processes of this computer.
pub fn pids() -> impl Iterator<Item = Pid> {
    let entries = Path::new("/proc").read_dir().into_iter().flatten().flatten();
    entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
}

/// Returns the living processes of the group.
fn members(leader: Pid) -> Vec<OwnedFd> {
    pids().filter_map(|pid| member(pid, leader)).collect()
}

fn member(pid: Pid, leader: Pid) -> Option<OwnedFd> {
    // The handle is opened before the check, so that the check is about this process and no later one.
    let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    is_living_member(&stat(pid)?, number(leader)).then_some(handle)
}

fn stat(pid: Pid) -> Option<String> {
    fs::read_to_string(format!("/proc/{}/stat", number(pid))).ok()
}

/// Returns the fields state, parent, group and later ones. Source: proc_pid_stat(5); the name, in brackets,
/// precedes them.
fn fields(stat: &str) -> impl Iterator<Item = &str> {
    stat.rsplit(')').next().unwrap_or("").split_whitespace()
}

fn is_living_member(stat: &str, group: i32) -> bool {
    let mut fields = fields(stat);
    let state = fields.next();
    !matches!(state, None | Some("Z" | "X")) && fields.nth(1) == Some(group.to_string().as_str())
}

fn number(pid: Pid) -> i32 {
    pid.as_raw_nonzero().get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn member_is_recognized_by_its_group_when_its_name_has_brackets() {
        assert!(is_living_member("12 (a) b) S 1 7 7 0", 7));
        assert!(!is_living_member("12 (a) b) S 7 1 7 0", 7));
        assert!(!is_living_member("12 (sh) Z 1 7 7 0", 7));
        assert!(!is_living_member("", 7));
    }
}
