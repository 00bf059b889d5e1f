//! Replacing a file as a whole: whoever reads it sees the old text or the new one, also after the
//! power has failed.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;

use machinery::{Error, Result};

/// Writes `text` to `path`, with the mode and owner of the file that was there. A symbolic link
/// stays one.
pub fn replace(path: &Path, text: &str) -> Result<()> {
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
    write(folder.unwrap_or(Path::new(".")), &target, text).map_err(|error| Error::io("write", path, &error))
}

fn write(folder: &Path, target: &Path, text: &str) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    // In the same folder, because a rename cannot cross file systems. It deletes itself on failure.
    let mut new = tempfile::Builder::new()
        .prefix(".import-")
        .permissions(Permissions::from_mode(0o644))
        .tempfile_in(folder)?;
    new.write_all(text.as_bytes())?;
    if let Ok(old) = fs::metadata(target) {
        liken(new.as_file(), &old)?;
    }
    new.as_file().sync_all()?;
    new.persist(target).map_err(|failed| failed.error)?;
    // The new name is on disk only once its folder is.
    File::open(folder)?.sync_all()
}

/// Gives a file another's owner and mode. An import by root must not take the file from Cuckoo.
fn liken(file: &File, old: &fs::Metadata) -> io::Result<()> {
    let new = file.metadata()?;
    if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
        fchown(file, Some(old.uid()), Some(old.gid()))?;
    }
    file.set_permissions(old.permissions())
}
