//! Descriptors that clients have passed.
//!
//! The file system behind a descriptor may be the client's own and never answer, for any call: `fstat`, `write` and
//! even `close`. So each of these runs on a thread of the runtime's pool. A descriptor has a permit until it is
//! closed, and a user has a limited number of permits, so a user blocks no more threads than that.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use tokio::runtime::Handle;

/// The number of descriptors that the connections, requests and locks of one user may hold.
const MAX_PER_USER: usize = 512;
/// The time that the file system of a descriptor has to answer.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);

/// Counts the descriptors of each user.
#[derive(Debug, Default)]
pub struct DescriptorBudget {
    used: Mutex<HashMap<u32, usize>>,
}

impl DescriptorBudget {
    /// Returns that many permits for the user, unless the user would have too many.
    pub fn permits(self: &Arc<Self>, user: u32, count: usize) -> Option<Vec<DescriptorPermit>> {
        let mut used = self.lock();
        let of_user = used.entry(user).or_default();
        if *of_user + count > MAX_PER_USER {
            return None;
        }
        *of_user += count;
        Some((0..count).map(|_| DescriptorPermit { budget: Arc::clone(self), user }).collect())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The permit for one descriptor.
#[derive(Debug)]
pub struct DescriptorPermit {
    budget: Arc<DescriptorBudget>,
    user: u32,
}

impl Drop for DescriptorPermit {
    fn drop(&mut self) {
        let mut used = self.budget.lock();
        if let Some(count) = used.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                used.remove(&self.user);
            }
        }
    }
}

/// An open descriptor of a client. It is closed on a thread of its own.
#[derive(Debug)]
pub struct Descriptor {
    /// Taken only when this is dropped.
    open: Option<(File, DescriptorPermit)>,
}

impl Descriptor {
    /// Returns the descriptor with its permit.
    pub fn new(descriptor: OwnedFd, permit: DescriptorPermit) -> Self {
        Descriptor { open: Some((File::from(descriptor), permit)) }
    }

    fn file(&self) -> Option<&File> {
        self.open.as_ref().map(|(file, _)| file)
    }

    /// Expects a regular file or a pipe that is open for writing.
    ///
    /// # Errors
    /// The descriptor is anything else, or its file system does not answer; the reason is for the client.
    pub async fn checked(self) -> Result<PassedFile, String> {
        let checking = tokio::task::spawn_blocking(move || self.check());
        match tokio::time::timeout(CHECK_TIMEOUT, checking).await {
            Ok(Ok(checked)) => checked,
            Ok(Err(_)) => Err("the passed descriptor could not be checked".to_owned()),
            Err(_) => Err("the file system of the passed descriptor does not answer".to_owned()),
        }
    }

    fn check(self) -> Result<PassedFile, String> {
        let wrong = |why: &str| format!("the passed descriptor {why}: open a file or a pipe for writing");
        let file = self.file().ok_or_else(|| wrong("is closed"))?;
        let flags = fcntl_getfl(file).map_err(|error| wrong(&format!("cannot be used ({error})")))?;
        let access = flags & OFlags::ACCMODE;
        if flags.contains(OFlags::PATH) || (access != OFlags::WRONLY && access != OFlags::RDWR) {
            return Err(wrong("is not open for writing"));
        }
        let stat = fstat(file).map_err(|error| wrong(&format!("cannot be used ({error})")))?;
        let is_regular = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => true,
            FileType::Fifo => false,
            _ => return Err(wrong("is neither a regular file nor a pipe")),
        };
        let identity = (stat.st_dev, stat.st_ino);
        Ok(PassedFile { descriptor: Arc::new(self), identity, is_regular })
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        let open = self.open.take();
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn_blocking(move || drop(open));
        }
    }
}

/// A file or a pipe that a client has passed. Two are equal if they are the same file.
#[derive(Debug, Clone)]
pub struct PassedFile {
    descriptor: Arc<Descriptor>,
    /// The device and the inode.
    identity: (u64, u64),
    is_regular: bool,
}

impl PartialEq for PassedFile {
    fn eq(&self, other: &Self) -> bool {
        self.identity == other.identity
    }
}

impl Eq for PassedFile {}

impl PassedFile {
    /// Returns the file, ready to be written from its beginning. A pipe continues where it is. This blocks.
    ///
    /// # Errors
    /// The file cannot be truncated.
    pub fn rewound(&self) -> std::io::Result<&File> {
        let mut file = self.file()?;
        if self.is_regular {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
        }
        Ok(file)
    }

    /// Returns the file.
    ///
    /// # Errors
    /// It is closed, which does not happen while this exists.
    pub fn file(&self) -> std::io::Result<&File> {
        self.descriptor.file().ok_or_else(|| std::io::ErrorKind::NotConnected.into())
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// Returns the file of a descriptor, as that of a client.
    pub async fn checked(descriptor: impl Into<OwnedFd>) -> Result<PassedFile, String> {
        let budget = Arc::new(DescriptorBudget::default());
        let permit = budget.permits(7, 1).unwrap().remove(0);
        Descriptor::new(descriptor.into(), permit).checked().await
    }

    #[tokio::test]
    async fn descriptor_is_accepted_when_it_is_a_file_or_a_pipe_for_writing() {
        let file = tempfile::tempfile().unwrap();
        let (_reader, writer) = std::io::pipe().unwrap();
        let passed = checked(file.try_clone().unwrap()).await.unwrap();
        assert_eq!(passed, checked(file).await.unwrap());
        assert_ne!(passed, checked(writer).await.unwrap());
    }

    #[tokio::test]
    async fn descriptor_is_refused_when_it_is_anything_else() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        let read_only = File::open(folder.path().join("file")).unwrap();
        let only_path = rustix::fs::open(folder.path().join("file"), OFlags::PATH, 0.into()).unwrap();
        let directory = File::open(folder.path()).unwrap();
        for (descriptor, why) in [
            (OwnedFd::from(read_only), "not open for writing"),
            (only_path, "not open for writing"),
            (directory.into(), "not open for writing"),
            (
                File::options().write(true).open("/dev/null").unwrap().into(),
                "neither a regular file nor a pipe",
            ),
            (std::os::unix::net::UnixStream::pair().unwrap().0.into(), "neither a regular file nor a pipe"),
        ] {
            let reason = checked(descriptor).await.unwrap_err();
            assert!(reason.contains(why), "{reason}");
        }
    }

    #[tokio::test]
    async fn permits_are_limited_for_each_user_and_returned() {
        let budget = Arc::new(DescriptorBudget::default());
        let permits = budget.permits(1, MAX_PER_USER).unwrap();
        assert!(budget.permits(1, 1).is_none());
        assert!(budget.permits(2, 1).is_some());
        drop(permits);
        assert!(budget.lock().is_empty());
    }

    #[tokio::test]
    async fn file_is_written_from_its_beginning() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, b"an earlier capture").unwrap();
        let passed = checked(file.as_fd().try_clone_to_owned().unwrap()).await.unwrap();
        passed.rewound().unwrap();
        assert_eq!((file.metadata().unwrap().len(), file.stream_position().unwrap()), (0, 0));
    }
}
