//! A configuration file with its path, and errors that point into it.

use std::cell::RefCell;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::trust::expect_trusted;
use crate::{Error, Place, Result};

/// The path and the text of a YAML file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ConfigFile {
    /// The path of the file.
    pub path: PathBuf,
    /// The text of the file.
    pub text: String,
}

impl ConfigFile {
    /// Reads the file.
    ///
    /// # Errors
    /// The file is missing, unreadable, or not UTF-8.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            let mut found = Error::io("read the configuration", path, &error);
            if error.kind() == std::io::ErrorKind::InvalidData {
                found = found.advice("Save it as UTF-8 text");
            }
            found
        })?;
        Ok(ConfigFile { path: path.to_owned(), text })
    }

    /// Reads a file that decides which code runs, such as one that names programs.
    ///
    /// # Errors
    /// Other users could change the file; as [`read`](ConfigFile::read).
    pub fn read_trusted(path: &Path) -> Result<Self> {
        expect_trusted(path)?;
        ConfigFile::read(path)
    }

    /// Creates an error about the value under `key`, with its line. `key` lists the keys from the top of the file.
    pub fn error(&self, key: &[&str], reason: impl Into<String>) -> Error {
        Error::configuration(reason).place(Place {
            file: self.path.clone(),
            line: self.line_of(key),
            key: (!key.is_empty()).then(|| key.join(".")),
        })
    }

    /// Returns the line (from 1) on which the value under `key` starts. If the key is missing, it returns the line of
    /// the nearest key above it.
    pub(super) fn line_of(&self, key: &[&str]) -> Option<usize> {
        (1..=key.len()).rev().find_map(|depth| {
            let line = RefCell::new(None);
            let seek = Seek { path: &key[..depth], found: &line };
            let result = seek.deserialize(serde_yaml::Deserializer::from_str(&self.text));
            let reached = line.borrow().is_some();
            result.err().filter(|_| reached)?.location().map(|at| at.line())
        })
    }
}

/// Descends along `path` and fails there on purpose: the parser's error has the line.
struct Seek<'a> {
    path: &'a [&'a str],
    found: &'a RefCell<Option<()>>,
}

impl<'de> DeserializeSeed<'de> for Seek<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Seek<'_> {
    fn arrived<T, E: de::Error>(self) -> Result<Option<T>, E> {
        if !self.path.is_empty() {
            return Ok(None);
        }
        self.found.replace(Some(()));
        Err(E::custom("here"))
    }
}

macro_rules! arrive {
    ($($visit:ident: $type:ty),*) => {
        $(fn $visit<E: de::Error>(self, _: $type) -> Result<(), E> {
            self.arrived::<(), E>().map(|_| ())
        })*
    };
}

impl<'de> Visitor<'de> for Seek<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    arrive!(visit_bool: bool, visit_i64: i64, visit_u64: u64, visit_f64: f64, visit_str: &str);

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        self.arrived::<(), E>().map(|_| ())
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        self.arrived::<(), A::Error>()?;
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Seek { path, found } = self;
        let Some((first, rest)) = path.split_first() else {
            return Seek { path, found }.arrived::<(), A::Error>().map(|_| ());
        };
        while let Some(key) = map.next_key::<String>()? {
            if key == *first {
                map.next_value_seed(Seek { path: rest, found })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> ConfigFile {
        ConfigFile { path: "/c/x.yaml".into(), text: text.into() }
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Port {
        port: u16,
    }

    #[test]
    fn error_names_file_line_key_and_value() {
        let error =
            file("a: 1\nport: nine\n").parse::<std::collections::BTreeMap<String, u16>>().unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("/c/x.yaml:2: port: "), "{text}");
        assert!(text.contains("nine"), "{text}");
    }

    #[test]
    fn error_names_the_line_of_wrong_syntax() {
        let error = file("a: 1\nb: [1, 2\nc: 3\n").parse::<serde_yaml::Value>().unwrap_err();
        assert!(error.placed().unwrap().line.is_some(), "{error}");
    }

    #[test]
    fn error_finds_the_line_of_a_key_again() {
        let file = file("# top\nmachines:\n  one:\n    ip: 1\n  two:\n    ip: 1\n    tags: [a,\n      b]\n");
        let line = |key: &[&str]| file.error(key, "x").placed().unwrap().line;
        assert_eq!(line(&["machines", "two", "ip"]), Some(6));
        assert_eq!(line(&["machines", "two", "tags"]), Some(7));
        // A missing key has the line of the key above it.
        assert_eq!(line(&["machines", "two", "label"]), line(&["machines", "two"]));
        assert_eq!(line(&["nothing"]), None);
    }

    #[test]
    fn section_is_read_with_the_lines_of_the_file() {
        let file = file("other: {a: b}\nmachineries:\n  qemu:\n    port: 9\n  kvm:\n    prot: 9\n");
        assert_eq!(file.parse_at::<Port>(&["machineries", "qemu"]).unwrap(), Some(Port { port: 9 }));
        assert_eq!(file.parse_at::<Port>(&["machineries", "xen"]).unwrap(), None);
        let text = file.parse_at::<Port>(&["machineries", "kvm"]).unwrap_err().to_string();
        assert!(text.contains("/c/x.yaml:6: machineries.kvm: unknown key `prot`"), "{text}");
    }

    #[test]
    fn file_is_an_empty_mapping_when_it_is_empty() {
        for text in ["", "# only a comment\n", "---\n"] {
            assert_eq!(file(text).parse_at::<Port>(&["machineries", "qemu"]).unwrap(), None);
            assert!(file(text).parse::<Port>().unwrap_err().to_string().contains("missing key `port`"));
        }
    }
}
