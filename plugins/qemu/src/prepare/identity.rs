//! The identity of a machine: everything that a template or a standby was made from.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use machinery_images::FileId;
use serde::{Deserialize, Serialize};

use crate::config::MachineFiles;
use crate::version::{Program, Version};

/// Everything that a restored guest depends on. If any of it has changed, templates and standbys are stale.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    snapshot: FileId,
    disk: FileId,
    program: FileId,
    version: String,
    args: Vec<String>,
    /// The disk's bases, all files that the arguments name, and the bases of these; `None` for a file that
    /// does not exist.
    files: BTreeMap<PathBuf, Option<FileId>>,
}

impl Identity {
    /// Returns the identity of the machine by its files as they are now. Reads headers of images, and starts
    /// no process.
    ///
    /// # Errors
    /// The metadata of the snapshot, of an image, or of a file in an image's backing chain cannot be read.
    pub fn of(files: &MachineFiles, program: &Program) -> Result<Identity> {
        let id = |what: &str, path| {
            FileId::of(path)
                .map_err(|error| Error::io(&format!("look at the machine's {what},"), path, &error))
        };
        let (version, program) = program.current()?;
        Ok(Identity {
            snapshot: id("snapshot", &files.snapshot)?,
            disk: id("disk", &files.disk)?,
            program,
            version: version.to_string(),
            args: files.start_args.unchanged().to_vec(),
            files: opened(files)?,
        })
    }

    /// Reports whether this is still the identity of the machine. Looks only at the files that it names, because the others
    /// follow from their content and from the arguments.
    pub fn is_current(&self, files: &MachineFiles, program: &Program) -> bool {
        let is_same_program =
            |(version, id): (Version, FileId)| version.to_string() == self.version && id == self.program;
        self.args == files.start_args.unchanged()
            && [&self.snapshot, &self.disk].into_iter().all(FileId::is_unchanged)
            && self.files.iter().all(|(path, then)| id(path) == *then)
            && program.current().is_ok_and(is_same_program)
    }

    /// Describes the first change, for people; none if the identities are the same.
    pub fn change_since(&self, earlier: &Identity) -> Option<String> {
        let (now, then) = (self, earlier);
        let change = if now.version != then.version {
            format!("QEMU was {}, and is {}", then.version, now.version)
        } else if now.program != then.program {
            "QEMU's program was replaced".to_owned()
        } else if now.snapshot != then.snapshot {
            "the machine's snapshot was changed".to_owned()
        } else if now.disk != then.disk {
            "the machine's disk was changed".to_owned()
        } else if now.args != then.args {
            "the machine's start_args were changed".to_owned()
        } else {
            return self.file_changed_since(then).map(|path| format!("{} was changed", path.display()));
        };
        Some(change)
    }

    fn file_changed_since<'a>(&'a self, then: &'a Identity) -> Option<&'a Path> {
        let changed = self.files.iter().find(|(path, file)| then.files.get(*path) != Some(file));
        let gone = || then.files.keys().find(|path| !self.files.contains_key(*path));
        changed.map(|(path, _)| path).or_else(gone).map(PathBuf::as_path)
    }

    /// The size of the snapshot's file, in bytes.
    pub fn snapshot_size(&self) -> u64 {
        self.snapshot.size()
    }
}

/// Returns all files that the machine's images and arguments name, down to the last base of each.
fn opened(machine: &MachineFiles) -> Result<BTreeMap<PathBuf, Option<FileId>>> {
    Ok(machine.chain()?.into_iter().map(|path| (path.clone(), id(&path))).collect())
}

/// Returns a file's identity; `None` for a folder or a device, whose identity does not reveal a change of
/// content.
fn id(path: &Path) -> Option<FileId> {
    fs::metadata(path).ok().filter(fs::Metadata::is_file).and_then(|_| FileId::of(path).ok())
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::config::tests::machine_in;
    use crate::machineinfo::StartArgs;
    use std::os::unix::fs::PermissionsExt;

    /// Creates an identity of files in that folder.
    pub fn identity(folder: &Path) -> Identity {
        let id = |name: &str| {
            let path = folder.join(name);
            fs::write(&path, name).unwrap();
            FileId::of(&path).unwrap()
        };
        Identity {
            snapshot: id("snapshot"),
            disk: id("disk"),
            program: id("program"),
            version: "7.2.0".into(),
            args: vec!["-m".into(), "32".into()],
            files: ["base", "iso"].map(|name| (folder.join(name), super::id(&folder.join(name)))).into(),
        }
    }

    /// Returns the identity with the snapshot as it is now.
    pub fn identity_again(folder: &Path, identity: &Identity) -> Identity {
        Identity { snapshot: FileId::of(&folder.join("snapshot")).unwrap(), ..identity.clone() }
    }

    #[test]
    fn change_names_the_file_or_the_argument() {
        let folder = tempfile::tempdir().unwrap();
        let then = identity(folder.path());
        assert_eq!(then.change_since(&then), None);
        let other = |name: &str| FileId::of(&folder.path().join(name)).unwrap();
        let change = |now: Identity| now.change_since(&then).unwrap();
        assert!(
            change(Identity { version: "10.0.2".into(), ..then.clone() })
                .contains("was 7.2.0, and is 10.0.2")
        );
        assert!(change(Identity { program: other("disk"), ..then.clone() }).contains("program"));
        assert!(change(Identity { snapshot: other("disk"), ..then.clone() }).contains("snapshot"));
        assert!(change(Identity { disk: other("snapshot"), ..then.clone() }).contains("disk"));
        assert!(
            change(Identity { args: vec!["-m".into(), "64".into()], ..then.clone() }).contains("start_args")
        );
        let iso = folder.path().join("iso");
        fs::write(&iso, "new").unwrap();
        let mut now = then.clone();
        now.files.insert(iso.clone(), super::id(&iso));
        assert!(change(now.clone()).contains("/iso was changed"));
        now.files = BTreeMap::new();
        assert!(change(now).contains("/base was changed"));
    }

    #[test]
    fn identity_of_a_machine_has_its_files_and_the_program_with_its_version() {
        let folder = tempfile::tempdir().unwrap();
        let machine = machine_in(folder.path());
        let path = |name: &str| folder.path().join(name);
        let replace_program = |version: &str| {
            let script = format!("#!/bin/sh\necho QEMU emulator version {version}\n");
            fs::write(path("new"), script).unwrap();
            fs::set_permissions(path("new"), fs::Permissions::from_mode(0o755)).unwrap();
            fs::rename(path("new"), path("qemu")).unwrap();
        };
        replace_program("8.2.0");
        let program = Program::new(&path("qemu"), Version::new(8, 2, 0)).unwrap();
        let now = || Identity::of(&machine, &program).unwrap();
        let then = now();
        assert_eq!((now().change_since(&then), then.snapshot_size()), (None, 4));
        let disk = FileId::of(&path("disk.qcow2")).unwrap();
        assert_eq!(then.files, [(path("disk.qcow2"), Some(disk))].into());
        assert_eq!(then.args, machine.start_args.unchanged());
        assert!(then.is_current(&machine, &program));
        let other = StartArgs::in_folder(["-m", "64"].map(str::to_owned), folder.path());
        assert!(!then.is_current(&MachineFiles { start_args: other, ..machine.clone() }, &program));
        fs::write(path("snapshot"), "QEVM again").unwrap();
        assert!(!then.is_current(&machine, &program));
        assert_eq!(now().change_since(&then).unwrap(), "the machine's snapshot was changed");
        replace_program("8.2.1");
        assert_eq!(now().change_since(&then).unwrap(), "QEMU was 8.2.0, and is 8.2.1");
        let then = now();
        fs::write(path("disk.qcow2"), fs::read(path("disk.qcow2")).unwrap()).unwrap();
        assert!(!then.is_current(&machine, &program));
        let then = now();
        replace_program("8.2.2");
        assert!(now().is_current(&machine, &program) && !then.is_current(&machine, &program));
        fs::remove_file(path("snapshot")).unwrap();
        let error = Identity::of(&machine, &program).unwrap_err().to_string();
        assert!(error.contains("look at the machine's snapshot"), "{error}");
    }

    #[test]
    fn file_has_an_identity_unless_it_is_a_folder_or_a_device() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(super::id(folder.path()), None);
        assert_eq!(super::id(Path::new("/dev/null")), None);
        assert_eq!(super::id(&folder.path().join("none")), None);
        let file = folder.path().join("file");
        fs::write(&file, "x").unwrap();
        assert_eq!(super::id(&file), FileId::of(&file).ok());
    }
}
