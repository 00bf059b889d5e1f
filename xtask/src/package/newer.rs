//! Packages of a higher version, for the test of an upgrade: the same sources, with another number.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::files::{make_folder, read, scratch_in, write};
use super::release::{PLUGINS, Release};
use super::{debian, tree};
use crate::install;
use crate::run::{CHECKOUT, Failure, Result, cargo, output, step};

/// Makes the packages below `out`, of the commit of the checkout. Returns their version and paths.
pub fn make(out: &Path) -> Result<(String, Vec<PathBuf>)> {
    let release = Release::of_checkout()?;
    let version = next(&release.version)
        .ok_or_else(|| Failure::Message(format!("{} has no next version", release.version)))?;
    let folder = out.join("newer");
    let clone = folder.join("source");
    make_folder(&folder)?;
    // A clone of an earlier test keeps the results of its build current.
    if !clone.exists() {
        output(Command::new("git").args(["clone", "--quiet", "--no-checkout", CHECKOUT]).arg(&clone))?;
    }
    let git = |arguments: &[&str]| output(Command::new("git").arg("-C").arg(&clone).args(arguments));
    git(&["fetch", "--quiet", "origin", "HEAD"])?;
    git(&["checkout", "--quiet", "--force", "--detach", "FETCH_HEAD"])?;
    let manifest = clone.join("Cargo.toml");
    let line = |version: &str| format!("\nversion = \"{version}\"\n");
    write(&manifest, &read(&manifest)?.replacen(&line(&release.version), &line(&version), 1))?;
    // The crates of the registry are the same, and built already.
    let target = install::target()?;
    let mut build = cargo(install::build_arguments(&PLUGINS));
    build.arg("--manifest-path").arg(&manifest).arg("--target-dir").arg(&target).current_dir(&clone);
    step(&mut build)?;
    let scratch = scratch_in(&folder)?;
    let tree = scratch.path().join("tree");
    tree::fill(&tree, &target.join("release"))?;
    let made = debian::make(&Release { version: version.clone(), ..release }, &tree, &folder)?;
    Ok((version, made))
}

/// Returns the version with the next higher number at its end.
fn next(version: &str) -> Option<String> {
    let (before, number) = version.rsplit_once('.')?;
    Some(format!("{before}.{}", number.parse::<u32>().ok()? + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_version_has_the_next_number_at_its_end() {
        assert_eq!(next("0.2.9").as_deref(), Some("0.2.10"));
        assert_eq!(next("0.2.0-rc"), None);
    }
}
