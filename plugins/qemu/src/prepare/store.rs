//! All templates of a host, in one folder that no other host uses.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use machinery::trust::expect_trusted;
use machinery::{Error, Result};
use machinery_backend::files::HostLock;
use machinery_backend::sync::lock;
use machinery_images::FileId;
use serde::{Deserialize, Serialize};

use super::identity::Identity;
use super::layout::{
    COMPLETE, DEVICES, FOLDER_MODE, RAM, RECORD, UNFINISHED, checksum, remove, size_on_disk,
};
use super::opener::Opener;
use super::space::TemplateSpace;
use crate::launch::{Memory, Sharing};
use crate::restore::Devices;

/// All templates of a host.
pub struct Templates {
    dir: PathBuf,
    space: TemplateSpace,
    /// Locked while a template is removed because it is stale or has failed.
    dropping: Mutex<()>,
    _lock: HostLock,
}

/// A template that was checked just now, and matches.
pub struct Template {
    /// The RAM, to be mapped.
    pub memory: Memory,
    /// The state of the devices.
    pub devices: Devices,
    /// The identity of the RAM's file. A QEMU that maps the file sees its changes.
    pub ram: FileId,
    /// The template's disk space, in bytes.
    pub disk: u64,
}

/// The content of a template's record: the identities of the machine and of the template's files.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    pub identity: Identity,
    /// QEMU's name for the machine's RAM.
    pub block: String,
    pub ram: FileId,
    pub devices: FileId,
    pub devices_crc32: u32,
}

impl Template {
    /// Returns the template if QEMU can open its RAM file in this way. A jail that was switched on since the build has
    /// another user.
    ///
    /// # Errors
    /// QEMU cannot; the text has the reason.
    pub fn for_opener(self, opener: Opener) -> Result<Template, String> {
        let Some(group) = opener.group else { return Ok(self) };
        let found = self.memory.file.metadata().map_err(|error| format!("it cannot be read: {error}"))?;
        let needed = opener.group_mode();
        if found.gid() == group && found.mode() & needed == needed {
            return Ok(self);
        }
        Err("it was built for another jail".to_owned())
    }
}

impl Templates {
    /// Opens the folder `dir`, which is created if it does not exist. Unfinished templates are removed.
    ///
    /// # Errors
    /// The folder cannot be used, another host uses it, or other users could change what is in it.
    pub fn open(dir: &Path) -> Result<Templates> {
        expect_trusted(dir).map_err(|error| error.action("opening instant_dir"))?;
        let failed = |error: io::Error| Error::io("use the folder of the templates,", dir, &error);
        fs::DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(dir).map_err(failed)?;
        let lock = HostLock::take(&dir.join("templates.lock"), || {
            Error::environment(format!("another host keeps its templates in {}", dir.display()))
                .advice("Give each host an instant_dir of its own")
        })?;
        dir.read_dir().map_err(failed)?;
        let templates = Templates {
            dir: dir.to_owned(),
            space: TemplateSpace::new(dir),
            dropping: Mutex::default(),
            _lock: lock,
        };
        templates.remove_all(|name| name.ends_with(UNFINISHED));
        Ok(templates)
    }

    /// Removes all templates but those of these names.
    pub fn keep_only(&self, names: &[&str]) {
        let is_other = |name: &str| !names.contains(&name);
        self.remove_all(|name| name.strip_suffix(COMPLETE).is_some_and(is_other));
    }

    fn remove_all(&self, is_removed: impl Fn(&str) -> bool) {
        for entry in self.dir.read_dir().into_iter().flatten().flatten() {
            if is_removed(&entry.file_name().to_string_lossy()) {
                // The operator may have a folder whose name looks like a template's.
                let _ = remove(&entry.path())
                    .inspect_err(|error| tracing::warn!(%error, "a folder named like a template stays"));
            }
        }
    }

    pub fn space(&self) -> &TemplateSpace {
        &self.space
    }

    /// Reports whether the folder's path can be part of QEMU's arguments, as a machine's disk is.
    pub fn fits_into_arguments(&self) -> bool {
        !self.dir.to_string_lossy().contains([',', '"', '\\'])
    }

    /// Returns the folder of the template of that name.
    pub(super) fn folder(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}{COMPLETE}"))
    }

    /// Returns the folder in which the template of that name is built.
    pub(super) fn unfinished_folder(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}{UNFINISHED}"))
    }

    /// Returns the template of that name, if there is one. One that is stale, or that QEMU cannot open, is removed.
    ///
    /// # Errors
    /// The template was removed; the text has the reason.
    pub fn find(&self, name: &str, identity: &Identity, opener: Opener) -> Result<Option<Template>, String> {
        let look = || self.look(name, identity)?.map(|found| found.for_opener(opener)).transpose();
        look().or_else(|_| {
            // Another machine may have removed it, or may have built a new one by now.
            let _dropping = lock(&self.dropping);
            look().inspect_err(|_| self.remove_or_warn(name))
        })
    }

    /// Removes the template with that RAM file, which has failed. A newer one of the same name stays.
    pub fn remove_failed(&self, name: &str, ram: &FileId) {
        let _dropping = lock(&self.dropping);
        if FileId::of(&self.folder(name).join(RAM)).is_ok_and(|now| now == *ram) {
            self.remove_or_warn(name);
        }
    }

    fn remove_or_warn(&self, name: &str) {
        if let Err(error) = self.remove(name) {
            tracing::warn!(template = name, %error, "cannot remove a template");
        }
    }

    /// Returns the template of that name, if it belongs to this identity.
    ///
    /// # Errors
    /// There is a template that cannot be used any more; the text has the reason.
    pub(super) fn look(&self, name: &str, identity: &Identity) -> Result<Option<Template>, String> {
        let folder = self.folder(name);
        // The files of an earlier time may belong to others, although nobody can add files now. The machine's own user may
        // have the right to write the RAM, because an older QEMU opens it so; the record has the time of its last change.
        for name in [RECORD, DEVICES] {
            expect_trusted(&folder.join(name)).map_err(|error| error.to_string())?;
        }
        let text = match fs::read(folder.join(RECORD)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("its record cannot be read: {error}")),
        };
        let record: Record =
            serde_json::from_slice(&text).map_err(|error| format!("its record makes no sense: {error}"))?;
        if let Some(change) = identity.change_since(&record.identity) {
            return Err(change);
        }
        let unreadable = |error: io::Error| format!("it cannot be read: {error}");
        let (ram_path, path) = (folder.join(RAM), folder.join(DEVICES));
        let ram = File::open(&ram_path).map_err(unreadable)?;
        if FileId::of_open(&ram_path, &ram).map_err(unreadable)? != record.ram {
            return Err("its RAM file was changed".to_owned());
        }
        let mut file = File::open(&path).map_err(unreadable)?;
        if FileId::of_open(&path, &file).map_err(unreadable)? != record.devices
            || checksum(&mut file).map_err(unreadable)? != record.devices_crc32
        {
            return Err("its device file was changed".to_owned());
        }
        let memory =
            Memory { file: ram, size: record.ram.size(), block: record.block, sharing: Sharing::Mapped };
        let disk = size_on_disk(&folder);
        Ok(Some(Template { memory, devices: Devices { path, file }, ram: record.ram, disk }))
    }

    /// Removes the template of that name, if there is one.
    ///
    /// # Errors
    /// The template stays.
    pub fn remove(&self, name: &str) -> Result<()> {
        remove(&self.folder(name))
    }
}
