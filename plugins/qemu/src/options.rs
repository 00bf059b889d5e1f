//! QEMU's options: finds them among arguments, and parses the value of one, such as `-drive` or `-blockdev`, in
//! either of its spellings.
//!
//! ```text
//! file=/d/x.img,format=raw           key=value; a comma within a value is written twice
//! {"driver": "qcow2", "file": {…}}   JSON; a nested key becomes a dotted one here: "file.filename"
//! ```
//!
//! Sources: QEMU's util/qemu-option.c (`opts_do_parse`), util/keyval.c, qobject/block-qdict.c
//! (`qdict_flatten`).

use std::path::Path;
use std::{fmt, fs, io};

use serde_json::{Map, Value};

/// Options without a value. Source: the options without `HAS_ARG` in QEMU's qemu-options.hx, 2.11 to 10.0.
const FLAGS: [&str; 46] = [
    "h",
    "help",
    "version",
    "S",
    "s",
    "enable-kvm",
    "no-kvm",
    "no-kvm-irqchip",
    "no-kvm-pit",
    "no-kvm-pit-reinjection",
    "no-fd-bootchk",
    "no-acpi",
    "no-hpet",
    "no-quit",
    "no-frame",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefconfig",
    "nodefaults",
    "nographic",
    "curses",
    "sdl",
    "portrait",
    "full-screen",
    "alt-grab",
    "ctrl-grab",
    "snapshot",
    "usb",
    "win2k-hack",
    "rtc-td-hack",
    "localtime",
    "daemonize",
    "singlestep",
    "one-insn-per-tb",
    "preconfig",
    "mem-prealloc",
    "only-migratable",
    "enable-fips",
    "enable-hax",
    "enable-sync-profile",
    "semihosting",
    "tdf",
    "async-teardown",
    "xen-attach",
    "xen-create",
];

/// The keys and values of an option, in the order of the text.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    pairs: Vec<(String, Value)>,
    is_json: bool,
    is_unreadable: bool,
}

impl Options {
    /// Parses an option's value. A first word without `=` is the value of the key `implied`.
    pub fn parse(text: &str, implied: &str) -> Options {
        if !text.starts_with('{') {
            return Options { pairs: pairs(text, implied), is_json: false, is_unreadable: false };
        }
        Options::parse_json(text)
    }

    /// Parses an option's value that is JSON. QEMU's parser also accepts strings in single quotes; options that
    /// are written so are unreadable here.
    pub fn parse_json(text: &str) -> Options {
        let mut pairs = Vec::new();
        let json = serde_json::from_str(text);
        let is_unreadable = json.is_err();
        if let Ok(json) = json {
            flatten(json, "", &mut pairs);
        }
        Options { pairs, is_json: true, is_unreadable }
    }

    /// Reports whether the value is JSON that only QEMU can read, so nothing is known of its keys.
    pub fn is_unreadable(&self) -> bool {
        self.is_unreadable
    }

    /// Creates options from separate keys and values, as in a file of `-readconfig`.
    pub fn of(pairs: Vec<(String, String)>) -> Options {
        let pairs = pairs.into_iter().map(|(key, value)| (key, value.into())).collect();
        Options { pairs, is_json: false, is_unreadable: false }
    }

    /// Returns the text under a key; the last one if there are several, as in QEMU.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.value(key)?.as_str()
    }

    /// Returns all texts under a key that may occur several times; in JSON it is a list of `{"str": …}`.
    pub fn all(&self, key: &str) -> Vec<&str> {
        self.pairs.iter().filter(|(name, _)| name == key).flat_map(|(_, value)| texts(value)).collect()
    }

    /// Returns all keys with their values, also of keys that occur several times.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.pairs.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Reports whether a key exists, with any value but null.
    pub fn has(&self, key: &str) -> bool {
        self.value(key).is_some_and(|value| !value.is_null())
    }

    /// Reports whether a key exists, or any key below it.
    pub fn has_any(&self, key: &str) -> bool {
        let below = |name: &str| name.strip_prefix(key).is_some_and(|rest| rest.starts_with('.'));
        self.has(key) || self.pairs.iter().any(|(name, _)| below(name))
    }

    /// Reports whether a switch is on; `None` if there is no such key.
    pub fn switch(&self, key: &str) -> Option<bool> {
        Some(match self.value(key)? {
            Value::Bool(on) => *on,
            Value::String(word) => ["on", "yes", "true", "y"].contains(&word.as_str()),
            _ => false,
        })
    }

    /// Reports whether a switch exists and is on.
    pub fn is_on(&self, key: &str) -> bool {
        self.switch(key) == Some(true)
    }

    /// Sets a key to this value, and removes its other values.
    pub fn set(&mut self, key: &str, value: &str) {
        self.remove(key);
        self.pairs.push((key.to_owned(), value.into()));
    }

    /// Removes a key.
    pub fn remove(&mut self, key: &str) {
        self.pairs.retain(|(name, _)| name != key);
    }

    /// Moves the values of one key to another key.
    pub fn rename(&mut self, key: &str, new: &str) {
        for (name, _) in self.pairs.iter_mut().filter(|(name, _)| name == key) {
            new.clone_into(name);
        }
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.pairs.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value)
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_json {
            return nested(&self.pairs).fmt(f);
        }
        for (index, (key, value)) in self.pairs.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{key}={}", escaped(value.as_str().unwrap_or_default()))?;
        }
        Ok(())
    }
}

fn texts(value: &Value) -> Vec<&str> {
    match value {
        Value::Array(items) => {
            items.iter().filter_map(|item| item.get("str").unwrap_or(item).as_str()).collect()
        }
        other => other.as_str().into_iter().collect(),
    }
}

/// Escapes the commas of a value by doubling them: a single comma would end the value.
pub fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

fn pairs(text: &str, implied: &str) -> Vec<(String, Value)> {
    let mut pairs = Vec::new();
    for (index, part) in split(text).into_iter().enumerate() {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None if index == 0 && !implied.is_empty() => (implied.to_owned(), part),
            // A switch: `readonly` is `readonly=on`, `noreadonly` is `readonly=off`.
            None => match part.strip_prefix("no") {
                Some(key) => (key.to_owned(), "off".to_owned()),
                None => (part, "on".to_owned()),
            },
        };
        pairs.push((key, value.into()));
    }
    pairs
}

/// Splits at single commas; a double comma is a comma within a value.
fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match parts.last_mut() {
            Some(part) if c != ',' || rest.next_if_eq(&',').is_some() => part.push(c),
            _ => parts.push(String::new()),
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn flatten(object: Map<String, Value>, prefix: &str, pairs: &mut Vec<(String, Value)>) {
    for (key, value) in object {
        let key = format!("{prefix}{key}");
        match value {
            Value::Object(inner) if !inner.is_empty() => flatten(inner, &format!("{key}."), pairs),
            value => pairs.push((key, value)),
        }
    }
}

fn nested(pairs: &[(String, Value)]) -> Value {
    let mut root = Map::new();
    for (key, value) in pairs {
        insert(&mut root, key, value);
    }
    root.into()
}

fn insert(object: &mut Map<String, Value>, key: &str, value: &Value) {
    let Some((word, rest)) = key.split_once('.') else {
        object.insert(key.to_owned(), value.clone());
        return;
    };
    let inner = object.entry(word).or_insert(Value::Null);
    if !inner.is_object() {
        *inner = Map::new().into();
    }
    if let Value::Object(inner) = inner {
        insert(inner, rest, value);
    }
}

/// The maximum size of a file of options, in bytes.
const MAX_OPTIONS_FILE: u64 = 1 << 20;

/// Reads a file of options, such as that of `-readconfig`.
///
/// # Errors
/// The file cannot be read, is no regular file, or is too large.
pub fn read_options_file(path: &Path) -> io::Result<String> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() || metadata.len() > MAX_OPTIONS_FILE {
        return Err(io::Error::other("it is no file of options"));
    }
    fs::read_to_string(path)
}

/// Returns the options among the arguments: the index of the argument after the option, the option's name,
/// and that argument. An argument that belongs to no option is a disk, as with `-hda`. The argument after an option
/// with a value is the value, even if it begins with a dash. Source: `qemu_init` in QEMU's system/vl.c.
pub fn walk(args: &[String]) -> impl Iterator<Item = (usize, &str, &str)> {
    let mut is_value = false;
    args.iter().enumerate().filter_map(move |(index, arg)| {
        if std::mem::take(&mut is_value) {
            return None;
        }
        let Some(name) = name_of(arg) else { return Some((index, "hda", arg.as_str())) };
        is_value = !is_flag(name);
        Some((index + 1, name, args.get(index + 1).map_or("", String::as_str)))
    })
}

/// Reports whether an option has no value.
pub fn is_flag(name: &str) -> bool {
    FLAGS.contains(&name)
}

/// Returns the name of an option, without its one or two dashes and its `=value`; none if it is no option.
pub fn name_of(arg: &str) -> Option<&str> {
    let name = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-'))?;
    name.split('=').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_keep_commas_when_they_are_doubled() {
        let options = Options::parse("file=/d/a,,b,,,format=raw,id=x=y", "");
        assert_eq!(options.get("file"), Some("/d/a,b,"));
        assert_eq!((options.get("format"), options.get("id")), (Some("raw"), Some("x=y")));
        assert_eq!(options.to_string(), "file=/d/a,,b,,,format=raw,id=x=y");
    }

    #[test]
    fn options_know_switches_in_every_spelling() {
        for on in ["readonly", "readonly=on", "a=b,readonly=yes", "readonly=off,readonly=on"] {
            assert!(Options::parse(on, "").is_on("readonly"), "{on}");
        }
        for off in ["noreadonly", "readonly=off", "a=b", "readonly=on,readonly=off"] {
            assert!(!Options::parse(off, "").is_on("readonly"), "{off}");
        }
        assert!(Options::parse("{\"readonly\": true}", "").is_on("readonly"));
        assert_eq!(Options::parse("a", "").switch("b"), None);
    }

    #[test]
    fn options_imply_the_key_when_the_first_word_has_none() {
        let options = Options::parse("qcow2,node-name=d", "driver");
        assert_eq!((options.get("driver"), options.get("node-name")), (Some("qcow2"), Some("d")));
        assert_eq!(options.to_string(), "driver=qcow2,node-name=d");
    }

    #[test]
    fn options_are_the_same_when_json_is_written_again() {
        let json = r#"{"cache":{"direct":true},"driver":"raw","file":{"driver":"file","filename":"/x,y"},"n":1,"z":null}"#;
        let mut options = Options::parse(json, "driver");
        assert_eq!(options.get("file.filename"), Some("/x,y"));
        assert!(options.is_on("cache.direct") && options.has_any("file") && !options.has("z"));
        assert_eq!(options.to_string(), json);
        options.set("file.filename", "/o");
        options.remove("z");
        options.rename("n", "file.n");
        assert_eq!(
            options.to_string(),
            r#"{"cache":{"direct":true},"driver":"raw","file":{"driver":"file","filename":"/o","n":1}}"#
        );
    }
}
