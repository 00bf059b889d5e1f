//! Waiting for what a guest says on its serial port.
//!
//! QEMU writes the port to a file, anew in each run, and the kernel tells when that file changes.
//! So a test waits for a line without asking again and again.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::{Errno, read};

use crate::Result;
use crate::error::{Context, Error};

/// A serial port's file, watched.
pub struct Watch {
    path: PathBuf,
    changes: OwnedFd,
}

impl Watch {
    /// Starts to watch the file at `path`, which need not exist yet; its folder must.
    pub fn new(path: &Path) -> Result<Self> {
        let what = || format!("watching {}", path.display());
        let folder =
            path.parent().ok_or_else(|| Error::new(format!("{} is in no folder", path.display())))?;
        let changes = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).context(what)?;
        let flags = WatchFlags::CREATE | WatchFlags::MODIFY | WatchFlags::MOVED_TO;
        inotify::add_watch(&changes, folder, flags).context(what)?;
        Ok(Self { path: path.to_owned(), changes })
    }

    /// Waits until `find` finds something in what the guest has said so far. Gives up after
    /// `timeout`, or when `process` (its pidfd) ends.
    pub fn until<T>(
        &self,
        timeout: Duration,
        process: Option<BorrowedFd>,
        find: impl Fn(&str) -> Option<T>,
    ) -> Result<T> {
        let mut last = String::new();
        let found = self.until_it(timeout, process, || {
            last = said(&self.path)?;
            Ok(find(&last))
        })?;
        found.map_err(|why| self.not_said(&why, &last))
    }

    /// The same, for what `look` finds when it looks at the file by itself. Giving up is not an error
    /// yet: why is told.
    pub fn until_it<T>(
        &self,
        timeout: Duration,
        process: Option<BorrowedFd>,
        mut look: impl FnMut() -> Result<Option<T>>,
    ) -> Result<Result<T, String>> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(found) = look()? {
                return Ok(Ok(found));
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.change(left, process)? {
                // Other files of the folder may change all the time.
                Change::Said if !left.is_zero() => {}
                Change::Ended => return Ok(Err("the process ended".to_owned())),
                Change::Said | Change::Nothing => {
                    return Ok(Err(format!("it did not come within {timeout:?}")));
                }
            }
        }
    }

    fn change(&self, left: Duration, process: Option<BorrowedFd>) -> Result<Change> {
        let what = || format!("waiting for {}", self.path.display());
        let mut fds = vec![PollFd::new(&self.changes, PollFlags::IN)];
        fds.extend(process.as_ref().map(|process| PollFd::new(process, PollFlags::IN)));
        let left = Timespec::try_from(left).context(what)?;
        match poll(&mut fds, Some(&left)) {
            Err(Errno::INTR) => return Ok(Change::Said),
            other => other.context(what)?,
        };
        if !fds[0].revents().is_empty() {
            return self.drain().context(what).map(|()| Change::Said);
        }
        Ok(if fds.iter().any(|fd| !fd.revents().is_empty()) { Change::Ended } else { Change::Nothing })
    }

    /// Takes the news; what they are does not matter, for the file is read anyway.
    fn drain(&self) -> rustix::io::Result<()> {
        let mut news = [0; 4096];
        loop {
            match read(self.changes.as_fd(), &mut news) {
                Ok(1..) | Err(Errno::INTR) => {}
                Ok(0) | Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn not_said(&self, why: &str, said: &str) -> Error {
        let lines: Vec<_> = said.lines().rev().take(5).collect();
        let last: Vec<_> = lines.into_iter().rev().collect();
        let path = self.path.display();
        Error::new(format!(
            "the guest's serial port ({path}) did not say what was expected: {why}; last lines: {last:?}"
        ))
    }
}

enum Change {
    Said,
    Ended,
    Nothing,
}

/// All that the guest has said in this run.
pub fn said(path: &Path) -> Result<String> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error).context(|| format!("reading {}", path.display())),
    }
}

/// The micro guest's counts in `said`. A line is one only when it is whole: the snapshot or the
/// reader may have come in the middle of one.
pub fn counts(said: &str) -> impl DoubleEndedIterator<Item = u32> {
    let whole = said.split_inclusive('\n').filter_map(|line| line.strip_suffix("\r\n"));
    whole.filter(|line| line.len() == 8).filter_map(|line| u32::from_str_radix(line, 16).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_are_counts() {
        let said = "0A\r\n00000010\r\n00000011\r\n0000001";
        assert_eq!(counts(said).collect::<Vec<_>>(), [16, 17]);
        assert_eq!(counts("00000012\r").next(), None);
    }

    #[test]
    fn a_line_that_comes_later_is_seen_and_one_that_does_not_is_missed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial.log");
        let watch = Watch::new(&path).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| fs::write(&path, "00000001\r\n").unwrap());
            let first = watch.until(Duration::from_secs(10), None, |said| counts(said).next());
            assert_eq!(first.unwrap(), 1);
        });
        let error = watch.until(Duration::ZERO, None, |said| counts(said).nth(1)).unwrap_err();
        assert!(error.to_string().contains("00000001"), "{error}");
    }
}
