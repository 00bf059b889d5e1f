//! Small files in the state folder that are replaced atomically, so that a crash leaves no partial content.

use std::fs;
use std::path::Path;

use machinery::{Error, Result};
use serde::Serialize;

/// Writes a record to a file. At any time the file has either its old content or the complete new one.
///
/// # Errors
/// The file cannot be written.
pub fn write_atomically(path: &Path, record: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(record).map_err(|error| {
        Error::failed(format!("a record for {} cannot be written: {error}", path.display()))
    })?;
    let mut new_file = path.as_os_str().to_owned();
    new_file.push(".new");
    fs::write(&new_file, text).map_err(|error| Error::io("write", Path::new(&new_file), &error))?;
    fs::rename(&new_file, path).map_err(|error| Error::io("replace", path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_replaces_the_old_one_and_leaves_no_other_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.run");
        for text in ["one", "two"] {
            write_atomically(&path, &text).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("\"{text}\""));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let error = write_atomically(&folder.path().join("none/m.run"), &"x").unwrap_err().to_string();
        assert!(error.contains("none/m.run.new"), "{error}");
    }
}
