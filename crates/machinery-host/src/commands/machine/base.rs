//! The installed disk of a machine, which has to stay as it was: the machine's own disk is an overlay of it.
//!
//! The description of a machine has the identity of each file of that disk. A write by another program nearly always makes
//! the file larger. A backup restores the size of a file, and may change its times.

use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use machinery_images::{Chain, FileId};

use super::info::Description;

const ADVICE: &str =
    "Put the old file back from a backup. Or remove the machine, and make it anew of this disk";

/// Returns the identities of the files of an installed disk.
///
/// # Errors
/// A file is missing, or cannot be read.
pub fn identify(base: &Path) -> Result<Vec<FileId>> {
    let identify =
        |file: &PathBuf| FileId::of_content(file).map_err(|error| Error::io("look at", file, &error));
    Chain::of(base, Some("qcow2"))?.files.iter().map(identify).collect()
}

/// Expects that the installed disk of a machine has not changed since its snapshot. Returns a warning about each file that
/// may have.
///
/// # Errors
/// A file has another size.
pub fn expect_unchanged(machine: &Description) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    for before in &machine.base_files {
        let path = before.path().display();
        match FileId::of_content(before.path()) {
            Ok(now) if now.size() != before.size() => {
                let reason = format!(
                    "the installed disk has changed since the machine's snapshot: {path} had {} bytes, and has {}",
                    before.size(),
                    now.size()
                );
                return Err(Error::environment(reason).machine(&machine.name).advice(ADVICE));
            }
            Ok(now) if now != *before => warnings.push(format!(
                "machine '{}': {path} of its installed disk was written or replaced since the machine's snapshot, and has \
                 its old size. If its content has changed, the machine's disk is damaged: remove the machine, and make \
                 it anew",
                machine.name
            )),
            // A missing file breaks the machine's own disk.
            Ok(_) | Err(_) => {}
        }
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::time::{Duration, SystemTime};

    use crate::commands::machine::info::tests::described;

    #[test]
    fn installed_disk_has_changed_with_another_size_and_may_have_with_another_time() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base");
        fs::write(&base, "installed").unwrap();
        let machine = Description { base_files: identify(&base).unwrap(), ..described(&[]).machine };
        assert_eq!(expect_unchanged(&machine).unwrap(), Vec::<String>::new());
        let touched = SystemTime::now() - Duration::from_secs(60);
        File::options().write(true).open(&base).unwrap().set_modified(touched).unwrap();
        let warnings = expect_unchanged(&machine).unwrap();
        assert!(matches!(&warnings[..], [warning] if warning.contains("has its old size")), "{warnings:?}");
        fs::write(&base, "booted once more").unwrap();
        let changed = expect_unchanged(&machine).unwrap_err().to_string();
        assert!(changed.contains("had 9 bytes, and has 16") && changed.contains("'m'"), "{changed}");
        // The plugin reports a machine whose disk is incomplete.
        fs::remove_file(&base).unwrap();
        assert!(expect_unchanged(&machine).unwrap().is_empty() && identify(&base).is_err());
    }
}
