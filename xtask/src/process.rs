//! Waits for processes without polling, and starts processes that end with this one.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, set_parent_process_death_signal};

use crate::run::{Context, Result};

/// Returns a descriptor that becomes readable when the process ends; `None` if it has ended.
pub fn handle(pid: Pid) -> Result<Option<OwnedFd>> {
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(handle) => Ok(Some(handle)),
        Err(Errno::SRCH) => Ok(None),
        Err(error) => Err(error).context(|| format!("cannot watch process {pid}")),
    }
}

/// Makes the kernel send `signal` to the process of `command` when this process ends, however it ends.
pub fn signal_at_our_end(command: &mut Command, signal: Signal) {
    let set = move || Ok(set_parent_process_death_signal(Some(signal))?);
    // SAFETY: between fork and exec the closure makes only one system call, which takes no lock and no
    // memory.
    unsafe { command.pre_exec(set) };
}

/// Reports whether the process ends within `timeout`.
pub fn ends_within(pid: Pid, timeout: Duration) -> Result<bool> {
    let Some(handle) = handle(pid)? else { return Ok(true) };
    wait(&mut [PollFd::new(&handle, PollFlags::IN)], timeout)
}

/// Waits until one of the descriptors is ready, and reports whether one is.
pub fn wait(ready: &mut [PollFd<'_>], timeout: Duration) -> Result<bool> {
    let end = Instant::now() + timeout;
    let count = retry_on_intr(|| {
        let left = Timespec::try_from(end.saturating_duration_since(Instant::now())).ok();
        poll(ready, left.as_ref())
    });
    Ok(count.context(|| "cannot wait for a process".to_owned())? > 0)
}
