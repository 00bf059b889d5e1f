//! The interface for authors of plugins, as a workspace that builds without a network.
//!
//! ```text
//! source/Cargo.toml   the workspace, with the members below only
//! source/crates/      the crates of the interface
//! source/plugins/     the examples
//! source/vendor/      the crates of the registry that they need
//! ```
//!
//! `cuckoo-machinery new-plugin` writes a crate that builds against this folder.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};

use super::files::{copy, make_folder, read, write};
use crate::run::{CHECKOUT, Context, Failure, Result, cargo, output, step};
use crate::tracked;

/// The crates of the interface, and the examples.
const MEMBERS: [&str; 7] = [
    "crates/machinery",
    "crates/machinery-backend",
    "crates/machinery-conformance",
    "crates/machinery-images",
    "crates/machinery-jail",
    "plugins/example",
    "plugins/example-process",
];

/// Other files of the workspace.
const FILES: [&str; 5] =
    ["Cargo.lock", "LICENSE-APACHE", "LICENSE-MIT", "clippy.toml", "conf/machineries/example.yaml"];

/// The systems that the interface is for.
const PLATFORMS: [&str; 2] = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"];

/// A dependency for tests that are not part of the interface, and the members and folders that have such tests.
const TESTKIT: &str = "machinery-testkit.workspace = true\n";
const TESTED: [(&str, &str); 2] = [
    ("crates/machinery-backend", "crates/machinery-backend/tests/cell/"),
    ("crates/machinery-jail", "crates/machinery-jail/tests/"),
];

/// Fills the folder.
pub fn fill(folder: &Path) -> Result<()> {
    let checkout = Path::new(CHECKOUT);
    let is_part = |file: &String| {
        let is_of = |member: &&str| file.strip_prefix(*member).is_some_and(|rest| rest.starts_with('/'));
        let is_member = MEMBERS.iter().any(is_of);
        let is_test = TESTED.iter().any(|(_, tests)| file.starts_with(tests));
        FILES.contains(&file.as_str()) || is_member && !is_test
    };
    for file in tracked::files(checkout)?.iter().filter(|file| is_part(file)) {
        copy(&checkout.join(file), &folder.join(file))?;
    }
    for (member, _) in TESTED {
        let manifest = folder.join(member).join("Cargo.toml");
        write(&manifest, &read(&manifest)?.replace(TESTKIT, ""))?;
    }
    write(&folder.join("Cargo.toml"), &workspace(&read(&checkout.join("Cargo.toml"))?)?)?;
    let mut vendor = cargo(["vendor", "--quiet", "--manifest-path"]);
    vendor.arg(folder.join("Cargo.toml")).arg(folder.join("vendor")).stdout(Stdio::null());
    step(&mut vendor)?;
    empty_unused(folder)
}

/// Empties the crates that only other systems need. Cargo needs their manifests to choose versions.
fn empty_unused(folder: &Path) -> Result<()> {
    let what = || format!("cannot tidy {}", folder.join("vendor").display());
    let used = used(folder)?;
    for entry in fs::read_dir(folder.join("vendor")).context(what)? {
        let krate = entry.context(what)?.path();
        let manifest = read(&krate.join("Cargo.toml"))?;
        let value = |key: &str| {
            let mut lines = manifest.lines().skip_while(|line| *line != "[package]");
            let line = lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "));
            line.unwrap_or_default().trim_matches('"').to_owned()
        };
        if used.contains(&(value("name"), value("version"))) {
            continue;
        }
        let checksum = krate.join(".cargo-checksum.json");
        let sums: Value = serde_json::from_str(&read(&checksum)?).context(what)?;
        fs::remove_dir_all(&krate).context(what)?;
        make_folder(&krate)?;
        write(&krate.join("Cargo.toml"), &manifest)?;
        write(&krate.join("src/lib.rs"), "")?;
        write(&checksum, &json!({"files": {}, "package": sums["package"]}).to_string())?;
    }
    Ok(())
}

/// Returns the names and versions of the crates that Linux needs.
fn used(folder: &Path) -> Result<BTreeSet<(String, String)>> {
    let mut used = BTreeSet::new();
    for platform in PLATFORMS {
        let mut metadata = cargo(["metadata", "--format-version=1", "--filter-platform", platform]);
        let metadata = output(metadata.arg("--manifest-path").arg(folder.join("Cargo.toml")))?;
        let metadata: Value =
            serde_json::from_str(&metadata).context(|| "reading cargo's metadata".to_owned())?;
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let nodes = list(&metadata["resolve"]["nodes"]);
        let ids: BTreeSet<String> = nodes.iter().map(|node| node["id"].to_string()).collect();
        let packages = list(&metadata["packages"]).into_iter();
        used.extend(packages.filter(|package| ids.contains(&package["id"].to_string())).map(|package| {
            let word = |key: &str| package[key].as_str().unwrap_or_default().to_owned();
            (word("name"), word("version"))
        }));
    }
    Ok(used)
}

/// Returns the manifest of the workspace with other members.
fn workspace(manifest: &str) -> Result<String> {
    let cut = || {
        let (before, rest) = manifest.split_once("members = [\n")?;
        let (_, after) = rest.split_once("[workspace.package]")?;
        Some((before, after))
    };
    let (before, after) =
        cut().ok_or_else(|| Failure::Message("Cargo.toml has no list of members".to_owned()))?;
    Ok(format!("{before}members = {MEMBERS:?}\n\n[workspace.package]{after}"))
}
