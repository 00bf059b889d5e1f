//! The names of a template's files, and the removal of a template.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use machinery::{Error, Result};
use machinery_backend::remove_overlays;

pub const RAM: &str = "ram";
pub const DEVICES: &str = "devices";
pub const RECORD: &str = "record.json";
/// The first overlay of a template that is being built.
pub const DISK: &str = "disk";
/// All files that a template's folder may contain, besides overlays. The record is removed first, because
/// without it the other files are no template.
const FILES: [&str; 3] = [RECORD, RAM, DEVICES];

/// The mode of the folders of templates. The machine's own user reaches its overlay there, and each file has a mode of its
/// own.
pub const FOLDER_MODE: u32 = 0o711;

/// The suffix of a complete template's folder.
pub const COMPLETE: &str = ".template";
/// The suffix of the folder of a template that is being built.
pub const UNFINISHED: &str = ".unfinished";

/// Removes a template's folder. A folder that contains other files stays.
///
/// # Errors
/// The folder stays.
pub fn remove(folder: &Path) -> Result<()> {
    let removed = FILES.iter().try_for_each(|name| fs::remove_file(folder.join(name)).or_else(ignore_absent));
    remove_overlays(&folder.join(DISK))?;
    let removed = removed.and_then(|()| fs::remove_dir(folder).or_else(ignore_absent));
    removed.map_err(|error| Error::io("remove the template", folder, &error))
}

fn ignore_absent(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// Returns the disk space of a template, in bytes, without the holes of its files.
pub fn size_on_disk(folder: &Path) -> u64 {
    let size = |name: &str| fs::metadata(folder.join(name)).map_or(0, |file| file.blocks() * 512);
    size(RAM) + size(DEVICES)
}

/// Returns the checksum of a whole file, which is at its beginning before and afterwards.
pub fn checksum(file: &mut File) -> io::Result<u32> {
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    file.rewind()?;
    Ok(crc32fast::hash(&content))
}
