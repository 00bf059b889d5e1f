//! The layout of the source: modules of a crate depend on each other in one direction, and files and
//! functions stay small.
//!
//! `SOURCE_LAYOUT_ROOT` chooses another source tree than this one, `SOURCE_LAYOUT_FLOORS` another list.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

mod circles;
mod edges;
mod floors;
mod limits;
mod made_up;
mod names;
mod tree;

use std::fs;
use std::path::{Path, PathBuf};

use floors::Floors;
use tree::Tree;

/// Describes all violations of the crates below `root`.
fn violations(root: &Path, floors: &Floors) -> Result<Vec<String>, String> {
    let crates = crates(root);
    let mut found = Vec::new();
    for folder in &crates {
        let tree = Tree::read(root, folder)?;
        let edges = edges::edges(&tree);
        found.extend(circles::circles(&tree, &edges).into_iter().map(|text| format!("{folder}: {text}")));
        match floors.get(folder) {
            Some(floors) => {
                let up = floors::violations(&tree, &edges, floors);
                found.extend(up.into_iter().map(|text| format!("{folder}: {text}")));
            }
            None => found.push(format!("{folder} has no section in the list of floors")),
        }
        found.extend(tree.files.iter().flat_map(limits::violations));
    }
    let unknown = floors.keys().filter(|name| !crates.contains(name));
    found.extend(unknown.map(|name| format!("the list of floors has a crate {name} that does not exist")));
    Ok(found)
}

/// Returns the folders of all crates, relative to `root`.
fn crates(root: &Path) -> Vec<String> {
    let below = |parent: &str| {
        let entries = fs::read_dir(root.join(parent)).into_iter().flatten().flatten();
        let names = entries.map(|entry| format!("{parent}/{}", entry.file_name().to_string_lossy()));
        names.collect::<Vec<_>>()
    };
    let mut crates = below("crates");
    crates.extend(below("plugins"));
    crates.push("xtask".to_owned());
    crates.retain(|folder| root.join(folder).join("src").is_dir());
    crates.sort();
    crates
}

#[test]
fn workspace_keeps_its_layout() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let chosen = |name| std::env::var_os(name).map(PathBuf::from);
    let root = chosen("SOURCE_LAYOUT_ROOT").unwrap_or_else(|| own.join(".."));
    let list = chosen("SOURCE_LAYOUT_FLOORS").unwrap_or_else(|| own.join("floors.txt"));
    let floors = floors::parse(&fs::read_to_string(list).unwrap()).unwrap();
    let found = violations(&root, &floors).unwrap();
    assert!(found.is_empty(), "{} violations:\n{}", found.len(), found.join("\n"));
}
