//! The SHA-256 of plugin files, and the optional list `plugin_hashes` in `machinery-host.yaml`.
//!
//! With a list, the host loads only plugins whose hash is listed. The hash is that of the whole file, as
//! `sha256sum` prints it.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::Path;

use machinery::config::ConfigFile;
use machinery::{Error, Result};
use serde_yaml::{Mapping, Value};
use sha2::{Digest, Sha256};

/// The key of the list.
const KEY: &str = "plugin_hashes";
/// The prefix of a hash in the list. It names the algorithm, so that others can be added.
const PREFIX: &str = "sha256:";

/// The SHA-256 of a plugin file, in lowercase hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHash(String);

impl FileHash {
    /// Returns the hash of a file as it is now.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn of(file: &Path) -> Result<Self> {
        let content = fs::read(file).map_err(|error| Error::io("read the plugin", file, &error))?;
        let digest = Sha256::digest(content);
        Ok(FileHash(digest.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(PREFIX)?;
        let valid = digits.len() == 64 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        valid.then(|| FileHash(digits.to_ascii_lowercase()))
    }
}

impl fmt::Display for FileHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The hashes of the files that may be loaded for each machinery. Several hashes for a machinery make an
/// upgrade easy.
#[derive(Debug, Clone)]
pub struct AllowList {
    file: ConfigFile,
    hashes: HashMap<String, Vec<FileHash>>,
}

impl AllowList {
    /// Reads the list that was parsed from `file`, and adds its faults to `problems`.
    pub fn read(file: &ConfigFile, list: &Mapping, problems: &mut Vec<Error>) -> Self {
        let mut hashes = HashMap::new();
        for (name, value) in list {
            let name = name.as_str().unwrap_or_default();
            match parse_hashes(value) {
                Ok(listed) => {
                    hashes.insert(name.to_owned(), listed);
                }
                Err(wrong) => problems.push(
                    file.error(&[KEY, name], format!("{wrong} is not the hash of a plugin"))
                        .advice(format!("Write \"{PREFIX}\" and the 64 hexadecimal digits that `sha256sum` gives, or a list of such")),
                ),
            }
        }
        AllowList { file: file.clone(), hashes }
    }

    /// Expects that a hash is listed for this machinery.
    ///
    /// # Errors
    /// The hash is not listed; the error shows the line to add.
    pub fn expect(&self, machinery: &str, plugin: &Path, hash: &FileHash) -> Result<()> {
        let listed = self.hashes.get(machinery).map(Vec::as_slice).unwrap_or_default();
        if listed.contains(hash) {
            return Ok(());
        }
        let known: Vec<String> = listed.iter().map(|hash| format!("{PREFIX}{hash}")).collect();
        let known = if known.is_empty() { "no hash".to_owned() } else { known.join(", ") };
        let reason = format!(
            "refusing to load {}: its hash is {PREFIX}{hash}, listed for it is {known}",
            plugin.display()
        );
        let advice = format!(
            "If this very file is to be trusted, write `{machinery}: \"{PREFIX}{hash}\"` under `{KEY}`"
        );
        Err(self.file.error(&[KEY, machinery], reason).advice(advice))
    }
}

/// Parses one hash or a list of hashes. The error is the text of an element that is no hash.
fn parse_hashes(value: &Value) -> Result<Vec<FileHash>, String> {
    let one = |value: &Value| value.as_str().and_then(FileHash::parse).ok_or_else(|| yaml_text(value));
    match value {
        Value::Sequence(several) => several.iter().map(one).collect(),
        value => one(value).map(|hash| vec![hash]),
    }
}

fn yaml_text(value: &Value) -> String {
    match value.as_str() {
        Some(text) => format!("'{text}'"),
        None => {
            serde_yaml::to_string(value).map_or_else(|_| "this".to_owned(), |text| text.trim_end().to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    /// Reads the list in a file with this text, or returns its faults.
    fn list(text: &str) -> Result<AllowList, String> {
        let file = ConfigFile { path: "/c/machinery-host.yaml".into(), text: text.into() };
        let mapping = file.parse_at::<Mapping>(&[KEY]).unwrap().unwrap();
        let mut problems = Vec::new();
        let list = AllowList::read(&file, &mapping, &mut problems);
        Error::all(problems).map_or(Ok(list), |error| Err(error.to_string()))
    }

    fn hash_of(content: &str) -> FileHash {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.so");
        fs::write(&file, content).unwrap();
        FileHash::of(&file).unwrap()
    }

    #[test]
    fn file_hash_equals_sha256sum() {
        assert_eq!(hash_of("").to_string(), EMPTY);
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hash_of("abc").to_string(), abc);
        let error = FileHash::of(Path::new("/none/x.so")).unwrap_err().to_string();
        assert!(error.contains("/none/x.so"), "{error}");
    }

    #[test]
    fn allow_list_accepts_one_hash_or_several() {
        let (one, other) = (hash_of(""), hash_of("other"));
        let text = format!(
            "plugin_hashes:\n  a: sha256:{one}\n  b: ['sha256:{other}', \"sha256:{}\"]\n  c: []\n",
            EMPTY.to_uppercase()
        );
        let list = list(&text).unwrap();
        let allowed = |name: &str, hash: &FileHash| list.expect(name, Path::new("/p/x.so"), hash).is_ok();
        assert!(allowed("a", &one) && allowed("b", &one) && allowed("b", &other));
        assert!(!allowed("a", &other) && !allowed("c", &one) && !allowed("d", &one));
    }

    #[test]
    fn allow_list_refuses_an_unlisted_file_with_the_line_to_write() {
        let (one, other) = (hash_of(""), hash_of("other"));
        let list = list(&format!("plugin_hashes:\n  a: sha256:{one}\n")).unwrap();
        let text = list.expect("a", Path::new("/p/x.so"), &other).unwrap_err().to_string();
        let place = "/c/machinery-host.yaml:2: plugin_hashes.a: ";
        let both = format!("its hash is sha256:{other}, listed for it is sha256:{one}");
        let line = format!("write `a: \"sha256:{other}\"`");
        for word in [place, "/p/x.so", &both, &line] {
            assert!(text.contains(word), "{word:?} is not in: {text}");
        }
        let text = list.expect("b", Path::new("/p/x.so"), &other).unwrap_err().to_string();
        assert!(text.contains("plugin_hashes.b: ") && text.contains("listed for it is no hash"), "{text}");
    }

    #[test]
    fn allow_list_refuses_a_value_that_is_no_hash() {
        for wrong in [
            EMPTY,
            "sha256:abc",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
            &format!("sha256:{}", EMPTY.replace('e', "g")),
            &format!("[sha256:{EMPTY}, sha512:{EMPTY}]"),
            "12",
            "{x: 1}",
            "",
        ] {
            let text = list(&format!("plugin_hashes:\n  a: {wrong}\n")).unwrap_err();
            let words =
                ["/c/machinery-host.yaml:2: plugin_hashes.a: ", "is not the hash", "\"sha256:\" and the 64"];
            for word in words {
                assert!(text.contains(word), "{word:?} is not in: {text}");
            }
        }
    }
}
