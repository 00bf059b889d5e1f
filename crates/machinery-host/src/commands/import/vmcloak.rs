//! Reads the machines that VMCloak made.
//!
//! VMCloak makes a folder for each machine, with its disk, its memory snapshot and `machineinfo.json`. It
//! writes `machineinfo.json` last, so a machine without this file is unfinished.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use clap::Args;
use machinery::{Error, Place, Result};
use serde_json::Value as Json;
use serde_yaml::Value;

use super::entry::{Found, Machine, Origin, interface_of};
use super::outcome::collect_all;

/// The name of the file that describes a machine.
const FILE_NAME: &str = "machineinfo.json";

/// The keys under `machine` in a `machineinfo.json` that an import needs. The key `mac` is optional.
const REQUIRED_KEYS: [&str; 11] = [
    "name",
    "ip",
    "agent_port",
    "os_name",
    "os_version",
    "architecture",
    "bridge",
    "disk",
    "memory_snapshot",
    "tags",
    "start_args",
];

/// The keys with another name in `qemu.yaml`: that name first, then VMCloak's.
const RENAMED_KEYS: [(&str, &str); 5] = [
    ("qcow2_path", "disk"),
    ("snapshot_path", "memory_snapshot"),
    ("platform", "os_name"),
    ("interface", "bridge"),
    ("mac_address", "mac"),
];

/// The arguments of the command.
#[derive(Debug, Clone, Args)]
pub struct Vmcloak {
    /// Folders of machines, or folders that hold such folders
    #[arg(required = true)]
    pub folders: Vec<PathBuf>,
}

/// Reads the machines in the folders.
///
/// # Errors
/// A folder has no machines. A `machineinfo.json` is incomplete.
pub fn find(vmcloak: &Vmcloak) -> Result<Found> {
    let folders = find_folders(&vmcloak.folders)?;
    let name = |folder: &Path| folder.file_name().unwrap_or(folder.as_os_str()).display().to_string();
    let machines = collect_all(folders.files.iter().map(|path| read(path)))?;
    Ok(Found {
        interface: interface_of(&machines),
        machines,
        left_out: folders
            .unfinished
            .iter()
            .map(|folder| (name(folder), format!("its folder has no {FILE_NAME}")))
            .collect(),
        ..Found::default()
    })
}

/// The folders of machines.
#[derive(Default)]
struct Folders {
    /// The `machineinfo.json` files.
    files: Vec<PathBuf>,
    /// The folders without such a file.
    unfinished: Vec<PathBuf>,
}

/// Finds the machines in the folders, each once.
fn find_folders(folders: &[PathBuf]) -> Result<Folders> {
    let mut found = Folders::default();
    for part in collect_all(folders.iter().map(|folder| find_in(folder)))? {
        found.files.extend(part.files);
        found.unfinished.extend(part.unfinished);
    }
    let mut seen = HashSet::new();
    found.files.retain(|path| seen.insert(fs::canonicalize(path).unwrap_or_else(|_| path.clone())));
    Ok(found)
}

fn find_in(folder: &Path) -> Result<Folders> {
    let own = folder.join(FILE_NAME);
    if own.is_file() {
        return Ok(Folders { files: vec![own], unfinished: Vec::new() });
    }
    let mut found = Folders::default();
    for inner in folders_in(folder).map_err(|error| Error::io("look into the folder", folder, &error))? {
        let file = inner.join(FILE_NAME);
        if file.is_file() { found.files.push(file) } else { found.unfinished.push(inner) }
    }
    if found.files.is_empty() {
        let reason = format!("there is no {FILE_NAME} in {} or in a folder in it", folder.display());
        return Err(Error::configuration(reason)
            .advice("Name a machine's folder or the folder of all machines, such as ~/.vmcloak/vms/qemu"));
    }
    Ok(found)
}

fn folders_in(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut folders = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            folders.push(path);
        }
    }
    folders.sort();
    Ok(folders)
}

/// Returns the place of a machine's description.
fn place(path: &Path) -> Place {
    Place { file: path.to_owned(), line: None, key: Some("machine".to_owned()) }
}

/// Reads a `machineinfo.json` and expects that its files exist.
fn read(path: &Path) -> Result<Machine> {
    let path = std::path::absolute(path).map_err(|error| Error::io("find", path, &error))?;
    let text = fs::read_to_string(&path).map_err(|error| Error::io("read", &path, &error))?;
    let info: Json = serde_json::from_str(&text).map_err(|error| not_json(&path, &error))?;
    let Some(Json::Object(keys)) = info.get("machine") else {
        return Err(Error::configuration("there is no description of a machine under this key")
            .place(place(&path))
            .advice("Check that VMCloak made this file; if it did, make the machine's snapshot again"));
    };
    Description { path: &path, keys }.machine()
}

fn not_json(path: &Path, error: &serde_json::Error) -> Error {
    Error::configuration(format!("this is not JSON: {error}"))
        .place(Place { file: path.to_owned(), line: Some(error.line()), key: None })
        .advice("Check that VMCloak made this file, and that it is complete")
}

/// The keys under `machine`.
struct Description<'a> {
    path: &'a Path,
    keys: &'a serde_json::Map<String, Json>,
}

impl Description<'_> {
    fn machine(&self) -> Result<Machine> {
        self.expect_required_keys()?;
        self.expect_start_args()?;
        let origin = Origin { place: Some(place(self.path)), renamed: &RENAMED_KEYS };
        let mut machine = Machine::new(self.text("name")?, origin);
        machine.keys = vec![
            ("qcow2_path", self.file("disk")?),
            ("snapshot_path", self.file("memory_snapshot")?),
            ("machineinfo_path", self.path_text(self.path)?),
            ("ip", self.text("ip")?.into()),
            ("platform", self.text("os_name")?.to_lowercase().into()),
            ("os_version", self.text("os_version")?.into()),
            ("architecture", self.text("architecture")?.to_lowercase().into()),
            ("interface", self.text("bridge")?.into()),
            ("agent_port", self.port()?),
        ];
        if self.has("mac") {
            machine.keys.push(("mac_address", self.text("mac")?.to_lowercase().into()));
        }
        machine.keys.push(("tags", self.tags()?));
        Ok(machine)
    }

    fn has(&self, key: &str) -> bool {
        self.keys.get(key).is_some_and(|value| !value.is_null() && value != "")
    }

    fn expect_required_keys(&self) -> Result<()> {
        let missing: Vec<&str> = REQUIRED_KEYS.into_iter().filter(|key| !self.has(key)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::configuration(format!("these keys are missing: {}", missing.join(", ")))
            .place(place(self.path))
            .advice("Make the machine's snapshot again with a current VMCloak, or add the keys"))
    }

    fn error(&self, key: &str, reason: impl Into<String>) -> Error {
        let place = place(self.path);
        Error::configuration(reason).place(Place { key: Some(format!("machine.{key}")), ..place })
    }

    fn text(&self, key: &str) -> Result<String> {
        self.as_text(key, &self.keys[key])
    }

    /// A number must be whole, because JSON's `18.10` is 18.1.
    fn as_text(&self, key: &str, value: &Json) -> Result<String> {
        match value {
            Json::String(text) => Ok(text.clone()),
            Json::Number(number) if !number.is_f64() => Ok(number.to_string()),
            other => Err(self.error(key, format!("{other} is not a text")).advice("Write it in quotes")),
        }
    }

    fn port(&self) -> Result<Value> {
        let text = self.text("agent_port")?;
        let port = text.parse::<u16>().ok().filter(|port| *port > 0);
        port.map(Value::from).ok_or_else(|| {
            self.error("agent_port", format!("'{text}' is not a TCP port")).advice("Use 1 to 65535")
        })
    }

    fn tags(&self) -> Result<Value> {
        let Json::Array(tags) = &self.keys["tags"] else {
            return Err(self.error("tags", format!("{} is not a list", self.keys["tags"])));
        };
        let tags: Result<Vec<String>> = tags.iter().map(|tag| self.as_text("tags", tag)).collect();
        Ok(tags?.into())
    }

    /// Expects a non-empty list of start arguments; the plugin checks their content.
    fn expect_start_args(&self) -> Result<()> {
        match &self.keys["start_args"] {
            Json::Array(list) if !list.is_empty() => Ok(()),
            _ => Err(self
                .error("start_args", "this must be a list of QEMU's arguments, and not be empty")
                .advice("Make the machine's snapshot again")),
        }
    }

    fn file(&self, key: &str) -> Result<Value> {
        let path = self.path.with_file_name(self.text(key)?);
        // A pipe would have the open wait.
        let opened = fs::metadata(&path).and_then(|found| match found.is_file() {
            true => File::open(&path).map(|_| true),
            false => Ok(false),
        });
        match opened {
            Ok(true) => self.path_text(&path),
            Ok(false) => Err(self.error(key, format!("{} is not a file", path.display()))),
            Err(error) => Err(self
                .error(key, format!("cannot read {}: {error}", path.display()))
                .advice("Check that the machine's folder is complete and readable for this user")),
        }
    }

    fn path_text(&self, path: &Path) -> Result<Value> {
        path.to_str().map(Value::from).ok_or_else(|| {
            Error::configuration(format!("the path {} is not UTF-8", path.display()))
                .advice("Rename the folder: YAML cannot hold such a path")
        })
    }
}
