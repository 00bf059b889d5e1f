//! The file of an exported machine: a tar archive, compressed with zstd, whose first entry has the sums of all others.
//!
//! ```text
//! manifest.json       {"format": 1, "files": [{"name": …, "size": …, "sha256": …}, …]}
//! machineinfo.json, disk.qcow2, memory.zst, further files, in the order of the manifest
//! ```
//!
//! An archive may come from anywhere. A reader accepts plain files with plain names only, in exactly that order.

use std::collections::HashSet;
use std::fs::{File, Permissions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tar::{Builder, Entry, EntryType, Header};

use super::folder::{FILE_MODE, SECRET_MODE};
use super::info::{DISK, INFO, Info, MEMORY};

const MANIFEST: &str = "manifest.json";
const FORMAT: u32 = 1;
/// The largest sizes of the manifest and of the description, in bytes.
const MAX_TEXT: u64 = 1 << 20;
const MAX_FILES: usize = 64;
const LEVEL: i32 = 3;
const CHUNK: usize = 1 << 20;

/// The first entry of an archive.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: u32,
    pub files: Vec<Listed>,
}

/// A file of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listed {
    pub name: String,
    size: u64,
    sha256: String,
}

/// Writes these files, each with its name in the archive.
///
/// # Errors
/// A file cannot be read, or the archive cannot be written.
pub fn write(archive: &File, files: &[(PathBuf, String)], step: &dyn Fn(&str)) -> Result<()> {
    let mut listed = Vec::new();
    for (path, name) in files {
        step(&format!("reading {name}"));
        let file = File::open(path).map_err(|error| Error::io("read", path, &error))?;
        let (size, sha256) = copy(file, &mut io::sink()).map_err(|error| Error::io("read", path, &error))?;
        listed.push(Listed { name: name.clone(), size, sha256 });
    }
    let manifest =
        serde_json::to_vec_pretty(&Manifest { format: FORMAT, files: listed.clone() }).unwrap_or_default();
    let failed = |error: io::Error| Error::environment(format!("cannot write the archive: {error}"));
    let mut encoder = zstd::Encoder::new(archive, LEVEL).map_err(failed)?;
    encoder.include_checksum(true).map_err(failed)?;
    let mut builder = Builder::new(encoder);
    builder
        .append(&header(MANIFEST, manifest.len() as u64).map_err(failed)?, &manifest[..])
        .map_err(failed)?;
    for ((path, name), listed) in files.iter().zip(&listed) {
        step(&format!("writing {name}"));
        let file = File::open(path).map_err(|error| Error::io("read", path, &error))?;
        builder
            .append(&header(name, listed.size).map_err(failed)?, file.take(listed.size))
            .map_err(failed)?;
    }
    builder.into_inner().and_then(zstd::Encoder::finish).and_then(File::sync_all).map_err(failed)
}

fn header(name: &str, size: u64) -> io::Result<Header> {
    let mut header = Header::new_gnu();
    header.set_path(name)?;
    header.set_size(size);
    header.set_mode(0o644);
    header.set_entry_type(EntryType::Regular);
    header.set_cksum();
    Ok(header)
}

/// Reads the whole archive without writing anything, and returns the description of its machine, and the size of all files.
///
/// # Errors
/// The archive is damaged, or is not as an export writes it.
pub fn verify(path: &Path, step: &dyn Fn(&str)) -> Result<(Info, u64)> {
    let (mut description, mut bytes) = (Vec::new(), 0);
    read(path, step, |name, entry| {
        let read = if name == INFO { copy(entry, &mut description) } else { copy(entry, &mut io::sink()) };
        read.inspect(|(size, _)| bytes += size)
    })?;
    let text = String::from_utf8_lossy(&description);
    let info = Info::parse(&text).map_err(|why| refused(path, &format!("its {INFO} is wrong: {why}")))?;
    Ok((info, bytes))
}

/// Writes the files of the archive into the folder, and verifies them once more. Only this user reads the machine's memory,
/// and the state of its TPM.
///
/// # Errors
/// As [`verify`]; a file cannot be written.
pub fn extract(path: &Path, info: &Info, folder: &Path, step: &dyn Fn(&str)) -> Result<()> {
    read(path, step, |name, entry| {
        let mut file =
            File::options().write(true).create_new(true).mode(SECRET_MODE).open(folder.join(name))?;
        let copied = copy(entry, &mut file)?;
        let is_secret = name == MEMORY || info.machine.tpm_state.as_deref() == Some(name);
        let mode = if is_secret { SECRET_MODE } else { FILE_MODE };
        // Not that of the umask.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all().map(|()| copied)
    })
}

/// Reads the archive. `take` reads each file, and returns its size and its sum.
fn read(
    path: &Path,
    step: &dyn Fn(&str),
    mut take: impl FnMut(&str, &mut dyn Read) -> io::Result<(u64, String)>,
) -> Result<()> {
    let damaged = |error: io::Error| match error.kind() {
        io::ErrorKind::StorageFull => {
            Error::environment(format!("cannot unpack {}: {error}", path.display()))
        }
        _ => refused(path, &format!("it is damaged: {error}")),
    };
    let file = File::open(path).map_err(|error| Error::io("open", path, &error))?;
    let decoder = zstd::Decoder::with_buffer(BufReader::with_capacity(CHUNK, file)).map_err(damaged)?;
    let mut archive = tar::Archive::new(decoder);
    // Raw, because the long names and further headers of an archive would be read into memory.
    let mut entries = archive.entries().map_err(damaged)?.raw(true);
    let mut next = || entries.next().transpose().map_err(damaged);
    let Some(mut first) = next()? else { return Err(refused(path, "it is empty")) };
    expect_plain(&first, MANIFEST).map_err(|why| refused(path, &why))?;
    let mut text = Vec::new();
    (&mut first).take(MAX_TEXT).read_to_end(&mut text).map_err(damaged)?;
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|error| refused(path, &format!("its manifest is wrong: {error}")))?;
    manifest.expect_valid().map_err(|why| refused(path, &why))?;
    for listed in &manifest.files {
        step(&format!("reading {}", listed.name));
        let Some(mut entry) = next()? else {
            return Err(refused(path, &format!("it ends before {}", listed.name)));
        };
        expect_plain(&entry, &listed.name).map_err(|why| refused(path, &why))?;
        if entry.size() != listed.size {
            return Err(refused(path, &format!("{} does not have the size in the manifest", listed.name)));
        }
        let (size, sha256) = take(&listed.name, &mut entry).map_err(damaged)?;
        if (size, &sha256) != (listed.size, &listed.sha256) {
            return Err(refused(
                path,
                &format!("{} does not have the checksum in the manifest", listed.name),
            ));
        }
    }
    if next()?.is_some() {
        return Err(refused(path, "it has files that are not in the manifest"));
    }
    // The decoder verifies its own checksum at the end.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map(drop).map_err(damaged)
}

impl Manifest {
    fn expect_valid(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("its format is {}, and this program reads {FORMAT}", self.format));
        }
        let names: HashSet<&str> = self.files.iter().map(|file| file.name.as_str()).collect();
        if names.len() != self.files.len() || names.len() > MAX_FILES {
            return Err("its manifest names a file twice, or too many".to_owned());
        }
        if let Some(name) = names.iter().find(|name| !is_plain(name)) {
            return Err(format!("{name:?} is no plain name of a file"));
        }
        if let Some(missing) = [INFO, DISK, MEMORY].into_iter().find(|name| !names.contains(name)) {
            return Err(format!("it has no {missing}"));
        }
        let is_small = self.files.iter().all(|file| file.name != INFO || file.size <= MAX_TEXT);
        if is_small { Ok(()) } else { Err(format!("its {INFO} is too large")) }
    }
}

/// Reports whether the name is that of a file in a folder, and of nothing else.
pub fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-+".contains(c);
    !name.is_empty() && name.len() <= 100 && !name.starts_with('.') && name.chars().all(plain)
}

fn expect_plain<R: Read>(entry: &Entry<'_, R>, name: &str) -> Result<(), String> {
    if entry.header().entry_type() != EntryType::Regular || *entry.path_bytes() != *name.as_bytes() {
        let found = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        return Err(format!("it has {found:?} in the place of the file {name}"));
    }
    Ok(())
}

fn refused(path: &Path, why: &str) -> Error {
    Error::configuration(format!("{} is no exported machine: {why}", path.display()))
        .advice("Export the machine again, and copy the whole file")
}

/// Copies a file, and returns its size and its SHA-256.
fn copy(mut from: impl Read, to: &mut dyn Write) -> io::Result<(u64, String)> {
    let (mut hasher, mut size, mut chunk) = (Sha256::new(), 0, vec![0; CHUNK]);
    loop {
        match from.read(&mut chunk) {
            Ok(0) => break,
            Ok(length) => {
                hasher.update(&chunk[..length]);
                to.write_all(&chunk[..length])?;
                size += length as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let sum: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((size, sum))
}

#[cfg(test)]
mod tests;
