//! The floors of each crate: a module may use those below it, and none above.
//!
//! In the list, a section `[crates/name]` has one floor a line, the top first. A line holds the names of
//! modules; a name holds for the module's children too, unless they have a name of their own there.

use std::collections::{BTreeMap, BTreeSet};

use crate::edges::Edge;
use crate::tree::Tree;

/// The floor of each listed module, by crate: 0 is the top.
pub type Floors = BTreeMap<String, BTreeMap<String, usize>>;

/// Reads the list.
pub fn parse(text: &str) -> Result<Floors, String> {
    let mut floors = Floors::new();
    let mut section: Option<String> = None;
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            floors.insert(name.to_owned(), BTreeMap::new());
            section = Some(name.to_owned());
            continue;
        }
        for name in line.split_whitespace() {
            let modules = section.as_ref().and_then(|section| floors.get_mut(section));
            let modules = modules.ok_or_else(|| format!("line {}: no section before it", number + 1))?;
            if modules.insert(name.to_owned(), number).is_some() {
                return Err(format!("line {}: {name} is listed twice", number + 1));
            }
        }
    }
    Ok(floors)
}

/// Describes each edge that goes up, each file without a floor, and each listed module that does not exist.
pub fn violations(tree: &Tree, edges: &BTreeSet<Edge>, floors: &BTreeMap<String, usize>) -> Vec<String> {
    let mut found = Vec::new();
    let mut used = BTreeSet::new();
    let placed: Vec<Option<usize>> = tree
        .files
        .iter()
        .map(|file| {
            let listed = listed(&file.name, floors);
            used.extend(listed);
            if listed.is_none() {
                found.push(format!("{}: module {} has no floor in the list", file.shown, file.name));
            }
            listed.map(|name| floors[name])
        })
        .collect();
    let mut reported = BTreeSet::new();
    for edge in edges {
        let (from, to) = (&tree.files[edge.from], &tree.files[edge.to]);
        let goes_up = matches!((placed[edge.from], placed[edge.to]), (Some(from), Some(to)) if from > to);
        if goes_up && reported.insert((edge.from, edge.to)) {
            let path = &edge.path;
            found.push(format!("{}:{}: {path} goes up to {}", from.shown, edge.line, to.name));
        }
    }
    let unknown = floors.keys().filter(|name| !used.contains(name));
    found.extend(unknown.map(|name| format!("the list has a module {name} that does not exist")));
    found
}

/// The longest listed name that holds for the module.
fn listed<'a>(module: &str, floors: &'a BTreeMap<String, usize>) -> Option<&'a String> {
    let holds =
        |name: &str| module.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    floors.keys().filter(|name| holds(name)).max_by_key(|name| name.len())
}
