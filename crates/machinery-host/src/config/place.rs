//! Values that name a place: an address, a file, a socket. An empty value names none.

use std::path::{Path, PathBuf};

use machinery::Result;
use machinery::config::checked;
use serde::Deserializer;

/// Reads and parses a value, unless it is empty.
pub fn place<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, D::Error> {
    checked(deserializer, |text| match text.trim() {
        "" | "~" | "null" => Ok(None),
        text => parse(text).map(Some),
    })
}

/// Returns the path of a file that may not exist yet, in a folder that does.
pub fn in_existing_folder(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    match path.parent() {
        Some(folder) if folder.is_dir() && path.file_name().is_some() => Ok(path.to_owned()),
        _ => Err(format!("the folder of '{text}' does not exist: create it, or correct the path")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(yaml: &str) -> Option<PathBuf> {
        place(serde_yaml::Deserializer::from_str(yaml), in_existing_folder).unwrap()
    }

    #[test]
    fn place_is_none_when_the_value_is_empty() {
        for yaml in ["''", "~", "null"] {
            assert_eq!(read(yaml), None, "{yaml}");
        }
        assert_eq!(read("' /tmp/file '"), Some("/tmp/file".into()));
    }

    #[test]
    fn folder_of_a_file_exists() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| in_existing_folder(&folder.path().join(name).to_string_lossy());
        assert_eq!(file("new").unwrap(), folder.path().join("new"));
        for bad in ["none/new", "none/.."] {
            assert!(file(bad).unwrap_err().contains("does not exist"), "{bad}");
        }
    }
}
