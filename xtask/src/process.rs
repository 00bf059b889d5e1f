//! Waiting for a process, ours or not, without asking again and again.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::run::{Context, Result};

/// What readies itself for reading when the process ends; `None` when it has ended.
pub fn handle(pid: Pid) -> Result<Option<OwnedFd>> {
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(handle) => Ok(Some(handle)),
        Err(Errno::SRCH) => Ok(None),
        Err(error) => Err(error).context(|| format!("cannot watch process {pid}")),
    }
}

/// Whether the process has ended within `timeout`.
pub fn ends_within(pid: Pid, timeout: Duration) -> Result<bool> {
    let Some(handle) = handle(pid)? else { return Ok(true) };
    wait(&mut [PollFd::new(&handle, PollFlags::IN)], timeout)
}

/// Waits until one of them is ready, and says whether one is.
pub fn wait(ready: &mut [PollFd<'_>], timeout: Duration) -> Result<bool> {
    let end = Instant::now() + timeout;
    let count = retry_on_intr(|| {
        let left = Timespec::try_from(end.saturating_duration_since(Instant::now())).ok();
        poll(ready, left.as_ref())
    });
    Ok(count.context(|| "cannot wait for a process".to_owned())? > 0)
}
