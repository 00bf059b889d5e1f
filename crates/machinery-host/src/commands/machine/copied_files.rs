//! The files of a machine that is the copy of a domain at its snapshot: its disks, its memory, and the files that its
//! arguments name.
//!
//! The files of the domain are only read, and have to stay as they are meanwhile.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use machinery_images::{FileId, Header, SnapshotMemory, is_at_snapshot};

use super::base::identify;
use super::context::Context;
use super::flatten::{files_of_disk, flatten, overlay, used};
use super::folder::{FILE_MODE, copy_files};
use super::info::{CopiedFrom, MEMORY};
use crate::commands::import::{Disks, DomainForQemu};
use crate::commands::shell_word;

/// The level of the compression, which is faster than most disks.
const LEVEL: i32 = 1;

/// The files of a domain.
pub struct Files {
    /// For each image that the guest writes to, the files that it consists of.
    chains: Vec<Vec<PathBuf>>,
    /// The identities of all these files.
    pub identities: Vec<FileId>,
    disks: Disks,
}

impl Files {
    /// Looks at the files of the domain.
    ///
    /// # Errors
    /// A file is missing or breaks a rule, or a disk that gets an overlay is not at the snapshot.
    pub fn of(domain: &DomainForQemu, disks: Disks) -> Result<Files> {
        let chains = domain.images.iter().map(|(image, _)| files_of_disk(&image.path));
        let chains: Vec<Vec<PathBuf>> = chains.collect::<Result<_>>()?;
        for (image, _) in domain.images.iter().filter(|_| disks == Disks::Overlay) {
            if !is_at_snapshot(&image.path, &domain.snapshot)? {
                let path = image.path.display();
                let reason = format!("{path} has changes after the snapshot '{}'", domain.snapshot);
                let (label, snapshot) = (shell_word(&domain.label), shell_word(&domain.snapshot));
                return Err(Error::configuration(reason).advice(format!(
                    "Run `virsh snapshot-revert {label} {snapshot} --paused` and `virsh destroy {label}`, or leave out \
                     --disks overlay"
                )));
            }
        }
        Ok(Files { identities: identities(domain)?, chains, disks })
    }

    /// Returns the bytes that the machine's files need at most.
    pub fn bytes(&self, domain: &DomainForQemu) -> Result<u64> {
        let disks = if self.disks == Disks::Copy { used(self.chains.iter().flatten()) } else { 0 };
        Ok(disks + used(domain.files.iter().map(|(path, _)| path)) + memory(domain)?.size())
    }

    /// Writes the files into the folder of the machine.
    ///
    /// # Errors
    /// A file cannot be read or written, or a file of the domain has changed.
    pub fn write(&self, context: &Context<'_>, domain: &DomainForQemu, folder: &Path) -> Result<()> {
        (context.step)("copying the disks");
        for ((image, name), chain) in domain.images.iter().zip(&self.chains) {
            let to = folder.join(name);
            match self.disks {
                Disks::Copy => flatten(context, chain.clone(), Some(&domain.snapshot), &to)?,
                Disks::Overlay => {
                    let size = Header::read(&image.path)?.map_or(0, |header| header.size);
                    overlay(context, chain.clone(), size, &to)?;
                }
            }
            fs::set_permissions(&to, fs::Permissions::from_mode(FILE_MODE))
                .map_err(|error| Error::io("write", &to, &error))?;
        }
        copy_files(&domain.files, folder)?;
        (context.step)("copying the memory");
        let to = folder.join(MEMORY);
        compress(memory(domain)?, &to).map_err(|error| Error::io("write", &to, &error))?;
        if identities(domain)? != self.identities {
            return Err(Error::environment("the disks of its domain have changed meanwhile")
                .advice("Repeat the command while the domain is off"));
        }
        Ok(())
    }
}

/// Returns the identities of the files of the domain's images.
fn identities(domain: &DomainForQemu) -> Result<Vec<FileId>> {
    let all = domain.images.iter().map(|(image, _)| identify(&image.path));
    all.collect::<Result<Vec<_>>>().map(|all| all.into_iter().flatten().collect())
}

/// Returns the domain and its snapshot, as the description of the machine has them.
///
/// # Errors
/// The image with the snapshot cannot be read.
pub fn origin(domain: &DomainForQemu) -> Result<CopiedFrom> {
    let header = Header::read(&domain.memory)?;
    let snapshot = header.as_ref().and_then(|header| header.snapshot(&domain.snapshot));
    Ok(CopiedFrom {
        label: domain.label.clone(),
        uuid: domain.uuid.clone(),
        snapshot: domain.snapshot.clone(),
        taken: snapshot.map_or(0, |snapshot| snapshot.taken),
    })
}

fn memory(domain: &DomainForQemu) -> Result<SnapshotMemory> {
    SnapshotMemory::open(&domain.memory, &domain.snapshot)?.ok_or_else(|| {
        Error::environment(format!("{} has lost the snapshot '{}'", domain.memory.display(), domain.snapshot))
    })
}

fn compress(mut memory: SnapshotMemory, to: &Path) -> io::Result<()> {
    let file = File::create_new(to)?;
    file.set_permissions(fs::Permissions::from_mode(FILE_MODE))?;
    let mut encoder = zstd::Encoder::new(BufWriter::new(file), LEVEL)?;
    encoder.include_checksum(true)?;
    io::copy(&mut memory, &mut encoder)?;
    encoder.finish()?.into_inner()?.sync_all()
}
