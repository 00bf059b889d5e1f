//! The search for plugin files: from a name in the `machineries` list to a trusted file.
//!
//! The folders are searched in order, and the first file of a name counts. The search opens no file: loading
//! a library runs its code. [`trust`] ensures that no other user can change the file.
//! [`checksum`](super::checksum) ensures that the operator has listed its hash.

use std::env;
use std::path::{Path, PathBuf};

use machinery::{Error, Result};

use super::checksum::{AllowList, FileHash};
use super::trust;
use crate::cwd::Cwd;

/// The folders that are searched, and the plugins that are accepted.
#[derive(Debug, Clone)]
pub struct PluginSearch {
    /// The folders, in order.
    pub folders: Vec<PathBuf>,
    /// True if plugins that others could have changed are accepted.
    pub allow_insecure: bool,
}

/// Returns the folders that are searched, in order. Missing folders are left out.
pub fn folders(given: &[PathBuf], cwd: &Cwd) -> Vec<PathBuf> {
    let mut folders = given.to_vec();
    if let Some(list) = env::var_os("CUCKOO_MACHINERY_PLUGINS") {
        folders.extend(env::split_paths(&list).filter(|folder| !folder.as_os_str().is_empty()));
    }
    folders.push(cwd.plugins());
    if let Some(own) = env::current_exe().ok().as_deref().and_then(Path::parent) {
        folders.push(own.join("../lib/cuckoo-machinery"));
        folders.push(own.to_owned());
    }
    folders.retain(|folder| folder.is_dir());
    folders
}

/// Returns the plugin files in the folders, by machinery name. The first file of a name counts.
pub fn available(folders: &[PathBuf]) -> Vec<(String, PathBuf)> {
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    for folder in folders {
        let Ok(entries) = folder.read_dir() else { continue };
        let mut here: Vec<_> = entries.flatten().filter_map(|entry| named(&entry.path())).collect();
        here.sort();
        for (name, path) in here {
            if found.iter().all(|(known, _)| *known != name) {
                found.push((name, path));
            }
        }
    }
    found
}

fn named(path: &Path) -> Option<(String, PathBuf)> {
    let name = path.file_name()?.to_str()?.strip_prefix("libmachinery_")?.strip_suffix(".so")?;
    Some((name.to_owned(), path.to_owned()))
}

/// Returns the first plugin file of that name in the folders.
pub fn find(name: &str, folders: &[PathBuf]) -> Option<PathBuf> {
    let paths = |folder: &PathBuf| files_of(name).map(|file| folder.join(file));
    folders.iter().flat_map(paths).find(|path| path.exists())
}

/// Returns the file names of a machinery. Cargo replaces `-` by `_` in library names; both are accepted.
fn files_of(name: &str) -> [String; 2] {
    [name.to_owned(), name.replace('-', "_")].map(|name| format!("libmachinery_{name}.so"))
}

/// Reports whether the name of an [`available`] file is listed.
pub fn is_listed(file: &str, listed: &[String]) -> bool {
    listed.iter().any(|name| name == file || name.replace('-', "_") == file)
}

/// Expects that a plugin file is trusted, and returns its resolved path and its hash.
///
/// # Errors
/// Others could have changed the file, or it is not on the list of hashes.
pub fn trusted(
    name: &str,
    found: &Path,
    search: &PluginSearch,
    allowed: Option<&AllowList>,
) -> Result<(PathBuf, FileHash)> {
    let path = trust::resolve(name, found, search.allow_insecure)?;
    let sha256 = FileHash::of(&path)?;
    if let Some(list) = allowed {
        list.expect(name, &path, &sha256)?;
    }
    Ok((path, sha256))
}

/// Returns the error for a name without a plugin file.
pub fn not_found(name: &str, folders: &[PathBuf]) -> Error {
    let searched: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    let there: Vec<String> = available(folders).into_iter().map(|(name, _)| name).collect();
    let there = if there.is_empty() { "no plugin at all".to_owned() } else { there.join(", ") };
    Error::configuration(format!(
        "there is no plugin for the machinery '{name}': no libmachinery_{name}.so in {}; found there: {there}",
        searched.join(", ")
    ))
    .advice("Correct the name in cuckoo.yaml, put the plugin into one of these folders, or give its folder with --plugin-dir")
}

/// The plugin file that was loaded.
#[derive(Debug, PartialEq, Eq)]
pub struct PluginFile {
    /// The path of the file, with all links resolved.
    pub path: PathBuf,
    /// The hash of the file when it was loaded.
    pub sha256: FileHash,
}

impl PluginFile {
    /// Reports whether the same file would be loaded now.
    pub fn is_current(&self, name: &str, search: &PluginSearch) -> bool {
        let found = find(name, &search.folders).and_then(|found| trusted(name, &found, search, None).ok());
        found.is_some_and(|(path, sha256)| path == self.path && sha256 == self.sha256)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Makes folders with these files, and returns the paths of the folders.
    fn folders(files: [&[&str]; 2]) -> (tempfile::TempDir, Vec<PathBuf>) {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        let folders = vec![root.join("first"), root.join("second")];
        for (folder, names) in folders.iter().zip(files) {
            fs::create_dir(folder).unwrap();
            names.iter().for_each(|name| fs::write(folder.join(name), name).unwrap());
        }
        (scratch, folders)
    }

    #[test]
    fn first_file_of_a_name_counts_when_folders_share_one() {
        let (_scratch, folders) = folders([
            &["libmachinery_b.so", "libmachinery_a.so", "libother.so", "libmachinery_c.txt"],
            &["libmachinery_a.so", "libmachinery_d.so"],
        ]);
        let path = |folder: usize, file: &str| folders[folder].join(file);
        let expected = [
            ("a".to_owned(), path(0, "libmachinery_a.so")),
            ("b".to_owned(), path(0, "libmachinery_b.so")),
            ("d".to_owned(), path(1, "libmachinery_d.so")),
        ];
        assert_eq!(available(&folders), expected);
        for (name, path) in expected {
            assert_eq!(find(&name, &folders), Some(path));
        }
        assert_eq!(find("c", &folders), None);
    }

    #[test]
    fn hyphen_of_a_name_is_found_as_an_underscore_of_the_file() {
        let (_scratch, folders) = folders([&["libmachinery_my_own.so"], &[]]);
        assert_eq!(find("my-own", &folders), Some(folders[0].join("libmachinery_my_own.so")));
        let listed = ["my-own".to_owned(), "kvm".to_owned()];
        for (file, expected) in [("my_own", true), ("my-own", true), ("kvm", true), ("my", false)] {
            assert_eq!(is_listed(file, &listed), expected, "{file}");
        }
    }

    #[test]
    fn plugin_file_is_current_until_its_path_or_content_changes() {
        let (_scratch, folders) = folders([&[], &["libmachinery_a.so"]]);
        let search = PluginSearch { folders: folders.clone(), allow_insecure: true };
        let (path, sha256) = trusted("a", &folders[1].join("libmachinery_a.so"), &search, None).unwrap();
        let file = PluginFile { path, sha256 };
        assert!(file.is_current("a", &search));
        let first = folders[0].join("libmachinery_a.so");
        fs::copy(&file.path, &first).unwrap();
        assert!(!file.is_current("a", &search), "the same content in another file");
        fs::remove_file(&first).unwrap();
        fs::write(&file.path, "changed").unwrap();
        assert!(!file.is_current("a", &search), "another content in the same file");
        fs::remove_file(&file.path).unwrap();
        assert!(!file.is_current("a", &search), "no file");
    }

    #[test]
    fn search_leaves_out_folders_that_are_missing() {
        let (_scratch, given) = folders([&[], &[]]);
        let missing = given[0].join("missing");
        fs::write(given[1].join(".cuckoocwd"), "").unwrap();
        let cwd = Cwd::find(Some(&given[1])).unwrap();
        let found = super::folders(&[missing.clone(), given[0].clone()], &cwd);
        assert!(found.contains(&given[0]) && !found.contains(&missing), "{found:?}");
    }
}
