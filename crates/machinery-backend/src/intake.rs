//! A pipe through which a hypervisor writes a file of the caller.
//!
//! A hypervisor that gets the file itself can keep it open, and change or fill it at any later time. A pipe is gone when
//! it is closed, and the reader decides how much it takes.
//!
//! ```text
//! hypervisor ─▶ pipe ─▶ thread: counts, and copies ─▶ file
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;

use machinery::{Deadline, Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};
use rustix::io::retry_on_intr;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};

/// The size of the pipe, and of one copy, in bytes. An unprivileged user may not have larger ones.
const PIPE_SIZE: usize = 1 << 20;

/// The reading end of a pipe that a hypervisor writes to.
#[derive(Debug)]
pub struct Intake {
    reader: File,
}

impl Intake {
    /// Returns an intake, and the end for the hypervisor. The caller closes that end once the hypervisor has it.
    ///
    /// # Errors
    /// No pipe can be made.
    pub fn new() -> Result<(Intake, OwnedFd)> {
        let pipe = pipe_with(PipeFlags::CLOEXEC).map_err(|error| no_pipe(&error.into()))?;
        Ok((Intake::of(pipe.0), pipe.1))
    }

    /// Returns an intake for a hypervisor that opens a path. There must be nothing at the path.
    ///
    /// # Errors
    /// No pipe can be made there.
    pub fn at(path: &Path) -> Result<Intake> {
        let failed = |error: rustix::io::Errno| Error::io("make a pipe at", path, &error.into());
        mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).map_err(failed)?;
        // Does not wait for a writer.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Intake::of(open(path, flags, Mode::empty()).map_err(failed)?))
    }

    fn of(reader: OwnedFd) -> Intake {
        if let Err(error) = fcntl_setpipe_size(&reader, PIPE_SIZE) {
            tracing::debug!(%error, "a pipe keeps its size");
        }
        Intake { reader: File::from(reader) }
    }

    /// Begins to copy into `file`, until the hypervisor closes its end or has written more than `limit` bytes.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn copy_to(self, mut file: impl Write + Send + 'static, limit: u64) -> Result<Copying> {
        let (stop, stopped) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| no_pipe(&error.into()))?;
        let (sender, ended) = mpsc::channel();
        let mut reader = self.reader;
        let copy = move || {
            let copied = copy(&mut reader, &stop, &mut file, limit);
            // Closed first: the hypervisor gets an error for whatever it still writes.
            drop(reader);
            // Nobody waits for it if the action has failed.
            let _ = sender.send(copied);
        };
        let started = thread::Builder::new().name("intake".to_owned()).spawn(copy);
        started.map_err(|error| Error::environment(format!("cannot start a thread: {error}")))?;
        Ok(Copying { ended, _stop: stopped })
    }
}

fn no_pipe(error: &io::Error) -> Error {
    Error::environment(format!("cannot make a pipe: {error}"))
}

/// A copy under way. Dropping it ends the copy.
#[derive(Debug)]
pub struct Copying {
    ended: Receiver<Result<u64>>,
    _stop: OwnedFd,
}

impl Copying {
    /// Waits until the hypervisor has closed its end, and returns the number of bytes. `what` names the hypervisor.
    ///
    /// # Errors
    /// The file cannot be written, the hypervisor has written more than the limit, or the deadline passes.
    pub fn finish(self, what: &str, deadline: Deadline) -> Result<u64> {
        match self.ended.recv_timeout(deadline.remaining()) {
            Ok(copied) => copied,
            Err(RecvTimeoutError::Timeout) => Err(deadline.timeout(&format!("{what} to close its file"))),
            Err(RecvTimeoutError::Disconnected) => Err(Error::failed("the copy of a file panicked")),
        }
    }
}

fn copy(reader: &mut File, stop: &OwnedFd, file: &mut impl Write, limit: u64) -> Result<u64> {
    let mut buffer = vec![0; PIPE_SIZE];
    let mut copied = 0;
    loop {
        let mut ready = [PollFd::new(&*reader, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        let waited = retry_on_intr(|| poll(&mut ready, None));
        waited.map_err(|error| Error::failed(format!("cannot wait for a pipe: {error}")))?;
        if !ready[1].revents().is_empty() {
            return Err(Error::interrupted("the copy of a file was ended"));
        }
        let count = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                continue;
            }
            Err(error) => return Err(Error::failed(format!("cannot read a pipe: {error}"))),
        };
        copied += count as u64;
        if copied > limit {
            return Err(Error::failed(format!(
                "more than {limit} bytes were written, and the rest was cut off"
            )));
        }
        file.write_all(&buffer[..count]).map_err(|error| not_written(&error))?;
    }
    file.flush().map_err(|error| not_written(&error))?;
    Ok(copied)
}

fn not_written(error: &io::Error) -> Error {
    let failed = Error::environment(format!("cannot write the file: {error}"));
    if error.kind() == io::ErrorKind::StorageFull {
        failed.advice("Free some space on that file system")
    } else {
        failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    /// A file in memory.
    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(60))
    }

    #[test]
    fn file_has_all_that_was_written_until_the_end_was_closed() {
        let (intake, end) = Intake::new().unwrap();
        let file = Memory::default();
        let copying = intake.copy_to(file.clone(), 3 << 20).unwrap();
        let content: Vec<u8> = (0..3 << 20).map(|index: u32| index.to_le_bytes()[1]).collect();
        File::from(end).write_all(&content).unwrap();
        assert_eq!(copying.finish("the test", soon()).unwrap(), 3 << 20);
        assert!(*file.0.lock().unwrap() == content);
    }

    #[test]
    fn file_is_cut_off_and_the_writer_fails_when_the_limit_is_exceeded() {
        let (intake, end) = Intake::new().unwrap();
        let file = Memory::default();
        let copying = intake.copy_to(file.clone(), 100).unwrap();
        let mut end = File::from(end);
        // Fails once the other end is closed.
        while end.write_all(&[0; 4096]).is_ok() {}
        let error = copying.finish("the test", soon()).unwrap_err().to_string();
        assert!(error.contains("more than 100 bytes"), "{error}");
        assert!(file.0.lock().unwrap().len() <= 100);
    }

    #[test]
    fn intake_at_a_path_waits_for_its_writer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        let file = Memory::default();
        let copying = Intake::at(&path).unwrap().copy_to(file.clone(), 100).unwrap();
        let mut writer = File::options().write(true).open(&path).unwrap();
        writer.write_all(b"memory").unwrap();
        drop(writer);
        assert_eq!(copying.finish("the test", soon()).unwrap(), 6);
        assert!(Intake::at(&path).is_err());
    }

    #[test]
    fn copy_ends_when_nobody_waits_for_it() {
        let (intake, end) = Intake::new().unwrap();
        let copying = intake.copy_to(io::sink(), 100).unwrap();
        let late = copying.finish("the test", Deadline::after(Duration::ZERO)).unwrap_err();
        assert_eq!(late.kind(), machinery::ErrorKind::Timeout);
        // The thread ends, and with it the reading end.
        let mut closed = [PollFd::new(&end, PollFlags::empty())];
        poll(&mut closed, None).unwrap();
        assert!(closed[0].revents().contains(PollFlags::ERR));
    }
}
