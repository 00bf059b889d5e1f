//! The files of a machine that is the copy of a domain at its snapshot: its disks, its memory, and the files that its
//! arguments name.
//!
//! The files of the domain are only read, and have to stay as they are meanwhile.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use machinery_images::{FileId, Header, SnapshotMemory, is_at_snapshot};

use super::base::identify;
use super::context::Context;
use super::flatten::{files_of_disk, flatten, overlay, used};
use super::folder::{FILE_MODE, SECRET_MODE, copy_files, free_space, open_regular};
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
        domain.files.iter().try_for_each(|(path, _)| expect_whole_file(path))?;
        Ok(Files { identities: identities(domain)?, chains, disks })
    }

    /// Returns the bytes that the machine's files need at most.
    pub fn bytes(&self, domain: &DomainForQemu) -> Result<u64> {
        let disks = if self.disks == Disks::Copy { used(self.chains.iter().flatten()) } else { 0 };
        // A copy of such a file has no holes.
        let lengths = domain.files.iter().map(|(path, _)| path.metadata().map_or(0, |found| found.len()));
        Ok(lengths.chain([memory(domain)?.size()]).fold(disks, u64::saturating_add))
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
        let space = free_space(context.config, folder)?;
        compress(memory(domain)?, &to, space).map_err(|error| Error::io("write", &to, &error))?;
        if identities(domain)? != self.identities {
            return Err(Error::environment("the disks of its domain have changed meanwhile")
                .advice("Repeat the command while the domain is off"));
        }
        Ok(())
    }
}

/// Expects that the machine can have a copy of a file: of a medium or of the firmware, which the guest only reads.
fn expect_whole_file(path: &Path) -> Result<()> {
    open_regular(path).map_err(|error| Error::io("read", path, &error))?;
    let header = Header::read(path)?;
    if header.is_some_and(|header| header.backing.is_some() || header.data_file.is_some()) {
        let reason = format!("{} depends on another file, and a copy would not", path.display());
        return Err(Error::configuration(reason).advice(
            "Give the domain a medium that is whole (qemu-img convert), and take a new snapshot, or leave the domain out",
        ));
    }
    Ok(())
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

/// Compresses the memory into a new file, which gets at most that many bytes.
fn compress(mut memory: impl Read, to: &Path, space: u64) -> io::Result<()> {
    let file = File::options().write(true).create_new(true).mode(SECRET_MODE).open(to)?;
    let mut encoder = zstd::Encoder::new(BufWriter::new(Limited { file, space }), LEVEL)?;
    encoder.include_checksum(true)?;
    io::copy(&mut memory, &mut encoder)?;
    encoder.finish()?.into_inner()?.file.sync_all()
}

/// A file that gets no more bytes than the file system has to spare.
struct Limited {
    file: File,
    space: u64,
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.space = self.space.checked_sub(bytes.len() as u64).ok_or(io::ErrorKind::StorageFull)?;
        self.file.write_all(bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn memory_is_private_and_does_not_fill_the_file_system() {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join(MEMORY);
        compress(io::repeat(7).take(1 << 20), &to, 1 << 20).unwrap();
        assert_eq!(to.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(zstd::decode_all(File::open(&to).unwrap()).unwrap(), vec![7; 1 << 20]);
        fs::remove_file(&to).unwrap();
        let full = compress(io::repeat(7).take(1 << 20), &to, 8).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        assert!(to.metadata().unwrap().len() <= 8);
    }

    #[test]
    fn medium_is_refused_when_it_depends_on_another_file_or_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("raw"), "raw").unwrap();
        let make = |name: &str, options: &[&str]| {
            let mut make = Command::new("qemu-img");
            make.args(["create", "-q", "-f", "qcow2"]).args(options).arg(name).arg("1M");
            assert!(make.current_dir(folder.path()).status().unwrap().success());
        };
        make("whole", &[]);
        make("above", &["-F", "raw", "-b", "raw"]);
        make("elsewhere", &["-o", "data_file=data"]);
        rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), 0o600.into()).unwrap();
        ["raw", "whole"].iter().for_each(|name| expect_whole_file(&at(name)).unwrap());
        for name in ["above", "elsewhere"] {
            let refused = expect_whole_file(&at(name)).unwrap_err().to_string();
            assert!(refused.contains(name) && refused.contains("depends on another file"), "{refused}");
        }
        assert!(expect_whole_file(&at("pipe")).unwrap_err().to_string().contains("no regular file"));
    }
}
