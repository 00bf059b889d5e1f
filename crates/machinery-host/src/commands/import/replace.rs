//! Replaces a file as a whole: a reader sees the old text or the new one, even after a power failure.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;

use machinery::{Error, Result};

/// Replaces the content of `path`. The mode and the owner of the file stay, and a symbolic link stays a link.
pub fn replace(path: &Path, text: &str) -> Result<()> {
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
