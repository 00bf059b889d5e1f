//! The description of a machine: `machineinfo.json` in its folder, in VMCloak's format and with further keys.
//!
//! The plugin `qemu` reads QEMU's arguments from it, and `import vmcloak` the entry of the machine.

use std::fs;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use machinery::config::ConfigFile;
use machinery::{Error, Result};
use machinery_images::FileId;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use serde_yaml::{Mapping, Value};

use super::context::{KVM, MACHINERY};
use super::domain::{Domain, DomainEntry};
use crate::commands::import::DEFAULT_DSN;
use crate::cwd::Cwd;

/// The name of the file.
pub const INFO: &str = "machineinfo.json";
/// The names of a machine's disk and snapshot.
pub const DISK: &str = "disk.qcow2";
pub const MEMORY: &str = "memory.zst";
/// The mode of the file, which the machine's own user reads.
const MODE: u32 = 0o644;

/// The content of the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Info {
    pub machine: Description,
    /// This program and its version. Other tools write no such key.
    pub made_by: String,
}

/// The machine. The names of the keys are VMCloak's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Description {
    pub name: String,
    pub ip: String,
    pub agent_port: u16,
    pub os_name: String,
    pub os_version: String,
    pub architecture: String,
    /// The interface on which the machine's traffic is captured.
    pub bridge: String,
    pub mac: String,
    pub disk: String,
    pub memory_snapshot: String,
    pub tags: Vec<String>,
    pub start_args: Vec<String>,
    /// The state of the TPM for a cold boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm_state: Option<String>,
    /// The disk from which the machine was made. A machine of an archive has none: its disk is whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<PathBuf>,
    /// The address inside the guest of an isolated machine, whose section of `machinery-host.yaml` this program has written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_ip: Option<Ipv4Addr>,
    /// The files of that disk, as they were before the machine's snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub base_files: Vec<FileId>,
    /// The domain of a machine of the machinery `kvm`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<Domain>,
    /// The domain of libvirt whose snapshot the machine has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copied_from: Option<CopiedFrom>,
}

/// A domain of libvirt that has become a machine of the machinery `qemu`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedFrom {
    pub label: String,
    pub uuid: String,
    pub snapshot: String,
    /// The time of the snapshot, in seconds since 1970.
    pub taken: u32,
}

impl Info {
    pub fn new(machine: Description) -> Info {
        Info { machine, made_by: format!("cuckoo-machinery {}", env!("CARGO_PKG_VERSION")) }
    }

    /// Reads the description of a machine that this program has made.
    ///
    /// # Errors
    /// The file cannot be read, or another tool has made the machine.
    pub fn read(folder: &Path) -> Result<Info> {
        let path = folder.join(INFO);
        let text = fs::read_to_string(&path).map_err(|error| Error::io("read", &path, &error))?;
        let info = Info::parse(&text).map(|info| info.relative_to(folder));
        info.map_err(|why| {
            Error::configuration(format!(
                "{}: `machine create` has not made this machine: {why}",
                path.display()
            ))
        })
    }

    /// Returns the description with relative paths of the files in the machine's folder, in which QEMU runs.
    fn relative_to(mut self, folder: &Path) -> Info {
        let prefix = format!("{}/", folder.display());
        self.machine.start_args.iter_mut().for_each(|arg| *arg = arg.replace(&prefix, ""));
        self
    }

    /// Returns the description with absolute paths of these files, which are in the machine's folder.
    pub fn placed_in(mut self, folder: &Path, names: &[String]) -> Info {
        for arg in &mut self.machine.start_args {
            for name in names {
                let path = folder.join(name).display().to_string();
                let (value, last) = (format!("={name},"), format!("={name}"));
                if arg == name {
                    arg.clone_from(&path);
                } else if let Some(before) = arg.strip_suffix(&last) {
                    *arg = format!("{before}={path}");
                } else {
                    let json = (Json::from(name.as_str()).to_string(), Json::from(path.as_str()).to_string());
                    *arg = arg.replace(&value, &format!("={path},")).replace(&json.0, &json.1);
                }
            }
        }
        self
    }

    /// Reads the text of a description. The error is the reason why it is none.
    ///
    /// # Errors
    /// A key is missing, or has a wrong value.
    pub fn parse(text: &str) -> Result<Info, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    /// Writes the description into the folder, as a whole.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(INFO);
        let text = serde_json::to_string_pretty(self).unwrap_or_default() + "\n";
        let mode = fs::Permissions::from_mode(MODE);
        let new = tempfile::Builder::new().permissions(mode).tempfile_in(folder);
        let written = new.and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|failed| failed.error)
        });
        written.map(drop).map_err(|error| Error::io("write", &path, &error))
    }
}

/// The keys of an entry in `qemu.yaml` with the paths of its files.
const PATHS: [&str; 3] = ["qcow2_path", "snapshot_path", "machineinfo_path"];

/// A machine of the configuration.
pub struct Entry {
    pub name: String,
    /// The paths of disk, snapshot and description, as configured.
    pub paths: Vec<PathBuf>,
}

impl Entry {
    /// Returns the real paths of disk, snapshot and description.
    pub fn files(&self) -> Vec<PathBuf> {
        self.paths.iter().map(|path| real(path)).collect()
    }
}

/// Returns the machines of the configuration. A CWD without the file has none.
///
/// # Errors
/// The file cannot be read or parsed: it may have any machine. Other users can change it.
pub fn entries(cwd: &Cwd) -> Result<Vec<Entry>> {
    let entry = |(name, keys): (&Value, &Value)| Entry {
        name: name.as_str().unwrap_or_default().to_owned(),
        paths: PATHS.iter().filter_map(|key| Some(keys.get(*key)?.as_str()?.into())).collect(),
    };
    Ok(machines(cwd, MACHINERY)?.iter().map(entry).collect())
}

/// Returns the machines of a machinery's configuration, by name.
fn machines(cwd: &Cwd, machinery: &str) -> Result<Mapping> {
    let path = cwd.machinery_yaml(machinery);
    if path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(Mapping::new());
    }
    Ok(ConfigFile::read_trusted(&path)?.parse_at(&["machines"])?.unwrap_or_default())
}

/// Reports whether the configuration has a machine with a file in this folder.
///
/// # Errors
/// The configuration cannot be read.
pub fn is_configured(cwd: &Cwd, folder: &Path) -> Result<bool> {
    let folder = real(folder);
    Ok(entries(cwd)?.iter().any(|entry| entry.files().iter().any(|file| file.starts_with(&folder))))
}

/// Returns the machines of the machinery `kvm`. A CWD without the file has none.
///
/// # Errors
/// As [`entries`].
pub fn domain_entries(cwd: &Cwd) -> Result<Vec<DomainEntry>> {
    let text = |keys: &Value, key: &str| keys.get(key).and_then(Value::as_str).map(str::to_owned);
    let dsn = configured_dsn(cwd)?.unwrap_or_else(|| DEFAULT_DSN.to_owned());
    let entry = |(name, keys): (&Value, &Value)| DomainEntry {
        name: name.as_str().unwrap_or_default().to_owned(),
        label: text(keys, "label").unwrap_or_default(),
        dsn: text(keys, "dsn").unwrap_or_else(|| dsn.clone()),
        snapshot: text(keys, "snapshot"),
    };
    Ok(machines(cwd, KVM)?.iter().map(entry).collect())
}

/// Returns the address of the libvirt of machines that name none, if `kvm.yaml` has one.
///
/// # Errors
/// As [`entries`].
pub fn configured_dsn(cwd: &Cwd) -> Result<Option<String>> {
    let path = cwd.machinery_yaml(KVM);
    if path.exists() { ConfigFile::read_trusted(&path)?.parse_at(&["dsn"]) } else { Ok(None) }
}

/// Returns the machinery of a machine, or `qemu` if the configuration does not have it.
///
/// # Errors
/// The configuration of the machinery `kvm` cannot be read, and that of `qemu` does not have the machine.
pub fn machinery_of(cwd: &Cwd, name: &str) -> Result<&'static str> {
    if machines(cwd, MACHINERY).is_ok_and(|machines| machines.contains_key(name)) {
        return Ok(MACHINERY);
    }
    Ok(if machines(cwd, KVM)?.contains_key(name) { KVM } else { MACHINERY })
}

/// Returns the files of a machine: disk, snapshot and description.
///
/// # Errors
/// The configuration has no such machine.
pub fn files_of(cwd: &Cwd, name: &str) -> Result<Vec<PathBuf>> {
    let is_it = |entry: &Entry| entry.name == name && entry.paths.len() == PATHS.len();
    let found = entries(cwd)?.into_iter().find(is_it);
    found.map(|entry| entry.files()).ok_or_else(|| {
        Error::configuration(format!("{} has no such machine", cwd.machinery_yaml(MACHINERY).display()))
            .machine(name)
    })
}

/// Returns the path without links, if it exists.
pub fn real(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Returns the description of a machine with these arguments.
    pub fn described(args: &[&str]) -> Info {
        let text = serde_json::json!({"made_by": "cuckoo-machinery", "machine": {
            "name": "m", "ip": "10.0.0.1", "agent_port": 8000, "os_name": "linux", "os_version": "12", "architecture": "amd64",
            "bridge": "lo", "mac": "", "disk": DISK, "memory_snapshot": MEMORY, "tags": [], "start_args": args,
        }});
        Info::parse(&text.to_string()).unwrap()
    }

    #[test]
    fn machine_of_a_folder_is_unknown_when_the_configuration_cannot_be_parsed() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join(".cuckoocwd"), "").unwrap();
        let cwd = Cwd::find(Some(root.path())).unwrap();
        let folder = root.path().join("machines/m");
        assert!(!is_configured(&cwd, &folder).unwrap(), "no file has no machines");
        let yaml = cwd.machinery_yaml(MACHINERY);
        fs::create_dir_all(yaml.parent().unwrap()).unwrap();
        let entry = format!("machines:\n  m:\n    qcow2_path: {}/disk.qcow2\n", folder.display());
        fs::write(&yaml, &entry).unwrap();
        assert!(is_configured(&cwd, &folder).unwrap());
        fs::write(&yaml, entry + "  bad:\n indent: 1\n").unwrap();
        assert!(is_configured(&cwd, &folder).is_err());
    }

    #[test]
    fn files_of_the_folder_are_absolute_in_the_file_and_relative_for_a_copy() {
        let args = [
            "-kernel",
            "vmlinuz",
            "-drive",
            "if=pflash,file=vars.fd,unit=1",
            "-drive",
            "x,file=vars.fd",
            "-serial",
            "file:log",
        ];
        let info = described(&args);
        let folder = tempfile::tempdir().unwrap();
        let names = ["vmlinuz", "vars.fd"].map(str::to_owned);
        info.placed_in(folder.path(), &names).write(folder.path()).unwrap();
        let written = fs::read_to_string(folder.path().join(INFO)).unwrap();
        let placed = Info::parse(&written).unwrap().machine.start_args;
        let at = folder.path().display();
        assert_eq!(placed[1], format!("{at}/vmlinuz"));
        assert_eq!(
            placed[3..6],
            [format!("if=pflash,file={at}/vars.fd,unit=1"), "-drive".into(), format!("x,file={at}/vars.fd")]
        );
        assert_eq!(Info::read(folder.path()).unwrap().machine.start_args, args);
    }
}
