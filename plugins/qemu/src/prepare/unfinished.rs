//! A template that is being built, until it is published by a rename.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::PathBuf;

use machinery::{Error, Result};
use machinery_images::FileId;

use super::identity::Identity;
use super::layout::{DEVICES, DISK, FOLDER_MODE, RAM, RECORD, checksum, remove};
use super::opener::Opener;
use super::store::{Record, Templates};

/// A template that is being built. Dropping the value removes the files, unless they were published.
pub struct Unfinished {
    folder: PathBuf,
    published_as: PathBuf,
}

impl Unfinished {
    /// Creates the folder for the machine's new template.
    ///
    /// # Errors
    /// The folder cannot be created.
    pub fn begin(templates: &Templates, machine: &str) -> Result<Unfinished> {
        let folder = templates.unfinished_folder(machine);
        remove(&folder)?;
        let made = fs::DirBuilder::new().mode(FOLDER_MODE).create(&folder);
        made.map_err(|error| Error::io("make the template's folder", &folder, &error))?;
        Ok(Unfinished { folder, published_as: templates.folder(machine) })
    }

    fn ram(&self) -> PathBuf {
        self.folder.join(RAM)
    }

    /// Creates the RAM file, which is empty.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create_ram(&self) -> Result<File> {
        let path = self.ram();
        File::create_new(&path).map_err(|error| Error::io("create the template's", &path, &error))
    }

    pub fn disk(&self) -> PathBuf {
        self.folder.join(DISK)
    }

    pub fn devices(&self) -> PathBuf {
        self.folder.join(DEVICES)
    }

    /// Publishes the template, so that it survives a crash of this computer.
    ///
    /// # Errors
    /// The files cannot be written to the disk.
    pub fn publish(self, identity: Identity, block: &str, opener: Opener) -> Result<()> {
        self.write_to_disk(identity, block, opener)
            .map_err(|error| Error::io("publish the template", &self.published_as, &error))
    }

    fn write_to_disk(&self, identity: Identity, block: &str, opener: Opener) -> io::Result<()> {
        let owner = if opener.writes { 0o600 } else { 0o400 };
        let mode = owner | opener.group.map_or(0, |_| opener.group_mode());
        if let Some(group) = opener.group {
            chown(self.ram(), None, Some(group))?;
        }
        // QEMU gets the devices as an open file.
        for (path, mode) in [(self.ram(), mode), (self.devices(), 0o400)] {
            fs::set_permissions(&path, Permissions::from_mode(mode))?;
            File::open(&path)?.sync_all()?;
        }
        // The identities have the paths after the rename, which changes nothing else of the files.
        let id = |name: &str| {
            let file = File::open(self.folder.join(name))?;
            FileId::of_open(&self.published_as.join(name), &file)
        };
        let record = Record {
            identity,
            block: block.to_owned(),
            ram: id(RAM)?,
            devices: id(DEVICES)?,
            devices_crc32: checksum(&mut File::open(self.devices())?)?,
        };
        let path = self.folder.join(RECORD);
        fs::write(&path, serde_json::to_vec(&record)?)?;
        File::open(&path)?.sync_all()?;
        fs::rename(&self.folder, &self.published_as)?;
        tracing::info!(path = %self.published_as.display(), "a template was built");
        match self.published_as.parent() {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // A published folder has another name by now.
        if let Err(error) = remove(&self.folder) {
            tracing::warn!(%error, "cannot remove an unfinished template");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prepare::identity;
    use machinery_testkit::trace;
    use std::path::Path;

    struct Made {
        folder: tempfile::TempDir,
        templates: Templates,
        identity: Identity,
    }

    impl Made {
        fn dir(&self) -> PathBuf {
            self.folder.path().join("templates")
        }
    }

    /// Publishes a template of machine `m`, of files that no QEMU has written.
    fn made() -> Made {
        let folder = tempfile::tempdir().unwrap();
        let identity = identity::tests::identity(folder.path());
        let templates = Templates::open(&folder.path().join("templates")).unwrap();
        let unfinished = Unfinished::begin(&templates, "m").unwrap();
        File::create(unfinished.ram()).unwrap().set_len(1 << 20).unwrap();
        fs::write(unfinished.devices(), "the devices").unwrap();
        unfinished.publish(identity.clone(), "pc.ram", Opener::default()).unwrap();
        Made { folder, templates, identity }
    }

    #[test]
    fn template_is_found_as_it_was_published_until_it_is_removed() {
        let Made { templates, identity, folder: _folder } = made();
        let template = templates.look("m", &identity).unwrap().unwrap();
        assert_eq!((template.memory.size, template.memory.block.as_str()), (1 << 20, "pc.ram"));
        assert!(template.disk < 1 << 20, "the RAM file is not sparse");
        assert!(templates.look("n", &identity).unwrap().is_none());
        templates.remove("m").unwrap();
        assert!(templates.look("m", &identity).unwrap().is_none());
        templates.remove("m").unwrap();
    }

    /// A computer that crashes has a whole template, or none.
    #[test]
    fn template_is_on_disk_before_and_after_its_rename() {
        let publishes = "template_is_found_as_it_was_published_until_it_is_removed";
        let publishes = format!("prepare::unfinished::tests::{publishes}");
        let calls = trace::of_test(&publishes, &["fsync", "fdatasync", "rename"]).unwrap();
        let renamed = trace::position(&calls, 0, "rename", "/m.template").unwrap();
        for file in [RAM, DEVICES, RECORD] {
            assert!(trace::position(&calls, 0, "fsync", &format!("/{file}")).unwrap() < renamed, "{file}");
        }
        trace::position(&calls, renamed, "fsync", "/templates").unwrap();
    }

    #[test]
    fn template_is_refused_when_one_of_its_files_was_changed() {
        type Harm = fn(&Path);
        let harms: [(Harm, &str); 6] = [
            (
                |folder| {
                    File::options().write(true).open(folder.join(RAM)).unwrap().set_len(1 << 19).unwrap()
                },
                "RAM",
            ),
            (|folder| fs::write(folder.join(RAM), vec![1; 1 << 20]).unwrap(), "RAM"),
            (|folder| fs::write(folder.join(DEVICES), "the levices").unwrap(), "device"),
            (|folder| fs::remove_file(folder.join(DEVICES)).unwrap(), "cannot be read"),
            (|folder| fs::write(folder.join(RECORD), "{").unwrap(), "no sense"),
            (|folder| fs::write(folder.join("../../snapshot"), "another").unwrap(), "snapshot"),
        ];
        for (harm, expected) in harms {
            let Made { templates, identity, folder } = made();
            harm(&templates.folder("m"));
            let identity = identity::tests::identity_again(folder.path(), &identity);
            let why = templates.look("m", &identity).err().unwrap();
            assert!(why.contains(expected), "{why}");
        }
    }

    #[test]
    fn template_is_refused_by_its_checksum_when_a_bit_of_the_devices_flips() {
        let Made { templates, identity, folder: _folder } = made();
        let folder = templates.folder("m");
        fs::write(folder.join(DEVICES), "the devicer").unwrap();
        let mut record: Record = serde_json::from_slice(&fs::read(folder.join(RECORD)).unwrap()).unwrap();
        record.devices = FileId::of(&folder.join(DEVICES)).unwrap();
        fs::write(folder.join(RECORD), serde_json::to_vec(&record).unwrap()).unwrap();
        assert!(templates.look("m", &identity).err().unwrap().contains("device"));
    }

    #[test]
    fn cleanup_removes_templates_and_keeps_files_of_the_operator() {
        let made = made();
        let dir = made.dir();
        let Made { folder, templates, identity } = made;
        drop(Unfinished::begin(&templates, "m").unwrap());
        assert_eq!(dir.read_dir().unwrap().count(), 2, "an unfinished template stays behind");
        std::mem::forget(Unfinished::begin(&templates, "m").unwrap());
        for name in ["of-the-operator", "m", "other.template", "x.unfinished"] {
            fs::create_dir(dir.join(name)).unwrap();
            fs::write(dir.join(name).join("win10.qcow2"), "precious").unwrap();
        }
        assert!(Templates::open(&dir).err().unwrap().to_string().contains("another host"));
        drop(templates);
        let templates = Templates::open(&dir).unwrap();
        templates.keep_only(&["m"]);
        assert!(templates.look("m", &identity).unwrap().is_some());
        assert!(!dir.join("m.unfinished").exists());
        templates.keep_only(&["else"]);
        assert!(templates.look("m", &identity).unwrap().is_none());
        for name in ["of-the-operator", "m", "other.template", "x.unfinished"] {
            assert_eq!(fs::read_to_string(dir.join(name).join("win10.qcow2")).unwrap(), "precious", "{name}");
        }
        assert!(templates.remove("other").is_err());
        assert!(Unfinished::begin(&templates, "x").is_err());
        drop(folder);
    }
}
