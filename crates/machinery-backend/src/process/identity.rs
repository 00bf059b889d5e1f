//! The identity of a process, which a later host recognizes it by.

use std::fs;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};
use serde::{Deserialize, Serialize};

use super::group;

/// The identity of a process: no other process of this computer has it, earlier or later. The kernel sets all parts of it,
/// and no program can change those of itself. Source: proc_pid_stat(5), proc(5).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    pid: i32,
    /// The time of the start, in clock ticks since the boot.
    started: u64,
    /// The boot of this computer.
    boot: String,
}

impl ProcessIdentity {
    /// Returns the identity of a process that has not been reaped; none of one that has.
    pub fn of(pid: Pid) -> Option<ProcessIdentity> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let (pid, started) = (pid.as_raw_nonzero().get(), group::started(pid)?);
        Some(ProcessIdentity { pid, started, boot: boot.trim().to_owned() })
    }

    /// Returns the number of the process.
    pub fn number(&self) -> i32 {
        self.pid
    }

    /// Reaps the process if it has ended and is a child from before this process executed a newer host. Nobody else
    /// does.
    pub(super) fn reap(&self) {
        let pid = Pid::from_raw(self.pid).filter(|pid| ProcessIdentity::of(*pid).as_ref() == Some(self));
        if let Some(pid) = pid {
            // Not a child: whoever is its parent reaps it.
            let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        }
    }

    /// Opens the process; none if it has ended.
    pub fn open(&self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(self.pid)?;
        // Opened first, so that the check is about this process and no later one of its number.
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        (ProcessIdentity::of(pid).as_ref() == Some(self) && group::is_living(pid)).then_some(pidfd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // `reap` is under test, in place of the child's `wait`.
    #[allow(clippy::zombie_processes)]
    #[test]
    fn process_is_opened_until_it_has_ended_and_no_other_is() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let identity = ProcessIdentity::of(Pid::from_child(&child)).unwrap();
        assert!(identity.open().is_some());
        for other in [
            ProcessIdentity { pid: 1, ..identity.clone() },
            ProcessIdentity { started: identity.started + 1, ..identity.clone() },
            ProcessIdentity { boot: "another".into(), ..identity.clone() },
        ] {
            assert!(other.open().is_none(), "{other:?}");
        }
        child.kill().unwrap();
        // Not reaped yet, and no process to adopt any more.
        rustix::process::waitid(
            rustix::process::WaitId::Pid(Pid::from_child(&child)),
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT,
        )
        .unwrap();
        assert!(identity.open().is_none());
        identity.reap();
        assert_eq!(ProcessIdentity::of(Pid::from_child(&child)), None);
    }
}
