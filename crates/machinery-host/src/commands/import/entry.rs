//! A machine to import: the keys of its entry, and the place where they were found.
//!
//! A source reads the keys that its tool has. A key that the tool does not have is absent here. The import then asks for
//! it if the entry needs it.

use std::fmt;

use machinery::{Error, Place};
use serde_yaml::Value;

use crate::commands::shell_word;

/// The keys that every entry needs, each with a word for its value.
pub const NEEDED: [(&str, &str); 3] =
    [("ip", "ADDRESS"), ("platform", "PLATFORM"), ("os_version", "VERSION")];

/// All keys of an entry, in the order in which they are written.
const ORDER: [&str; 14] = [
    "label",
    "dsn",
    "snapshot",
    "qcow2_path",
    "snapshot_path",
    "machineinfo_path",
    "ip",
    "platform",
    "os_version",
    "architecture",
    "interface",
    "agent_port",
    "mac_address",
    "tags",
];

/// The machines of a source, and more that it has for the file.
#[derive(Debug, Default)]
pub struct Found {
    pub machines: Vec<Machine>,
    /// The machines that the source itself leaves out: the name, and the reason.
    pub left_out: Vec<(String, String)>,
    /// Facts about the source that the operator has to know.
    pub notes: Vec<String>,
    /// The address of libvirt, if the source has one.
    pub dsn: Option<String>,
    /// The interface of most machines, for a new file.
    pub interface: Option<String>,
}

/// Returns the interface of the first machine that has one.
pub fn interface_of(machines: &[Machine]) -> Option<String> {
    let mut keys = machines.iter().flat_map(|machine| &machine.keys);
    keys.find(|(key, _)| *key == "interface").and_then(|(_, value)| value.as_str()).map(str::to_owned)
}

/// A machine to add to the file.
#[derive(Debug)]
pub struct Machine {
    pub name: String,
    pub origin: Origin,
    /// The keys of the entry, in the order in which they are written.
    pub keys: Vec<(&'static str, Value)>,
    /// The reasons why the machine cannot be added.
    pub faults: Vec<Error>,
    /// Facts about the machine that the operator has to know.
    pub notes: Vec<String>,
    /// True if the ip is that of a lease or of the running guest, which may have another one later.
    pub has_changing_ip: bool,
}

/// The place where a tool describes a machine.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// The file, and the key above those of the machine; `None` for libvirt.
    pub place: Option<Place>,
    /// The keys with another name in the tool: ours first, then the tool's.
    pub renamed: &'static [(&'static str, &'static str)],
}

impl Origin {
    /// Returns an error about one of the machine's keys, by the tool's name.
    pub fn error(&self, key: &str, reason: impl Into<String>) -> Error {
        let key = self.renamed.iter().find(|renamed| renamed.0 == key).map_or(key, |renamed| renamed.1);
        let error = Error::configuration(reason);
        match self.place.clone() {
            None => error,
            Some(place) => {
                let above = place.key.unwrap_or_default();
                error.place(Place { key: Some(format!("{above}.{key}")), ..place })
            }
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Some(place) => write!(f, "{}", place.file.display()),
            None => f.write_str("libvirt"),
        }
    }
}

impl Machine {
    pub fn new(name: impl Into<String>, origin: Origin) -> Self {
        let (keys, faults, notes) = (Vec::new(), Vec::new(), Vec::new());
        Machine { name: name.into(), origin, keys, faults, notes, has_changing_ip: false }
    }

    /// Returns the entry as a parser reads it.
    pub fn entry(&self) -> Value {
        Value::Mapping(self.keys.iter().map(|(key, value)| ((*key).into(), value.clone())).collect())
    }

    pub fn has(&self, key: &str) -> bool {
        self.keys.iter().any(|(own, _)| *own == key)
    }

    /// Sets a key, unless there is no value.
    pub fn set(&mut self, key: &'static str, value: Option<impl Into<Value>>) {
        let Some(value) = value else { return };
        self.keys.retain(|(own, _)| *own != key);
        self.keys.push((key, value.into()));
        self.keys.sort_by_key(|(own, _)| ORDER.iter().position(|key| key == own));
    }

    /// Returns an error about one of the machine's keys.
    pub fn error(&self, key: &str, reason: impl Into<String>) -> Error {
        self.origin.error(key, reason).machine(&self.name)
    }

    /// Converts an error about the entry into an error about its origin.
    pub fn refused(&self, error: &Error) -> Error {
        let place = error.placed().and_then(|place| place.key.as_deref());
        let key = place.and_then(|key| key.rsplit('.').next()).unwrap_or("name");
        self.error(if self.has(key) { key } else { "name" }, error.reason())
    }

    /// Returns all reasons why the machine cannot be added: its faults, and the keys that it lacks.
    pub fn take_faults(&mut self) -> Vec<Error> {
        let mut faults: Vec<Error> = std::mem::take(&mut self.faults);
        let lacking: Vec<_> = NEEDED.into_iter().filter(|(key, _)| !self.has(key)).collect();
        if !lacking.is_empty() {
            let keys: Vec<&str> = lacking.iter().map(|(key, _)| *key).collect();
            let name = &self.name;
            let option = |(key, value): &(&str, &str)| {
                format!("--{} {}", key.replace('_', "-"), shell_word(&format!("{name}={value}")))
            };
            let options: Vec<String> = lacking.iter().map(option).collect();
            let reason = format!("{} does not have its {}", self.origin, keys.join(", "));
            faults.push(Error::configuration(reason).advice(format!("Add {}", options.join(" "))));
        }
        faults.into_iter().map(|fault| fault.machine(&self.name)).collect()
    }
}
