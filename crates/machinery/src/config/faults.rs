//! Reports all faults in the form of a file at once.
//!
//! The parser ends at the first fault. This module therefore repairs each fault in a copy: it removes a wrong
//! value or an unknown key, and inserts a missing one. It then reads the copy again, until the parser finds
//! no fault.

use std::collections::BTreeSet;

use serde_yaml::{Error as YamlError, Mapping, Value};

use super::file::ConfigFile;
use crate::{Error, Place};

/// The maximum number of faults in one report.
const MAX_FAULTS: usize = 20;

/// The size above which only the first fault of a file is reported: each round reads the whole file.
const MAX_SIZE: usize = 1 << 20;

/// A fault, as the parser describes it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Fault {
    /// The keys that lead to the fault.
    path: Vec<String>,
    kind: Kind,
    reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Unknown(String),
    Missing(String),
    Value,
}

/// Returns every fault of the file. `first` is already known; `read` returns the first fault of another text.
pub(super) fn all(file: &ConfigFile, first: &YamlError, read: impl Fn(&str) -> Option<YamlError>) -> Error {
    let mut fault = Fault::of(first);
    let mut found = vec![fault.error(file, first.location().map(|at| at.line()))];
    let copy = serde_yaml::from_str(&file.text).ok().filter(|_| file.text.len() <= MAX_SIZE);
    let Some(mut copy): Option<Value> = copy else { return found.swap_remove(0) };
    let mut removed = BTreeSet::new();
    let mut seen = BTreeSet::from([fault.clone()]);
    while found.len() < MAX_FAULTS && fault.repair(&mut copy, &mut removed) {
        let next = serde_yaml::to_string(&copy).ok().and_then(|text| read(&text));
        let Some(next) = next.map(|next| Fault::of(&next)).filter(|next| seen.insert(next.clone())) else {
            break;
        };
        // A key that is missing because it was removed has already been reported.
        if !removed.contains(&next.place()) {
            found.push(next.error(file, file.line_of(&next.place_parts())));
        }
        fault = next;
    }
    Error::all(found).unwrap_or_else(|| file.error(&[], "it does not have the expected form"))
}

impl Fault {
    /// Parses an error of `serde_yaml`, which has the form `key.path: reason at line L column C`.
    fn of(error: &YamlError) -> Fault {
        let mut reason = error.to_string();
        if let Some(at) = reason.rfind(" at line ") {
            reason.truncate(at);
        }
        let (path, reason) = match reason.split_once(": ") {
            Some((key, rest)) if looks_like_key(key) => {
                (key.split('.').map(str::to_owned).collect(), rest.to_owned())
            }
            _ => (Vec::new(), reason),
        };
        let named = |before: &str| reason.strip_prefix(before)?.split('`').next().map(str::to_owned);
        let unknown = named("unknown field `").map(Kind::Unknown);
        let kind = unknown.or_else(|| named("missing field `").map(Kind::Missing)).unwrap_or(Kind::Value);
        Fault { path, kind, reason: in_yaml_words(&reason) }
    }

    fn error(&self, file: &ConfigFile, line: Option<usize>) -> Error {
        let key = (!self.path.is_empty()).then(|| self.path.join("."));
        Error::configuration(&self.reason).place(Place { file: file.path.clone(), line, key })
    }

    /// Returns the keys that lead to the faulty value.
    fn place(&self) -> Vec<String> {
        let name = match &self.kind {
            Kind::Unknown(name) | Kind::Missing(name) => Some(name.clone()),
            Kind::Value => None,
        };
        self.path.iter().map(|key| without_index(key).to_owned()).chain(name).collect()
    }

    fn place_parts(&self) -> Vec<&str> {
        let name = match &self.kind {
            Kind::Unknown(name) | Kind::Missing(name) => Some(name.as_str()),
            Kind::Value => None,
        };
        self.path.iter().map(|key| without_index(key)).chain(name).collect()
    }

    /// Repairs the fault in the copy; returns `false` if that is not possible.
    fn repair(&self, copy: &mut Value, removed: &mut BTreeSet<Vec<String>>) -> bool {
        let place = self.place();
        let Some((last, above)) = place.split_last() else { return false };
        let Some(mapping) = mapping_at(copy, above) else { return false };
        if let Kind::Missing(_) = self.kind {
            // The value 1 is valid as a text and as a number.
            mapping.insert(last.as_str().into(), 1.into());
            return true;
        }
        let was_there = mapping.remove(last.as_str()).is_some();
        removed.insert(place);
        was_there
    }
}

fn mapping_at<'a>(value: &'a mut Value, path: &[String]) -> Option<&'a mut Mapping> {
    let found = path.iter().try_fold(value, |value, key| value.as_mapping_mut()?.get_mut(key.as_str()));
    found?.as_mapping_mut()
}

/// Removes the index from a path part such as `tags[1]`.
fn without_index(key: &str) -> &str {
    key.split('[').next().unwrap_or(key)
}

fn looks_like_key(text: &str) -> bool {
    !text.contains(' ') || text.contains('.')
}

/// Rewords a reason without Rust's types, which an operator does not know.
fn in_yaml_words(reason: &str) -> String {
    let reason = reason.replace("unknown field ", "unknown key ").replace("missing field ", "missing key ");
    match reason.split_once("expected struct ") {
        Some((before, _)) => format!("{before}expected keys with their values"),
        None => reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Inner {
        name: String,
        port: u16,
        #[serde(default)]
        tags: Vec<String>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Outer {
        first: Inner,
        second: Inner,
    }

    fn faults(text: &str) -> String {
        let file = ConfigFile { path: "/c/x.yaml".into(), text: text.into() };
        file.parse::<Outer>().unwrap_err().to_string()
    }

    #[test]
    fn faults_are_reported_together_when_a_file_has_several() {
        let text = "first:\n  nmae: a\n  port: many\n  tags: {a: b}\nsecond: {}\nthird: 1\n";
        let text = faults(text);
        for words in [
            "/c/x.yaml:2: first: unknown key `nmae`",
            "/c/x.yaml:3: first.port: invalid type",
            "/c/x.yaml:4: first.tags: invalid type",
            "first: missing key `name`",
            "second: missing key `name`",
            "second: missing key `port`",
            "/c/x.yaml:6: unknown key `third`",
        ] {
            assert!(text.contains(words), "no {words:?} in {text}");
        }
        // The port was present, but wrong.
        assert!(text.starts_with("7 problems:"), "{text}");
    }

    #[test]
    fn faults_name_no_rust_type() {
        for text in ["- a\n", "first: 7\nsecond: []\n"] {
            let text = faults(text);
            assert!(!text.contains("struct") && text.contains("expected keys with their values"), "{text}");
        }
        assert!(faults("first: [\n").contains("/c/x.yaml:"));
    }
}
