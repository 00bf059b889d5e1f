//! Reads the machines that VMCloak made.
//!
//! VMCloak makes a folder for each machine, with its disk, its memory snapshot and `machineinfo.json`. It
//! writes `machineinfo.json` last, so a machine without this file is unfinished.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use machinery::{Error, Place, Result};
use serde_json::Value as Json;
use serde_yaml::Value;

use super::outcome::collect_all;

/// The name of the file that describes a machine.
pub const FILE_NAME: &str = "machineinfo.json";

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

/// Returns VMCloak's name of a key in `qemu.yaml`.
pub fn vmcloak_key(key: &str) -> &str {
    RENAMED_KEYS.iter().find(|renamed| renamed.0 == key).map_or(key, |renamed| renamed.1)
}

/// The machines in VMCloak's folders.
#[derive(Default)]
pub struct Found {
    /// The `machineinfo.json` files.
    pub files: Vec<PathBuf>,
    /// The folders without such a file.
    pub unfinished: Vec<PathBuf>,
}

/// Finds the machines in the folders, each once.
pub fn find(folders: &[PathBuf]) -> Result<Found> {
    let mut found = Found::default();
    for part in collect_all(folders.iter().map(|folder| find_in(folder)))? {
        found.files.extend(part.files);
        found.unfinished.extend(part.unfinished);
    }
    let mut seen = HashSet::new();
    found.files.retain(|path| seen.insert(fs::canonicalize(path).unwrap_or_else(|_| path.clone())));
    Ok(found)
}

fn find_in(folder: &Path) -> Result<Found> {
    let own = folder.join(FILE_NAME);
    if own.is_file() {
        return Ok(Found { files: vec![own], unfinished: Vec::new() });
    }
    let mut found = Found::default();
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

/// A machine to add to `qemu.yaml`.
#[derive(Debug)]
pub struct Machine {
    /// The machine's name.
    pub name: String,
    /// The machine's `machineinfo.json`.
    pub source: PathBuf,
    /// The keys of the entry, in the order in which they are written.
    pub keys: Vec<(&'static str, Value)>,
}

impl Machine {
    /// Returns the entry as a parser reads it.
    pub fn entry(&self) -> Value {
        Value::Mapping(self.keys.iter().map(|(key, value)| ((*key).into(), value.clone())).collect())
    }

    /// Returns an error about one of the machine's keys, by VMCloak's name.
    pub fn error(&self, key: &str, reason: impl Into<String>) -> Error {
        about(&self.source, key, reason).machine(&self.name)
    }

    /// Converts an error about the entry into an error about the `machineinfo.json`.
    pub fn refused(&self, error: &Error) -> Error {
        let place = error.placed().and_then(|place| place.key.as_deref());
        let key = place.and_then(|key| key.rsplit('.').next()).unwrap_or("name");
        let known = self.keys.iter().any(|(own, _)| *own == key);
        self.error(if known { vmcloak_key(key) } else { "name" }, error.reason())
    }
}

fn about(file: &Path, key: &str, reason: impl Into<String>) -> Error {
    let key = Some(format!("machine.{key}"));
    Error::configuration(reason).place(Place { file: file.to_owned(), line: None, key })
}

/// Reads a `machineinfo.json` and expects that its files exist.
pub fn read(path: &Path) -> Result<Machine> {
    let path = std::path::absolute(path).map_err(|error| Error::io("find", path, &error))?;
    let text = fs::read_to_string(&path).map_err(|error| Error::io("read", &path, &error))?;
    let info: Json = serde_json::from_str(&text).map_err(|error| not_json(&path, &error))?;
    let Some(Json::Object(keys)) = info.get("machine") else {
        let place = Place { file: path, line: None, key: Some("machine".to_owned()) };
        return Err(Error::configuration("there is no description of a machine under this key")
            .place(place)
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
        let mut keys = vec![
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
            keys.push(("mac_address", self.text("mac")?.to_lowercase().into()));
        }
        keys.push(("tags", self.tags()?));
        Ok(Machine { name: self.text("name")?, source: self.path.to_owned(), keys })
    }

    fn has(&self, key: &str) -> bool {
        self.keys.get(key).is_some_and(|value| !value.is_null() && value != "")
    }

    fn expect_required_keys(&self) -> Result<()> {
        let missing: Vec<&str> = REQUIRED_KEYS.into_iter().filter(|key| !self.has(key)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let place = Place { file: self.path.to_owned(), line: None, key: Some("machine".to_owned()) };
        Err(Error::configuration(format!("these keys are missing: {}", missing.join(", ")))
            .place(place)
            .advice("Make the machine's snapshot again with a current VMCloak, or add the keys"))
    }

    fn error(&self, key: &str, reason: impl Into<String>) -> Error {
        about(self.path, key, reason)
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
