//! The tests that are skipped because this computer or its user lacks something.
//!
//! Such a test fails, unless the requirement is among the allowed ones: the testkit's `requirement` has both variables.
//! A runner hides the output of a successful test, so the skips are in a file, which is printed after the tests.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::guest::analysis::Agent;
use machinery_testkit::requirement::{ALLOWED, SKIPS};

use crate::run::{CHECKOUT, Context, Result, is_root, succeeds};

/// The skips of one run of the tests.
pub struct Skips {
    file: PathBuf,
    allowed: String,
}

impl Skips {
    /// Allows the skips of what cannot be installed here, and begins with none.
    pub fn new() -> Result<Self> {
        let folder = Path::new(CHECKOUT).join("target");
        fs::create_dir_all(&folder).context(|| format!("making {}", folder.display()))?;
        let file = folder.join("skipped-tests");
        fs::write(&file, "").context(|| format!("writing {}", file.display()))?;
        let given = env::var(ALLOWED).unwrap_or_default();
        let allowed: Vec<&str> = given.split(',').filter(|name| !name.is_empty()).chain(missing()).collect();
        Ok(Skips { file, allowed: allowed.join(",") })
    }

    /// Sets the variables of the tests.
    pub fn apply_to(&self, tests: &mut Command) {
        tests.env(ALLOWED, &self.allowed).env(SKIPS, &self.file);
    }

    /// Prints the skipped tests.
    pub fn print(&self) {
        match fs::read_to_string(&self.file) {
            Ok(text) => eprint!("{}", summary(&text)),
            Err(error) => eprintln!("\nThe skipped tests are unknown: {}: {error}", self.file.display()),
        }
    }
}

/// Returns the names of the requirements that are missing, and that no package brings.
fn missing() -> Vec<&'static str> {
    let mut missing = Vec::new();
    if !is_root() {
        missing.push("root");
    }
    // Root of a user namespace lacks some privileges.
    let groups = fs::read_to_string("/proc/self/setgroups").unwrap_or_default();
    if !is_root() || groups.trim() == "deny" {
        missing.extend(["network", "mount"]);
    }
    if env::var_os("CUCKOO3_PYTHON").is_none_or(|python| python.is_empty()) {
        missing.push("cuckoo3");
    }
    if !Agent::Cuckoo.is_known() {
        missing.push("agent");
    }
    // A computer that still uses cgroup v1 has them there, and a container may have none.
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.subtree_control").unwrap_or_default();
    if !["memory", "pids"].iter().all(|name| controllers.split_whitespace().any(|found| found == *name)) {
        missing.push("controllers");
    }
    if !succeeds(Command::new("systemd-analyze").arg("--version")) {
        missing.push("systemd");
    }
    let is_browser = |name: &&str| succeeds(Command::new(name).arg("--version"));
    if !["chromium-headless-shell", "chromium", "google-chrome"].iter().any(is_browser) {
        missing.push("browser");
    }
    if !Path::new("/usr/sbin/nginx").exists() {
        missing.push("nginx");
    }
    if ["CAPE_SOURCE", "CAPE_PYTHON"].iter().any(|name| env::var_os(name).is_none_or(|path| path.is_empty()))
    {
        missing.push("cape");
    }
    missing
}

/// Returns the list of skipped tests, each once.
fn summary(text: &str) -> String {
    let mut skipped: Vec<&str> = text.lines().collect();
    skipped.sort_unstable();
    skipped.dedup();
    match skipped.len() {
        0 => String::new(),
        1 => format!("\n1 test skipped:\n  {}\n", skipped[0]),
        count => format!("\n{count} tests skipped, wholly or in part:\n  {}\n", skipped.join("\n  ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_has_each_skipped_test_once() {
        assert_eq!(summary(""), "");
        assert_eq!(
            summary("b needs root\na needs root\nb needs root\n"),
            "\n2 tests skipped, wholly or in part:\n  a needs root\n  b needs root\n"
        );
    }
}
