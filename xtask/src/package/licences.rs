//! The licences of the crates that the programs contain.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::release::PLUGINS;
use crate::run::{Context, Failure, Result, cargo, output};

/// The packages whose programs are installed.
const PROGRAMS: [&str; 2] = ["machinery-host", "machinery-jail"];

/// The beginnings of the names of licence files, in capitals.
const FILES: [&str; 5] = ["LICENSE", "LICENCE", "COPYING", "NOTICE", "COPYRIGHT"];

/// Returns the text: each crate with its licence, and each text with the crates that it is of.
///
/// # Errors
/// Cargo cannot find the crates, or a crate has no licence.
pub fn text() -> Result<String> {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let metadata = output(&mut cargo(["metadata", "--format-version=1", "--filter-platform", &platform]))?;
    let metadata: Value =
        serde_json::from_str(&metadata).context(|| "reading cargo's metadata".to_owned())?;
    let mut list = String::new();
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in contained(&metadata) {
        let name = format!("{} {}", word(package, "name"), word(package, "version"));
        let licence = package["license"].as_str().ok_or_else(|| {
            Failure::Message(format!("the crate {name} has no licence: see its repository"))
        })?;
        list += &format!("{name}: {licence}, {}\n", word(package, "repository"));
        let folder = Path::new(word(package, "manifest_path")).parent().unwrap_or(Path::new("/"));
        for text in texts_in(folder)? {
            texts.entry(text).or_default().push(name.clone());
        }
    }
    let mut text = format!("The programs contain these crates:\n\n{list}");
    for (licence, crates) in texts {
        text += &format!("\n{}\n{}:\n\n{}\n", "=".repeat(80), crates.join(", "), licence.trim_end());
    }
    Ok(text)
}

fn word<'a>(package: &'a Value, key: &str) -> &'a str {
    package[key].as_str().unwrap_or_default()
}

/// Returns the crates of the registry that the programs and plugins contain, in the order of their names.
fn contained(metadata: &Value) -> Vec<&Value> {
    let list = |value: &'static str| metadata[value].as_array().into_iter().flatten();
    let nodes = metadata["resolve"]["nodes"].as_array().into_iter().flatten();
    let nodes: BTreeMap<&str, &Value> = nodes.map(|node| (word(node, "id"), node)).collect();
    let roots = PROGRAMS.into_iter().chain(PLUGINS.map(|plugin| plugin.package()));
    let roots: BTreeSet<&str> = roots.collect();
    let mut next: Vec<&str> = list("packages")
        .filter(|package| roots.contains(word(package, "name")))
        .map(|package| word(package, "id"))
        .collect();
    let mut found = BTreeSet::new();
    while let Some(id) = next.pop() {
        if found.insert(id) {
            let dependencies = nodes[id]["deps"].as_array().into_iter().flatten();
            // Those of tests and of build scripts are not in the program.
            let is_contained = |dependency: &&Value| {
                let mut kinds = dependency["dep_kinds"].as_array().into_iter().flatten();
                kinds.any(|kind| kind["kind"].is_null())
            };
            next.extend(dependencies.filter(is_contained).map(|dependency| word(dependency, "pkg")));
        }
    }
    let mut packages: Vec<&Value> = list("packages")
        .filter(|package| found.contains(word(package, "id")) && !package["source"].is_null())
        .collect();
    packages.sort_by_key(|package| (word(package, "name"), word(package, "version")));
    packages
}

/// Returns the texts of the licence files in the folder of a crate.
fn texts_in(folder: &Path) -> Result<Vec<String>> {
    let what = || format!("cannot read the licences in {}", folder.display());
    let mut texts = Vec::new();
    for entry in fs::read_dir(folder).context(what)? {
        let entry = entry.context(what)?;
        let name = entry.file_name().to_string_lossy().to_uppercase();
        if FILES.iter().any(|file| name.starts_with(file)) && entry.path().is_file() {
            texts.push(String::from_utf8_lossy(&fs::read(entry.path()).context(what)?).into_owned());
        }
    }
    Ok(texts)
}
