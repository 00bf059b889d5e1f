//! Waiting for the output of a guest on its serial port. QEMU writes the port to a file, anew in each run.

use std::fs;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use crate::Result;
use crate::error::{Context, Error};
use crate::file_content::{ContentWatch, Wait};

/// Watches the file of a serial port.
pub struct SerialWatch(ContentWatch);

impl SerialWatch {
    /// Starts to watch the file at `path`. The file need not exist yet; its folder must.
    pub fn new(path: &Path) -> Result<Self> {
        ContentWatch::new(path).map(SerialWatch)
    }

    /// Waits until `find` finds something in the guest's output. Gives up after `timeout`, or when `process`
    /// (its pidfd) ends.
    pub fn wait_for<T>(
        &self,
        timeout: Duration,
        process: Option<BorrowedFd>,
        find: impl Fn(&str) -> Option<T>,
    ) -> Result<T> {
        let mut last = String::new();
        let waited = self.0.wait_for(timeout, process, || {
            last = output(self.0.path())?;
            Ok(find(&last))
        })?;
        match waited {
            Wait::Found(found) => Ok(found),
            Wait::GaveUp(why) => Err(self.gave_up(&why, &last)),
        }
    }

    fn gave_up(&self, why: &str, output: &str) -> Error {
        let lines: Vec<_> = output.lines().rev().take(5).collect();
        let last: Vec<_> = lines.into_iter().rev().collect();
        let path = self.0.path().display();
        Error::new(format!(
            "the expected output is not on the guest's serial port ({path}): {why}; last lines: {last:?}"
        ))
    }
}

/// Returns the guest's output of this run.
pub fn output(path: &Path) -> Result<String> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error).context(|| format!("reading {}", path.display())),
    }
}

/// Returns the micro guest's counts in `output`. Only a whole line is a count: the snapshot or the reader may
/// have cut one.
pub fn counts(output: &str) -> impl DoubleEndedIterator<Item = u32> {
    let whole = output.split_inclusive('\n').filter_map(|line| line.strip_suffix("\r\n"));
    whole.filter(|line| line.len() == 8).filter_map(|line| u32::from_str_radix(line, 16).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incomplete_lines_are_not_counted() {
        let output = "0A\r\n00000010\r\n00000011\r\n0000001";
        assert_eq!(counts(output).collect::<Vec<_>>(), [16, 17]);
        assert_eq!(counts("00000012\r").next(), None);
    }

    #[test]
    fn wait_returns_a_later_line_and_fails_when_none_comes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial.log");
        let watch = SerialWatch::new(&path).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| fs::write(&path, "00000001\r\n").unwrap());
            let first = watch.wait_for(Duration::from_secs(10), None, |output| counts(output).next());
            assert_eq!(first.unwrap(), 1);
        });
        let error = watch.wait_for(Duration::ZERO, None, |output| counts(output).nth(1)).unwrap_err();
        assert!(error.to_string().contains("00000001"), "{error}");
    }
}
