//! The files of packages.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::run::{Context, Result, step};

/// Makes a folder on the file system of the packages.
pub fn scratch_in(out: &Path) -> Result<tempfile::TempDir> {
    tempfile::tempdir_in(out).context(|| format!("cannot make a folder in {}", out.display()))
}

/// Makes a folder and its missing parents.
pub fn make_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).context(|| format!("cannot make {}", folder.display()))
}

/// Copies a file of the checkout or of the build, and makes its folder.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    make_folder(to.parent().unwrap_or(to))?;
    fs::copy(from, to).map(drop).context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

/// Writes a file, and makes its folder.
pub fn write(path: &Path, text: &str) -> Result<()> {
    make_folder(path.parent().unwrap_or(path))?;
    fs::write(path, text).context(|| format!("cannot write {}", path.display()))
}

/// Returns the text of a file.
pub fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).context(|| format!("cannot read {}", path.display()))
}

/// Removes the files in `folder` whose names match: those of earlier packages, whose versions may differ.
pub fn remove_earlier(folder: &Path, matches: impl Fn(&str) -> bool) -> Result<()> {
    let what = || format!("cannot tidy {}", folder.display());
    for entry in fs::read_dir(folder).context(what)? {
        let entry = entry.context(what)?;
        if entry.file_name().to_str().is_some_and(&matches) {
            fs::remove_file(entry.path()).context(what)?;
        }
    }
    Ok(())
}

/// Makes all files below a folder readable by everybody, and programs executable, whatever the umask and the checkout.
pub fn set_modes(folder: &Path) -> Result<()> {
    step(Command::new("chmod").args(["-R", "u=rwX,go=rX"]).arg(folder))
}
