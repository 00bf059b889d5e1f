//! Circles of files that need each other.

use std::collections::{BTreeMap, BTreeSet};

use crate::edges::Edge;
use crate::tree::{FileId, Tree};

/// Describes each circle: its files, and the lines that close it.
pub fn circles(tree: &Tree, edges: &BTreeSet<Edge>) -> Vec<String> {
    let mut reached: BTreeMap<FileId, BTreeSet<FileId>> = BTreeMap::new();
    for file in 0..tree.files.len() {
        reached.insert(file, reachable(file, edges));
    }
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for file in 0..tree.files.len() {
        let ring: BTreeSet<FileId> =
            reached[&file].iter().copied().filter(|other| reached[other].contains(&file)).collect();
        if ring.contains(&file) && seen.insert(ring.clone()) {
            found.push(describe(tree, edges, &ring));
        }
    }
    found
}

fn reachable(file: FileId, edges: &BTreeSet<Edge>) -> BTreeSet<FileId> {
    let mut reached = BTreeSet::new();
    let mut open = vec![file];
    while let Some(from) = open.pop() {
        for edge in edges.iter().filter(|edge| edge.from == from) {
            if reached.insert(edge.to) {
                open.push(edge.to);
            }
        }
    }
    reached
}

fn describe(tree: &Tree, edges: &BTreeSet<Edge>, ring: &BTreeSet<FileId>) -> String {
    let names: Vec<&str> = ring.iter().map(|file| tree.files[*file].shown.as_str()).collect();
    let mut pairs: BTreeMap<(FileId, FileId), Vec<String>> = BTreeMap::new();
    for edge in edges.iter().filter(|edge| ring.contains(&edge.from) && ring.contains(&edge.to)) {
        let use_ = format!("{} {}", edge.line, edge.path);
        pairs.entry((edge.from, edge.to)).or_default().push(use_);
    }
    let mut text = format!("circle of {} files: {}", names.len(), names.join(", "));
    for ((from, to), uses) in pairs {
        let more = if uses.len() > 3 { format!(", and {} more", uses.len() - 3) } else { String::new() };
        let uses = uses[..uses.len().min(3)].join(", ");
        text += &format!("\n    {} -> {}: line {uses}{more}", tree.files[from].shown, tree.files[to].shown);
    }
    text
}
