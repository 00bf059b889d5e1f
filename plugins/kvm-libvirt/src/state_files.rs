//! Small files in the state folder that stay whole whenever this process or the computer stops.

use std::fs;
use std::path::Path;

use machinery::{Error, Result};
use serde::Serialize;

/// Writes a record to a file. At any time the file has either its old content or all of the new one.
///
/// # Errors
/// The file cannot be written.
pub fn write_atomically(path: &Path, record: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(record).map_err(|error| {
        Error::failed(format!("a record for {} cannot be written: {error}", path.display()))
    })?;
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".new");
    fs::write(&unfinished, text).map_err(|error| Error::io("write", Path::new(&unfinished), &error))?;
    fs::rename(&unfinished, path).map_err(|error| Error::io("replace", path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_replaces_the_old_one_and_leaves_nothing_beside_it() {
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
