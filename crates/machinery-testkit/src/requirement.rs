//! The requirements of tests on this computer and its user.
//!
//! A test whose requirement is missing fails, so that nobody takes it for one that has passed. The variable
//! [`ALLOWED`] lists the requirements that may be missing: a test then skips what needs them, and writes that into the
//! file that [`SKIPS`] names. `cargo xtask test` sets both, and prints the file.

use std::env;
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// The variable with the names of requirements that may be missing, separated by commas.
pub const ALLOWED: &str = "MACHINERY_ALLOWED_SKIPS";
/// The variable with the path of the file for skipped tests.
pub const SKIPS: &str = "MACHINERY_SKIPS_FILE";

/// A requirement of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requirement {
    /// The name in [`ALLOWED`].
    pub name: &'static str,
    /// The end of the sentence "the test needs …".
    needs: &'static str,
}

/// A user who can be another one, and can give files to others.
pub const ROOT: Requirement = Requirement { name: "root", needs: "root" };
/// A user who may make a network, and capture on it.
pub const NETWORK: Requirement = Requirement { name: "network", needs: "root, for a network of its own" };
/// A checkout of CAPEv2, and a Python that has its packages.
pub const CAPE: Requirement = Requirement {
    name: "cape",
    needs: "CAPE_SOURCE, a checkout of CAPEv2, and CAPE_PYTHON, made by `cargo xtask cape-env` (see integrations/cape/README.md)",
};
/// A user who may mount a file system.
pub const MOUNT: Requirement = Requirement { name: "mount", needs: "a user who may mount a tmpfs" };
/// A kernel that limits processes and memory by cgroup v2.
pub const CONTROLLERS: Requirement =
    Requirement { name: "controllers", needs: "the controllers pids and memory of cgroup v2" };
/// The program `systemd-analyze`.
pub const SYSTEMD: Requirement = Requirement { name: "systemd", needs: "systemd-analyze" };
/// The browser Chromium.
pub const BROWSER: Requirement =
    Requirement { name: "browser", needs: "Chromium (Debian's package chromium-headless-shell)" };
/// The web server nginx. No package of the tests brings it, because it would serve at once.
pub const NGINX: Requirement = Requirement { name: "nginx", needs: "nginx (Debian's package nginx-light)" };
/// A Python that has Cuckoo3.
pub const CUCKOO3: Requirement = Requirement {
    name: "cuckoo3",
    needs: "CUCKOO3_PYTHON, the Python of an environment that has Cuckoo3 (see integrations/cuckoo3/README.md)",
};

/// Cuckoo's agent for guests.
pub const AGENT: Requirement = Requirement {
    name: "agent",
    needs: "CUCKOO_AGENT, Cuckoo's agent.py 0.10, and CUCKOO_AGENT_PYTHON, a Python 2.7 (see \
            integrations/cuckoo3/README.md)",
};

/// Reports whether this user is root. A test that is allowed to skip gets `false`.
///
/// # Panics
/// The user is not root, and the test may not skip that.
pub fn is_root() -> bool {
    ROOT.is_met(rustix::process::geteuid().is_root())
}

impl Requirement {
    /// Returns `met`. If it is false, the skip is recorded.
    ///
    /// # Panics
    /// The requirement is missing, and the test may not skip it.
    pub fn is_met(&self, met: bool) -> bool {
        if !met {
            self.skip();
        }
        met
    }

    /// Returns the value that is there if the requirement is met. If it is not, the skip is recorded.
    ///
    /// # Panics
    /// The requirement is missing, and the test may not skip it.
    pub fn or_skip<T>(&self, value: Option<T>) -> Option<T> {
        self.is_met(value.is_some());
        value
    }

    #[allow(clippy::panic)] // The test has to fail.
    fn skip(&self) {
        let Requirement { name, needs } = self;
        let allowed = env::var(ALLOWED).unwrap_or_default();
        if !is_listed(&allowed, name) {
            panic!("the test needs {needs}. To skip it, set {ALLOWED}={name}");
        }
        let line = format!("{} needs {needs}\n", test_name());
        if let Some(path) = env::var_os(SKIPS) {
            record(Path::new(&path), &line);
        }
    }
}

fn is_listed(allowed: &str, name: &str) -> bool {
    allowed.split(',').any(|allowed| allowed.trim() == name)
}

/// Appends the line in one write, because other tests write at the same time.
#[allow(clippy::panic)] // A skip that is not recorded is as bad as none.
fn record(path: &Path, line: &str) {
    let opened = File::options().create(true).append(true).open(path);
    if let Err(error) = opened.and_then(|mut file| file.write_all(line.as_bytes())) {
        panic!("cannot record a skipped test in {}: {error}", path.display());
    }
}

/// Returns the name of the test program and of the test. The test runner gives the thread the test's name.
fn test_name() -> String {
    let program = env::current_exe().ok();
    let program =
        program.as_deref().and_then(Path::file_stem).map(|name| name.to_string_lossy().into_owned());
    let program = program.unwrap_or_default();
    // Cargo adds a hash to the name.
    let program = program.rsplit_once('-').map_or(program.as_str(), |(name, _)| name).to_owned();
    let thread = std::thread::current().name().filter(|name| *name != "main").map(str::to_owned);
    // A runner that has one test for each process may use the main thread.
    let argument = || env::args().skip(1).find(|argument| !argument.starts_with('-'));
    format!("{program}::{}", thread.or_else(argument).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requirement_is_listed_by_its_whole_name() {
        assert!(is_listed("root, network", "network") && is_listed("root", "root"));
        assert!(!is_listed("", "root") && !is_listed("roots,net", "root"));
    }

    #[test]
    fn requirement_is_met_without_a_record() {
        assert!(ROOT.is_met(true));
        assert_eq!(NETWORK.or_skip(Some(1)), Some(1));
    }

    #[test]
    fn skips_are_recorded_one_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("skips");
        record(&path, "a needs root\n");
        record(&path, "b needs root\n");
        assert_eq!(std::fs::read_to_string(path).unwrap(), "a needs root\nb needs root\n");
        assert!(
            test_name().ends_with("requirement::tests::skips_are_recorded_one_a_line"),
            "{}",
            test_name()
        );
    }
}
