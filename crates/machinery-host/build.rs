//! Finds the revision that the program is built from: `new-plugin` writes it into the manifests of new plugins.

use std::process::Command;

fn main() {
    // The log of the checkout changes with every commit and every switch. A source without git has the tag of its version.
    let log = git(&["rev-parse", "--path-format=absolute", "--git-path", "logs/HEAD"]);
    match log.filter(|log| std::path::Path::new(log).exists()) {
        Some(log) => println!("cargo::rerun-if-changed={log}"),
        None => println!("cargo::rerun-if-changed=build.rs"),
    }
    let tag = git(&["describe", "--exact-match", "--tags"]).map(|tag| format!("tag = \"{tag}\""));
    let revision = || git(&["rev-parse", "HEAD"]).map(|revision| format!("rev = \"{revision}\""));
    let version = || format!("tag = \"v{}\"", env!("CARGO_PKG_VERSION"));
    let revision = tag.or_else(revision).unwrap_or_else(version);
    println!("cargo::rustc-env=CUCKOO_MACHINERY_REVISION={revision}");
}

/// Runs git in this repository, and returns its output.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}
