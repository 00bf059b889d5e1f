//! Keeps the scratch folder of a failed check, if `MACHINERY_KEEP` is set.

use std::env;
use std::path::Path;

use tempfile::TempDir;

use crate::report::{CheckFailure, Result};

/// The environment variable.
const KEEP: &str = "MACHINERY_KEEP";

/// Reports whether the folders of failed checks are kept.
pub fn is_requested() -> bool {
    env::var_os(KEEP).is_some_and(|value| !value.is_empty() && value != "0")
}

/// Keeps the folder if the check failed and left files in it, and adds the path to the failure.
pub fn unless_passed(result: Result, folder: TempDir) -> Result {
    match result {
        Err(CheckFailure::Failed(how)) if is_requested() && !is_empty(folder.path()) => {
            Err(CheckFailure::Failed(format!("{how}\n      kept {}", folder.keep().display())))
        }
        result => result,
    }
}

fn is_empty(folder: &Path) -> bool {
    folder.read_dir().is_ok_and(|mut entries| entries.next().is_none())
}
