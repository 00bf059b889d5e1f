//! The files of a checkout.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::run::{Context, Result};

/// Returns the paths of the files that git tracks, relative to `checkout`; outside of a repository, of all
/// files except build output.
pub fn files(checkout: &Path) -> Result<Vec<String>> {
    let listed = Command::new("git").arg("-C").arg(checkout).args(["ls-files", "-z"]).output();
    let mut files = match listed {
        Ok(listed) if listed.status.success() => {
            let names = String::from_utf8_lossy(&listed.stdout);
            names.split_terminator('\0').map(str::to_owned).collect()
        }
        _ => {
            let mut files = Vec::new();
            walk(checkout, "", &mut files)?;
            files
        }
    };
    files.sort();
    Ok(files)
}

fn walk(checkout: &Path, folder: &str, files: &mut Vec<String>) -> Result<()> {
    let what = || format!("cannot list {}", checkout.join(folder).display());
    for entry in fs::read_dir(checkout.join(folder)).context(what)? {
        let entry = entry.context(what)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        let kind = entry.file_type().context(what)?;
        if kind.is_file() {
            files.push(path);
        } else if kind.is_dir() && name != "target" && name != ".git" {
            walk(checkout, &path, files)?;
        }
    }
    Ok(())
}
