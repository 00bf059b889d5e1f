//! The files that the check reads, and their division into texts.

use std::fs;
use std::path::Path;

use super::text::Text;
use super::{markup, rust};
use crate::run::{Context, Result};
use crate::tracked;

/// Ends of the names of files that the check reads.
const ENDINGS: [&str; 7] = [".rs", ".md", ".yaml", ".toml", ".py", ".service", ".sh"];

/// Starts of the paths of files that may contain forbidden phrases: the list itself, old words in the
/// glossary and the log of changes, licences, the frozen interface and the list's own tests.
const EXEMPT: [&str; 7] = [
    "xtask/prose.txt",
    "xtask/src/prose/",
    "docs/glossary.md",
    "CHANGELOG.md",
    "LICENSE",
    "tests/interfaces/1.0/",
    "Cargo.lock",
];

/// Returns the paths of all files that the check reads, relative to the checkout.
pub fn all(checkout: &Path) -> Result<Vec<String>> {
    let mut files = tracked::files(checkout)?;
    files.retain(|path| {
        ENDINGS.iter().any(|ending| path.ends_with(ending))
            && !EXEMPT.iter().any(|start| path.starts_with(start))
            && checkout.join(path).is_file()
    });
    Ok(files)
}

/// Reads a file and divides it into texts.
pub fn texts(checkout: &Path, path: &str) -> Result<Vec<Text>> {
    let content = fs::read_to_string(checkout.join(path)).context(|| format!("cannot read {path}"))?;
    Ok(match path.rsplit_once('.') {
        Some((_, "rs")) => rust::texts(&content),
        Some((_, "md")) => markup::markdown(&content),
        _ => markup::hash_comments(&content),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_by_their_ending_when_there_is_no_repository() {
        let folder = tempfile::tempdir().unwrap();
        for path in ["a.rs", "docs/b.md", "docs/glossary.md", "c.lock", "target/d.rs", ".ci/e.sh"] {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        assert_eq!(all(folder.path()).unwrap(), [".ci/e.sh", "a.rs", "docs/b.md"]);
    }
}
