//! The folder of a machine: its mark while it is unfinished, the users who can replace it, its space, and the loss of
//! power.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use machinery::trust::expect_trusted;
use machinery::{Error, Result, format_bytes};
use rustix::fs::{OFlags, statvfs};

use crate::config::Config;

/// The file in the folder of an unfinished machine.
pub const MARK: &str = ".unfinished";
/// The mode of a file in the machine's folder, which the machine's own user reads.
pub const FILE_MODE: u32 = 0o644;
/// The mode of a file with secrets of the guest: its memory, and the keys of its TPM. The machine's user gets it open.
pub const SECRET_MODE: u32 = 0o600;

/// Marks the folder as that of a machine that is to be removed.
///
/// # Errors
/// The mark cannot be written.
pub fn set_mark(folder: &Path) -> Result<()> {
    let path = folder.join(MARK);
    // A link of another user is not followed.
    let flags = OFlags::NOFOLLOW.bits() as i32;
    let made = File::options().write(true).create(true).truncate(false).custom_flags(flags).open(&path);
    made.map(drop).map_err(|error| Error::io("write", &path, &error))
}

/// Copies files into a machine's folder, under these names.
///
/// # Errors
/// A file cannot be read or written.
pub fn copy_files(files: &[(PathBuf, String)], folder: &Path) -> Result<()> {
    files.iter().try_for_each(|(file, name)| {
        let copied = open_regular(file).and_then(|from| {
            let length = from.metadata()?.len();
            let mut new = File::create_new(folder.join(name))?;
            io::copy(&mut from.take(length), &mut new)?;
            new.set_permissions(fs::Permissions::from_mode(FILE_MODE))
        });
        copied.map_err(|error| Error::io("copy to the machine's folder", file, &error))
    })
}

/// Opens a file for reading, which is no pipe or device.
///
/// # Errors
/// It is one, or cannot be opened.
pub fn open_regular(path: &Path) -> io::Result<File> {
    // A pipe would block.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no regular file")) }
}

/// Removes the mark of a machine that is finished.
///
/// # Errors
/// The mark stays.
pub fn remove_mark(folder: &Path) -> Result<()> {
    gone(fs::remove_file(folder.join(MARK)))
        .map_err(|error| Error::io("finish the machine in", folder, &error))
}

/// Removes a folder with everything in it, if it exists.
///
/// # Errors
/// A file cannot be removed.
pub fn remove_folder(folder: &Path) -> Result<()> {
    gone(fs::remove_dir_all(folder)).map_err(|error| Error::io("remove", folder, &error))
}

fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Has the folder, the files in it and its name survive a loss of power.
///
/// # Errors
/// A file cannot be written.
pub fn sync(folder: &Path) -> Result<()> {
    let synced = || -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                File::open(entry.path())?.sync_all()?;
            }
        }
        File::open(folder)?.sync_all()
    };
    synced().map_err(|error| Error::io("write", folder, &error))?;
    sync_name(folder)
}

/// Has the name of a folder survive a loss of power.
///
/// # Errors
/// The folder around it cannot be written.
pub fn sync_name(folder: &Path) -> Result<()> {
    let around = folder.parent().unwrap_or(folder);
    File::open(around)
        .and_then(|around| around.sync_all())
        .map_err(|error| Error::io("write", around, &error))
}

/// Expects that the file system of a folder has space for that many bytes, besides the reserve.
///
/// # Errors
/// It has not.
pub fn expect_space(config: &Config, folder: &Path, bytes: u64) -> Result<()> {
    let (free, reserve) = space(config, folder)?;
    if free.saturating_sub(reserve) >= bytes {
        return Ok(());
    }
    let [bytes, free, reserve] = [bytes, free, reserve].map(format_bytes);
    let place = folder.display();
    Err(Error::environment(format!(
        "{bytes} do not fit on the file system of {place}: {free} are free, and {reserve} have to stay free \
         (free_space_reserve)"
    ))
    .advice("Free some space there, or name another folder"))
}

/// Returns the bytes that the file system of a folder has besides the reserve.
///
/// # Errors
/// The file system cannot be looked at.
pub fn free_space(config: &Config, folder: &Path) -> Result<u64> {
    space(config, folder).map(|(free, reserve)| free.saturating_sub(reserve))
}

/// Returns the free bytes of the folder's file system, and the reserve.
fn space(config: &Config, folder: &Path) -> Result<(u64, u64)> {
    let system = statvfs(folder).map_err(|error| Error::io("look at", folder, &error.into()))?;
    let in_bytes = |blocks: u64| blocks.saturating_mul(system.f_frsize);
    Ok((in_bytes(system.f_bavail), config.free_space_reserve.on(in_bytes(system.f_blocks))))
}

/// Expects that no other user can replace a new folder in this one, which may not exist yet. In root's sticky folder, such
/// as /tmp, only the owner of a folder can.
///
/// # Errors
/// Another user could replace it.
pub fn expect_kept(folder: &Path) -> Result<()> {
    const STICKY: u32 = 0o1000;
    let failed = |error: io::Error| Error::io("look at", folder, &error);
    let whole = std::path::absolute(folder).map_err(failed)?;
    let existing = whole.ancestors().find(|folder| folder.exists()).unwrap_or(&whole);
    let existing = fs::canonicalize(existing).map_err(failed)?;
    let found = existing.metadata().map_err(failed)?;
    let is_shared = found.mode() & STICKY != 0 && found.uid() == 0;
    let checked = existing.parent().filter(|_| is_shared).unwrap_or(&existing);
    expect_trusted(checked).map(drop).map_err(|error| {
        error.advice("Name a folder that only this user can change, or correct the owners and modes")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::symlink;

    #[test]
    fn folder_is_refused_where_other_users_can_write_and_not_in_a_sticky_one() {
        let root = tempfile::tempdir().unwrap();
        let (shared, link) = (root.path().join("shared"), root.path().join("link"));
        fs::create_dir(&shared).unwrap();
        symlink(&shared, &link).unwrap();
        for (mode, is_kept) in [(0o777, false), (0o755, true)] {
            fs::set_permissions(&shared, Permissions::from_mode(mode)).unwrap();
            for path in [&shared, &shared.join("new"), &link, &link.join("new")] {
                assert_eq!(expect_kept(path).is_ok(), is_kept, "{}", path.display());
            }
        }
        // Nobody else can replace a folder in a sticky one.
        let missing = format!("{}-missing/new", root.path().file_name().unwrap().display());
        expect_kept(&Path::new("/tmp").join(missing)).unwrap();
    }

    #[test]
    fn mark_is_not_written_through_a_link() {
        let root = tempfile::tempdir().unwrap();
        let other = root.path().join("other");
        symlink(&other, root.path().join(MARK)).unwrap();
        assert!(set_mark(root.path()).is_err() && !other.exists());
        fs::remove_file(root.path().join(MARK)).unwrap();
        set_mark(root.path()).unwrap();
        set_mark(root.path()).unwrap();
        assert!(root.path().join(MARK).exists());
    }
}
