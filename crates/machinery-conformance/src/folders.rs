//! The files and folders that a machinery has in its own folders.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use machinery::Setup;

/// Files and folders by path, each with the identity of its content.
pub type Listing = BTreeMap<PathBuf, Entry>;

/// A file, socket or folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub is_folder: bool,
    /// The number of the file. A file that is replaced gets another one.
    pub inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Entry {
    fn of(file: &Metadata) -> Self {
        let is_folder = file.is_dir();
        // The content of a folder is listed separately.
        let (size, changed) =
            if is_folder { (0, (0, 0)) } else { (file.len(), (file.mtime(), file.mtime_nsec())) };
        Entry { is_folder, inode: file.ino(), size, changed }
    }
}

/// Lists everything in the machinery's folders for state, sockets and caches.
pub fn list_all(setup: &Setup) -> Listing {
    let mut listing = Listing::new();
    for folder in [&setup.state_dir, &setup.sockets_dir, &setup.cache_dir] {
        list(folder, &mut listing);
    }
    listing
}

/// Lists what a run must remove: its sockets, and its folders in the state folder. A file in the state folder may be a
/// record that has to outlive the host.
pub fn list_runs(setup: &Setup) -> Listing {
    let mut listing = Listing::new();
    list(&setup.state_dir, &mut listing);
    listing.retain(|_, entry| entry.is_folder);
    list(&setup.sockets_dir, &mut listing);
    listing
}

/// Returns the entries of `now` that are not in `before`, or have another content there.
pub fn added(now: Listing, before: &Listing) -> Listing {
    now.into_iter().filter(|(path, entry)| before.get(path) != Some(entry)).collect()
}

fn list(folder: &Path, listing: &mut Listing) {
    // The machinery may remove an entry meanwhile, and need not have the folder.
    for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let Ok(file) = path.symlink_metadata() else { continue };
        if file.is_dir() {
            list(&path, listing);
        }
        listing.insert(path, Entry::of(&file));
    }
}
