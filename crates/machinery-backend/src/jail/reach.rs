//! The files that the user of a machine can reach, by their modes and those of their folders.
//!
//! The files of a machine belong to the operator, so nobody changes their modes. A user who cannot reach them does not
//! get the machine. Access control lists are not looked at.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use machinery_jail::User;

const READ: u32 = 0o4;
const WRITE: u32 = 0o2;
const SEARCH: u32 = 0o1;

/// Expects that the user can read the file.
///
/// # Errors
/// The reason why not.
pub fn expect_readable(path: &Path, user: &User) -> Result<(), String> {
    expect_reachable(path)?;
    let Ok(found) = fs::metadata(path) else { return Ok(()) };
    let wanted = if found.is_dir() { READ | SEARCH } else { READ };
    if is_allowed(&found, wanted) || allows_group(&found, wanted, user) {
        return Ok(());
    }
    Err(format!("{} is not readable for other users (chmod o+r)", path.display()))
}

/// Expects that the user can search each folder above the path, also above the file that a link leads to.
///
/// # Errors
/// The reason why not.
pub fn expect_reachable(path: &Path) -> Result<(), String> {
    // Paths of a process's own descriptors need no folder.
    if path.starts_with("/proc/self/fd") {
        return Ok(());
    }
    let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    for folder in path.ancestors().skip(1).chain(real.ancestors().skip(1)) {
        if fs::metadata(folder).is_ok_and(|found| !is_allowed(&found, SEARCH)) {
            return Err(format!("the folder {} is closed to other users (chmod o+x)", folder.display()));
        }
    }
    Ok(())
}

/// Expects that the user can use the device.
///
/// # Errors
/// The reason why not.
pub fn expect_usable(device: &Path, user: &User) -> Result<(), String> {
    expect_reachable(device)?;
    let Ok(found) = fs::metadata(device) else { return Ok(()) };
    let wanted = if found.is_dir() { READ | SEARCH } else { READ | WRITE };
    if is_allowed(&found, wanted) || allows_group(&found, wanted, user) {
        return Ok(());
    }
    Err(format!("{} can be used by its owner only (give it a group, and chmod g+rw)", device.display()))
}

/// Expects that the user can make files in the folder.
///
/// # Errors
/// The reason why not.
pub fn expect_writable(folder: &Path) -> Result<(), String> {
    expect_reachable(folder)?;
    match fs::metadata(folder) {
        Ok(found) if !is_allowed(&found, WRITE | SEARCH) => Err(format!(
            "its start_args make a socket in {}, where other users may make none",
            folder.display()
        )),
        _ => Ok(()),
    }
}

fn is_allowed(found: &Metadata, wanted: u32) -> bool {
    found.mode() & wanted == wanted
}

fn allows_group(found: &Metadata, wanted: u32, user: &User) -> bool {
    let is_member = found.gid() == user.gid || user.groups.contains(&found.gid());
    is_member && found.mode() >> 3 & wanted == wanted
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn file_is_unreachable_when_it_or_a_folder_above_it_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let set = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        let file = folder.path().join("disk");
        fs::write(&file, "").unwrap();
        set(&file, 0o644);
        set(folder.path(), 0o700);
        let user = User { uid: 7, gid: 7, groups: Vec::new() };
        let why = |path: &Path| expect_readable(path, &user).err().unwrap_or_default();
        assert!(why(&file).contains("chmod o+x"), "{}", why(&file));
        set(folder.path(), 0o711);
        assert_eq!(why(&file), "");
        set(&file, 0o640);
        assert!(why(&file).contains("chmod o+r"), "{}", why(&file));
        let (open, link) = (tempfile::tempdir().unwrap(), "link");
        set(open.path(), 0o755);
        symlink(&file, open.path().join(link)).unwrap();
        set(&file, 0o644);
        set(folder.path(), 0o700);
        assert!(why(&open.path().join(link)).contains("chmod o+x"));
    }
}
