//! The private folder in which a plugin writes a dump or a screenshot, and the handover of the file.
//!
//! The plugin's path is in a folder that only the host's user can enter. For a path of root or of the host's user, the
//! folder is beside the target, so that the file only has to be renamed. Otherwise the folder is in the CWD: another
//! user could replace a folder that is beside the target.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use machinery::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, openat, renameat, renameat_with};
use rustix::io::{Errno, retry_on_intr};

use super::folders::Folders;
use super::named::{NamedFile, Parent, cannot_write, expect_replaceable, remove};
use super::passed::PassedFile;
use super::private::{Content, PrivateFile};

/// The number of bytes that a pipe takes at once when `poll` reports it as writable. Source: `PIPE_BUF` in pipe(7).
const PIPE_CHUNK: usize = 4096;

/// The private folder for one file of a client. Dropping it removes the file, unless that was handed over.
#[derive(Debug)]
pub struct Staged {
    file: PrivateFile,
    target: Target,
}

#[derive(Debug)]
enum Target {
    Passed(PassedFile),
    Beside(PathBuf),
    Below(Parent),
}

/// The file of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientFile {
    /// A descriptor that the client has passed.
    Passed(PassedFile),
    /// A path that the client has named.
    Named(NamedFile),
}

impl ClientFile {
    /// Makes the private folder for the file. This blocks.
    ///
    /// # Errors
    /// The file may not be written to its path, or the folder cannot be made.
    pub fn stage(&self, folders: &Folders) -> Result<Staged> {
        let target = match self {
            ClientFile::Passed(file) => Target::Passed(file.clone()),
            ClientFile::Named(named) => match named.owner {
                None => {
                    expect_replaceable(&named.path)?;
                    Target::Beside(named.path.clone())
                }
                Some(owner) => {
                    let parent = named.parent(owner, folders)?;
                    parent.has_own_file()?;
                    Target::Below(parent)
                }
            },
        };
        let file = match &target {
            Target::Beside(path) => {
                let beside =
                    path.parent().ok_or_else(|| cannot_write(path, &io::ErrorKind::IsADirectory.into()));
                PrivateFile::in_folder(beside?).map_err(|error| cannot_write(path, &error))?
            }
            _ => PrivateFile::staged(folders)?,
        };
        Ok(Staged { file, target })
    }
}

impl Staged {
    /// Returns the path that the plugin writes to.
    pub fn path(&self) -> PathBuf {
        self.file.path()
    }

    /// Expects a complete file of that content. This blocks.
    ///
    /// # Errors
    /// As [`PrivateFile::check`].
    pub fn check(&self, content: Content) -> Result<()> {
        self.file.check(content)
    }

    /// Gives the file to the client. A passed pipe has to be read within `limit`: as long as nobody reads it, the file takes
    /// space.
    ///
    /// # Errors
    /// The file cannot be moved or written.
    pub fn hand_over(self, limit: Duration) -> Result<()> {
        match &self.target {
            Target::Passed(file) => {
                let copied = file.rewound().and_then(|to| copy_into(self.file.open_io()?, to, limit));
                copied.map_err(|error| {
                    Error::environment(format!("cannot write to the passed descriptor: {error}")).advice(
                        "Read a passed pipe until its end, or check the space of the passed file's disk",
                    )
                })
            }
            Target::Beside(path) => fs::rename(self.path(), path).map_err(|error| cannot_write(path, &error)),
            Target::Below(parent) => self.move_below(parent),
        }
    }

    fn move_below(&self, parent: &Parent) -> Result<()> {
        let failed = |error: Errno| cannot_write(parent.path(), &error.into());
        let is_new = !parent.has_own_file()?;
        let file = self.file.open()?;
        let given =
            file.set_permissions(Permissions::from_mode(0o600)).and_then(|()| parent.owner().give(&file));
        given.map_err(|error| cannot_write(parent.path(), &error))?;
        match place(CWD, self.path(), parent, is_new) {
            Err(Errno::XDEV) => {
                let (copy, name) = self.copy_beside(file, parent)?;
                parent.owner().give(&copy).map_err(|error| cannot_write(parent.path(), &error))?;
                place(parent.folder(), &name, parent, is_new).map_err(|error| {
                    remove(parent.folder(), &name);
                    failed(error)
                })
            }
            placed => placed.map_err(failed),
        }
    }

    /// Copies the file into the folder of its target, which is on another file system.
    fn copy_beside(&self, mut file: File, parent: &Parent) -> Result<(OwnedFd, OsString)> {
        let failed = |error: io::Error| cannot_write(parent.path(), &error);
        let mut name = OsString::from(".");
        // The name of the private folder is random.
        name.push(self.file.folder().file_name().unwrap_or_default());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let copy = openat(parent.folder(), &name, flags, Mode::from_raw_mode(0o600));
        let mut copy = File::from(copy.map_err(|error| failed(error.into()))?);
        match io::copy(&mut file, &mut copy) {
            Ok(_) => Ok((copy.into(), name)),
            Err(error) => {
                remove(parent.folder(), &name);
                Err(failed(error))
            }
        }
    }
}

/// Copies the file into a file or a pipe of a client.
fn copy_into(mut from: File, mut to: &File, limit: Duration) -> io::Result<()> {
    if to.metadata()?.is_file() {
        return io::copy(&mut from, &mut to).map(drop);
    }
    let until = Instant::now() + limit;
    let mut chunk = [0; PIPE_CHUNK];
    loop {
        let length = from.read(&mut chunk)?;
        let Some(data) = chunk.get(..length).filter(|data| !data.is_empty()) else { return Ok(()) };
        wait_until_writable(to, until)?;
        to.write_all(data)?;
    }
}

/// Waits until a chunk can be written to the pipe without blocking.
fn wait_until_writable(pipe: &File, until: Instant) -> io::Result<()> {
    let rest = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
    let mut pipe = [PollFd::new(pipe, PollFlags::OUT)];
    match retry_on_intr(|| poll(&mut pipe, rest.as_ref()))? {
        0 => Err(io::Error::new(io::ErrorKind::TimedOut, "nobody reads it")),
        _ => Ok(()),
    }
}

/// Moves a file to its target. A new name must not exist.
fn place(
    folder: impl rustix::fd::AsFd + Copy,
    from: impl AsRef<Path>,
    parent: &Parent,
    is_new: bool,
) -> Result<(), Errno> {
    let from = from.as_ref();
    if is_new {
        match renameat_with(folder, from, parent.folder(), parent.name(), RenameFlags::NOREPLACE) {
            // This file system cannot do that.
            Err(Errno::INVAL | Errno::NOSYS) => {}
            placed => return placed,
        }
        if rustix::fs::statat(parent.folder(), parent.name(), AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return Err(Errno::EXIST);
        }
    }
    renameat(folder, from, parent.folder(), parent.name())
}

#[cfg(test)]
mod tests {
    use super::super::named::{Existing, Owner};
    use super::super::passed::tests::checked;
    use super::super::private::{MAX_DUMP, MAX_PICTURE};
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};
    use tempfile::TempDir;

    const SOON: Duration = Duration::from_secs(60);
    const SOMEBODY: Owner = Owner { uid: 54_321, gid: 54_321 };

    /// A CWD with the folder of a task.
    struct Scratch {
        root: TempDir,
        folders: Folders,
    }

    fn scratch() -> Scratch {
        let root = tempfile::tempdir().unwrap();
        let [storage, staging] = ["storage", "staging"].map(|name| root.path().join(name));
        fs::create_dir_all(storage.join("task")).unwrap();
        fs::create_dir(&staging).unwrap();
        let consoles = root.path().join("console");
        Scratch { folders: Folders { storage, staging, consoles }, root }
    }

    impl Scratch {
        fn file(&self, path: &str, owner: Option<Owner>) -> ClientFile {
            ClientFile::Named(NamedFile { path: self.root.path().join(path), owner })
        }

        fn write(&self, path: &str, owner: Option<Owner>) -> Result<()> {
            let staged = self.file(path, owner).stage(&self.folders)?;
            fs::write(staged.path(), "memory").unwrap();
            staged.check(Content::Dump)?;
            staged.hand_over(SOON)
        }

        #[track_caller]
        fn assert_refused(&self, path: &str) {
            let dump = self.write(path, Some(SOMEBODY)).unwrap_err().to_string();
            let ClientFile::Named(capture) = self.file(path, Some(SOMEBODY)) else { panic!("not named") };
            let capture = capture.open(&self.folders, Existing::Truncated).unwrap_err().to_string();
            println!("{dump}\n{capture}");
        }
    }

    #[tokio::test]
    async fn file_takes_no_space_any_more_when_nobody_reads_the_passed_pipe() {
        let scratch = scratch();
        let (reader, writer) = std::io::pipe().unwrap();
        let file = ClientFile::Passed(checked(writer).await.unwrap());
        let staged = file.stage(&scratch.folders).unwrap();
        fs::write(staged.path(), vec![7; 1 << 20]).unwrap();
        let error = staged.hand_over(Duration::from_millis(50)).unwrap_err().to_string();
        assert!(error.contains("nobody reads it"), "{error}");
        assert_eq!(fs::read_dir(&scratch.folders.staging).unwrap().count(), 0);
        drop(reader);
    }

    #[tokio::test]
    async fn pipe_gets_the_whole_file_when_it_is_read() {
        let scratch = scratch();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let read = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        let content: Vec<u8> = (0..1_000_003).map(|number: u32| number as u8).collect();
        let file = ClientFile::Passed(checked(writer).await.unwrap());
        let staged = file.stage(&scratch.folders).unwrap();
        fs::write(staged.path(), &content).unwrap();
        staged.hand_over(SOON).unwrap();
        drop(file);
        assert_eq!(read.join().unwrap(), content);
    }

    #[test]
    fn file_is_moved_below_storage_and_belongs_to_the_client() {
        let scratch = scratch();
        let path = scratch.folders.storage.join("task/memory.dmp");
        for _ in 0..2 {
            scratch.write("storage/task/memory.dmp", Some(SOMEBODY)).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"memory");
            if rustix::process::geteuid().is_root() {
                assert_eq!(
                    (path.metadata().unwrap().uid(), path.metadata().unwrap().gid()),
                    (54_321, 54_321)
                );
            } else {
                // A plain user cannot give the file away, so it is not replaced either.
                fs::remove_file(&path).unwrap();
            }
        }
        assert_eq!(fs::read_dir(&scratch.folders.staging).unwrap().count(), 0);
    }

    #[test]
    fn path_of_a_client_is_refused_when_it_leads_out_of_storage() {
        let scratch = scratch();
        fs::create_dir(scratch.root.path().join("conf")).unwrap();
        symlink("../conf", scratch.folders.storage.join("link")).unwrap();
        symlink(scratch.root.path().join("conf"), scratch.folders.storage.join("absolute")).unwrap();
        symlink("../../conf/secret", scratch.folders.storage.join("task/final")).unwrap();
        symlink("memory.dmp", scratch.folders.storage.join("task/beside")).unwrap();
        for path in [
            "conf/file",
            "storage/../conf/file",
            "storage/task/../../conf/file",
            "storage/link/file",
            "storage/absolute/file",
            "storage/task/final",
            "storage/task/beside",
            "storage/none/file",
            "storage",
            "storage/task/..",
            "storage/task/",
        ] {
            scratch.assert_refused(path);
        }
        assert_eq!(fs::read_dir(scratch.root.path().join("conf")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(&scratch.folders.staging).unwrap().count(), 0);
    }

    #[test]
    fn path_of_a_client_is_refused_when_something_of_another_user_exists() {
        let scratch = scratch();
        let task = scratch.folders.storage.join("task");
        fs::write(task.join("foreign"), "kept").unwrap();
        fs::create_dir(task.join("folder")).unwrap();
        let fifo = rustix::fs::CWD;
        rustix::fs::mknodat(
            fifo,
            task.join("fifo"),
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o666),
            0,
        )
        .unwrap();
        for path in ["storage/task/foreign", "storage/task/folder", "storage/task/fifo"] {
            scratch.assert_refused(path);
        }
        assert_eq!(fs::read(task.join("foreign")).unwrap(), b"kept");
    }

    #[test]
    fn symbolic_link_is_refused_when_root_or_the_hosts_user_names_it() {
        let scratch = scratch();
        fs::write(scratch.root.path().join("secret"), "kept").unwrap();
        symlink("secret", scratch.root.path().join("link")).unwrap();
        assert!(scratch.write("link", None).unwrap_err().to_string().contains("is no file"));
        let ClientFile::Named(capture) = scratch.file("link", None) else { panic!("not named") };
        let refused = capture.open(&scratch.folders, Existing::Truncated).unwrap_err().to_string();
        assert!(refused.contains("symbolic link"), "{refused}");
        assert_eq!(fs::read(scratch.root.path().join("secret")).unwrap(), b"kept");
        scratch.write("secret", None).unwrap();
        assert_eq!(fs::read(scratch.root.path().join("secret")).unwrap(), b"memory");
    }

    #[test]
    fn folder_of_a_path_is_not_left_when_a_link_replaces_it_meanwhile() {
        let scratch = scratch();
        let (task, moved) = (scratch.folders.storage.join("task"), scratch.folders.storage.join("moved"));
        fs::create_dir(scratch.root.path().join("conf")).unwrap();
        let staged = scratch.file("storage/task/file", Some(SOMEBODY)).stage(&scratch.folders).unwrap();
        fs::write(staged.path(), "memory").unwrap();
        fs::rename(&task, &moved).unwrap();
        symlink("../conf", &task).unwrap();
        staged.hand_over(SOON).unwrap();
        assert_eq!(fs::read(moved.join("file")).unwrap(), b"memory");
        assert_eq!(fs::read_dir(scratch.root.path().join("conf")).unwrap().count(), 0);
    }

    #[test]
    fn file_is_refused_when_it_is_too_large_or_no_picture() {
        let scratch = scratch();
        let staged = scratch.file("shot", None).stage(&scratch.folders).unwrap();
        assert!(staged.check(Content::Dump).unwrap_err().to_string().contains("no file"));
        let file = File::create(staged.path()).unwrap();
        file.set_len(MAX_DUMP + 1).unwrap();
        assert!(staged.check(Content::Dump).unwrap_err().to_string().contains("may have"));
        file.set_len(MAX_PICTURE + 1).unwrap();
        assert!(staged.check(Content::Picture).unwrap_err().to_string().contains("may have"));
        for bytes in [&b""[..], b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0"] {
            fs::write(staged.path(), bytes).unwrap();
            let error = staged.check(Content::Picture).unwrap_err().to_string();
            assert!(error.contains("no PNG image"), "{error}");
        }
        let mut picture = Vec::new();
        png::Encoder::new(&mut picture, 2, 1).write_header().unwrap().write_image_data(&[1, 2]).unwrap();
        fs::write(staged.path(), picture).unwrap();
        staged.check(Content::Picture).unwrap();
        fs::remove_file(staged.path()).unwrap();
        symlink("/etc/passwd", staged.path()).unwrap();
        assert!(staged.check(Content::Dump).is_err());
        drop(staged);
        assert!(!scratch.root.path().join("shot").exists());
    }
}
