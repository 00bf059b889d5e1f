//! Finds the plugin that the build made.
//!
//! | command | folder of the library |
//! | --- | --- |
//! | `cargo build` | `<target>/<profile>/` |
//! | `cargo test`, of a library of the types `cdylib` and `rlib` | `<target>/<profile>/deps/`, beside the test program |
//! | `cargo test`, of a `cdylib` alone | not built: a test cannot link to it |

use std::env;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};

/// Returns the folder of the build: that of the running program, or the one above a test's `deps`.
///
/// # Errors
/// The path of the running program is unknown, or has no folder.
pub fn folder() -> Result<PathBuf> {
    let own = env::current_exe().map_err(|error| {
        Error::environment(format!(
            "cannot find the folder of the build, because the path of this program is unknown: {error}"
        ))
    })?;
    let folder = match own.parent() {
        Some(folder) if folder.ends_with("deps") => folder.parent(),
        folder => folder,
    };
    let folder = folder.map(Path::to_owned);
    folder.ok_or_else(|| Error::environment(format!("{} is not in the folder of a build", own.display())))
}

/// Returns the most recently built library of that machinery. Cargo replaces `-` with `_` in library names.
///
/// # Errors
/// The library was not built. The error contains the command to build it.
pub fn plugin(name: &str) -> Result<PathBuf> {
    newest(&folder()?, &format!("libmachinery_{}.so", name.replace('-', "_")))
}

fn newest(folder: &Path, file: &str) -> Result<PathBuf> {
    let places = [folder.join("deps").join(file), folder.join(file)];
    let built = |path: PathBuf| Some((path.metadata().and_then(|file| file.modified()).ok()?, path));
    let newest = places.into_iter().filter_map(built).max();
    newest.map(|(_, path)| path).ok_or_else(|| {
        Error::environment(format!("there is no {file} in {} nor in its folder deps", folder.display()))
            .advice(
                "Give the plugin's library `crate-type = [\"cdylib\", \"rlib\"]`, so that `cargo test` builds \
                 it, or run `cargo build --workspace` first",
            )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::time::{Duration, SystemTime};

    #[test]
    fn newest_library_is_found_in_both_folders() {
        let folder = tempfile::tempdir().unwrap();
        let (file, hour) = ("libmachinery_x.so", Duration::from_secs(3600));
        let error = newest(folder.path(), file).unwrap_err().to_string();
        assert!(error.contains("rlib"), "{error}");
        fs::create_dir(folder.path().join("deps")).unwrap();
        let (tested, built) = (folder.path().join("deps").join(file), folder.path().join(file));
        File::create(&tested).unwrap();
        assert_eq!(newest(folder.path(), file).unwrap(), tested);
        File::create(&built).unwrap().set_modified(SystemTime::now() + hour).unwrap();
        assert_eq!(newest(folder.path(), file).unwrap(), built);
        File::open(&built).unwrap().set_modified(SystemTime::now() - hour).unwrap();
        assert_eq!(newest(folder.path(), file).unwrap(), tested);
    }
}
