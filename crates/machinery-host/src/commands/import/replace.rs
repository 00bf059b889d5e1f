//! Replaces a file as a whole: a reader sees the old text or the new one, even after a power failure.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;

use machinery::{Error, Result};

/// Replaces the content of `path`, which was `before`. The mode and the owner of the file stay, and a symbolic link stays
/// a link.
///
/// # Errors
/// Another program has changed the file since it was read, or it cannot be written.
pub fn replace(path: &Path, before: &str, text: &str) -> Result<()> {
    let now = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        read => read.map_err(|error| Error::io("read", path, &error))?,
    };
    // An empty file is read as a missing one.
    if now.trim() != before.trim() {
        let reason = format!("another program has changed {} meanwhile", path.display());
        return Err(Error::environment(reason).advice("Repeat the command"));
    }
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
    write(folder.unwrap_or(Path::new(".")), &target, text).map_err(|error| Error::io("write", path, &error))
}

fn write(folder: &Path, target: &Path, text: &str) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    // In the same folder, because a rename cannot cross file systems. On failure it is deleted when dropped.
    let mut new = tempfile::Builder::new()
        .prefix(".import-")
        .permissions(Permissions::from_mode(0o644))
        .tempfile_in(folder)?;
    new.write_all(text.as_bytes())?;
    if let Ok(old) = fs::metadata(target) {
        copy_owner_and_mode(new.as_file(), &old)?;
    }
    new.as_file().sync_all()?;
    new.persist(target).map_err(|failed| failed.error)?;
    // The rename is on disk only after its folder has been synced.
    File::open(folder)?.sync_all()
}

/// Copies the owner and the mode of another file. After an import by root, Cuckoo must still own the file.
fn copy_owner_and_mode(file: &File, old: &fs::Metadata) -> io::Result<()> {
    let new = file.metadata()?;
    if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
        fchown(file, Some(old.uid()), Some(old.gid()))?;
    }
    file.set_permissions(old.permissions())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_is_not_replaced_when_it_was_changed_after_it_was_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qemu.yaml");
        replace(&path, "", "machines: {}\n").unwrap();
        let error = replace(&path, "", "late: 1\n").unwrap_err().to_string();
        assert!(error.contains("another program has changed"), "{error}");
        replace(&path, "machines: {}\n", "machines: {m: 1}\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "machines: {m: 1}\n");
    }
}
