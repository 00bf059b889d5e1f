//! `machine export`: writes a machine into a single file.
//!
//! The disk in the file is whole: it has the content of all disks on which it depends.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;
use machinery::{Error, Result};
use serde::Serialize;

use super::archive;
use super::context::{Context, KVM};
use super::flatten::{files_of_disk, flatten, used};
use super::folder::expect_space;
use super::import_archive::expect_importable;
use super::info::{DISK, Description, INFO, Info, MEMORY, files_of};
use super::make::other_files;
use super::unfinished::Unfinished;

/// The machine to export.
#[derive(Debug, Clone, Args)]
pub struct Export {
    /// Name of the machine, which `machine create` has made
    pub name: String,
    /// File to write, which must not exist
    pub file: PathBuf,
}

/// A machine that was exported.
#[derive(Debug, Serialize)]
pub struct Exported {
    pub machine: String,
    pub file: PathBuf,
    /// The size of the file.
    pub bytes: u64,
}

/// Exports the machine.
///
/// # Errors
/// Another tool has made the machine, a file cannot be read, or the file cannot be written. Then there is no file.
pub fn export(context: &Context<'_>, export: &Export) -> Result<Exported> {
    if context.machinery == KVM {
        return Err(Error::unsupported("exporting a machine of libvirt, whose snapshot is in its domain")
            .machine(&export.name)
            .advice(
                "Copy the installed disk to the other host, and run `machine create --machinery kvm` there",
            ));
    }
    let files = files_of(context.cwd, &export.name)?;
    let folder = files[files.len() - 1].parent().unwrap_or(Path::new("/"));
    let info = Info::read(folder).map_err(|error| error.machine(&export.name))?;
    expect_importable(&info).map_err(|error| error.machine(&export.name))?;
    let failed = |error: io::Error| Error::io("write", &export.file, &error);
    let target = std::path::absolute(&export.file).map_err(failed)?;
    if target.exists() {
        return Err(
            failed(io::ErrorKind::AlreadyExists.into()).advice("Name another file, or remove this one")
        );
    }
    let beside = std::fs::canonicalize(target.parent().unwrap_or(Path::new("/")))
        .map_err(|error| failed(error).advice("Make the file's folder first"))?;
    let target = beside.join(target.file_name().unwrap_or_default());
    let disk = files_of_disk(&folder.join(DISK)).map_err(|error| error.machine(&export.name))?;
    expect_space(context.config, &beside, used(&disk) + used(&[folder.join(MEMORY)]))
        .map_err(|error| error.machine(&export.name))?;
    // Beside the file, because the disk may be larger than other file systems.
    let unfinished =
        Unfinished::begin(context.cwd, &export.name, &beside.join(format!(".{}.export", export.name)))?;
    let written = write(context, folder, info, disk, unfinished.machine_folder(), &target);
    match (written, unfinished.clear(context)) {
        (Ok(bytes), Ok(())) => Ok(Exported { machine: export.name.clone(), file: target, bytes }),
        (Err(error), _) | (Ok(_), Err(error)) => Err(error.machine(&export.name)),
    }
}

/// Writes the archive of the machine in that folder, whose disk is in these files. Returns the size of the archive.
fn write(
    context: &Context<'_>,
    folder: &Path,
    info: Info,
    files_of_disk: Vec<PathBuf>,
    scratch: &Path,
    target: &Path,
) -> Result<u64> {
    let failed = |error: io::Error| Error::io("write", target, &error);
    (context.step)("flattening the disk");
    let disk = scratch.join(DISK);
    flatten(context, files_of_disk, None, &disk)?;
    let whole = Info { machine: Description { base: None, base_files: Vec::new(), ..info.machine }, ..info };
    whole.write(scratch)?;
    let own = [(scratch.join(INFO), INFO), (disk, DISK), (folder.join(MEMORY), MEMORY)];
    let mut files: Vec<(PathBuf, String)> =
        own.into_iter().map(|(path, name)| (path, name.to_owned())).collect();
    files.extend(other_files(folder)?);
    warn_of_others(folder, &files);
    if let Some((path, _)) = files.iter().find(|(_, name)| !archive::is_plain(name)) {
        return Err(Error::configuration(format!("{} has a name that no archive can have", path.display()))
            .advice("Give the file a name of letters, digits, '.', '_', '+' and '-'"));
    }
    let file = tempfile::NamedTempFile::new_in(scratch).map_err(failed)?;
    archive::write(file.as_file(), &files, context.step)?;
    let bytes = file.as_file().metadata().map_err(failed)?.len();
    file.persist_noclobber(target).map_err(|error| failed(error.error))?;
    File::open(target.parent().unwrap_or(Path::new("/")))
        .and_then(|folder| folder.sync_all())
        .map_err(failed)?;
    Ok(bytes)
}

/// Logs what the archive leaves out.
fn warn_of_others(folder: &Path, files: &[(PathBuf, String)]) {
    let names = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    for name in names.filter(|name| files.iter().all(|(_, own)| name.as_os_str() != own.as_str())) {
        tracing::warn!(name = %name.display(), "is not part of the machine: the archive leaves it out");
    }
}
