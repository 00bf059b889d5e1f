//! Waiting for the content of a file.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::{Errno, read};

use crate::Result;
use crate::error::{Context, Error};

/// Watches the content of one file, by inotify instead of polling.
pub struct ContentWatch {
    path: PathBuf,
    changes: OwnedFd,
}

impl ContentWatch {
    /// Starts to watch the file at `path`. The file need not exist yet; its folder must.
    pub fn new(path: &Path) -> Result<Self> {
        let what = || format!("watching {}", path.display());
        let folder =
            path.parent().ok_or_else(|| Error::new(format!("{} is in no folder", path.display())))?;
        let changes = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).context(what)?;
        let flags = WatchFlags::CREATE | WatchFlags::MODIFY | WatchFlags::MOVED_TO;
        inotify::add_watch(&changes, folder, flags).context(what)?;
        Ok(Self { path: path.to_owned(), changes })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until `look`, which reads the file, finds something. Gives up after `timeout`, or when `process`
    /// (its pidfd) ends; the inner error is the reason.
    pub fn wait_for<T>(
        &self,
        timeout: Duration,
        process: Option<BorrowedFd>,
        mut look: impl FnMut() -> Result<Option<T>>,
    ) -> Result<Wait<T>> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(found) = look()? {
                return Ok(Wait::Found(found));
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.next_change(left, process)? {
                // Other files of the folder may change all the time.
                Change::Written if !left.is_zero() => {}
                Change::ProcessEnded => return Ok(Wait::GaveUp("the process ended".to_owned())),
                Change::Written | Change::None => {
                    return Ok(Wait::GaveUp(format!("it did not come within {timeout:?}")));
                }
            }
        }
    }

    fn next_change(&self, left: Duration, process: Option<BorrowedFd>) -> Result<Change> {
        let what = || format!("waiting for {}", self.path.display());
        let mut fds = vec![PollFd::new(&self.changes, PollFlags::IN)];
        fds.extend(process.as_ref().map(|process| PollFd::new(process, PollFlags::IN)));
        let left = Timespec::try_from(left).context(what)?;
        match poll(&mut fds, Some(&left)) {
            Err(Errno::INTR) => return Ok(Change::Written),
            other => other.context(what)?,
        };
        if !fds[0].revents().is_empty() {
            return self.drain().context(what).map(|()| Change::Written);
        }
        let process_ended = fds.iter().any(|fd| !fd.revents().is_empty());
        Ok(if process_ended { Change::ProcessEnded } else { Change::None })
    }

    /// Discards the events: the caller reads the whole file anyway.
    fn drain(&self) -> rustix::io::Result<()> {
        let mut events = [0; 4096];
        loop {
            match read(self.changes.as_fd(), &mut events) {
                Ok(1..) | Err(Errno::INTR) => {}
                Ok(0) | Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// The outcome of a wait.
pub enum Wait<T> {
    /// The content came.
    Found(T),
    /// The content did not come, for this reason.
    GaveUp(String),
}

enum Change {
    Written,
    ProcessEnded,
    None,
}
