//! Waiting for access to files.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::{Errno, retry_on_intr};

use crate::Result;
use crate::error::{Context, Error};

/// An access to a file of a folder.
#[derive(Debug, Clone, Copy)]
pub enum FileEvent<'a> {
    /// A process opens the file of that name.
    Opened(&'a str),
    /// A process reads the file of that name.
    Read(&'a str),
}

impl FileEvent<'_> {
    fn is(self, event: &inotify::Event<'_>) -> bool {
        let (wanted, file) = match self {
            FileEvent::Opened(file) => (ReadFlags::OPEN, file),
            FileEvent::Read(file) => (ReadFlags::ACCESS, file),
        };
        event.events().contains(wanted)
            && event.file_name().is_some_and(|name| name.to_bytes() == file.as_bytes())
    }
}

/// Records access to the files of a folder.
pub struct FileWatch {
    folder: PathBuf,
    news: OwnedFd,
}

impl FileWatch {
    /// Starts to watch a folder.
    pub fn new(folder: &Path) -> Result<Self> {
        let what = || format!("watching {}", folder.display());
        let news = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).context(what)?;
        inotify::add_watch(&news, folder, WatchFlags::OPEN | WatchFlags::ACCESS).context(what)?;
        Ok(FileWatch { folder: folder.to_owned(), news })
    }

    /// Waits until all of these events have occurred, in this order.
    pub fn wait(self, steps: &[FileEvent<'_>], timeout: Duration) -> Result<()> {
        let end = Instant::now() + timeout;
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut news = inotify::Reader::new(&self.news, &mut space);
        steps.iter().try_for_each(|step| self.step(*step, &mut news, end))
    }

    fn step(
        &self,
        step: FileEvent<'_>,
        news: &mut inotify::Reader<'_, &OwnedFd>,
        end: Instant,
    ) -> Result<()> {
        let what = || format!("waiting for {step:?} in {}", self.folder.display());
        loop {
            match news.next() {
                Ok(event) if step.is(&event) => return Ok(()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.more(end).context(what)?,
                Err(error) => return Err(error).context(what),
            }
        }
    }

    fn more(&self, end: Instant) -> Result<()> {
        let what = || "watching".to_owned();
        let left = Timespec::try_from(end.saturating_duration_since(Instant::now())).context(what)?;
        let mut news = [PollFd::new(&self.news, PollFlags::IN)];
        match retry_on_intr(|| poll(&mut news, Some(&left))).context(what)? {
            0 => Err(Error::new("it does not happen")),
            _ => Ok(()),
        }
    }
}
