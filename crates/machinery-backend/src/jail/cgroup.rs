//! The cgroup of a run: limits, and an end that no process escapes.
//!
//! A cgroup v2 that is delegated to the host has `user.delegate` or `trusted.delegate` among its extended attributes;
//! systemd sets one of them for `Delegate=yes`. The kernel allows controllers only in a cgroup without processes of its
//! own, so the host moves to a cgroup below. Sources: cgroups(7), systemd.resource-control(5).
//!
//! ```text
//! <delegated>/host         this process
//! <delegated>/m-<machine>  the processes of a run
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use machinery::{Error, Result};

/// The maximum number of processes and threads of a run.
const PROCESSES: &str = "1024";

/// The cgroup of a machine's runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Returns the cgroup of the machine with that key, or the reason why it has none.
    pub(super) fn of(key: &Path) -> std::result::Result<Cgroup, String> {
        static DELEGATED: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
        let delegated = DELEGATED.get_or_init(delegated).clone()?;
        let name: String = key.to_string_lossy().chars().map(|c| if c == '/' { '-' } else { c }).collect();
        Ok(Cgroup(delegated.join(format!("m{name}"))))
    }

    /// Returns the path of the cgroup's folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the cgroup, if it does not exist.
    pub(super) fn make(&self) -> Result<()> {
        let failed = |error: io::Error| Error::io("make the cgroup", &self.0, &error);
        match fs::create_dir(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
        // A kernel without this controller has no such file.
        let limit = self.0.join("pids.max");
        if limit.exists() { fs::write(limit, PROCESSES).map_err(failed) } else { Ok(()) }
    }

    /// Kills all processes of the cgroup, and removes it.
    pub fn end(&self) {
        if !self.0.exists() {
            return;
        }
        // Since Linux 5.14. Source: Documentation/admin-guide/cgroup-v2.rst.
        let killed = fs::write(self.0.join("cgroup.kill"), "1");
        if let Err(error) = killed.and_then(|()| fs::remove_dir(&self.0)) {
            tracing::debug!(%error, cgroup = %self.0.display(), "the cgroup stays");
        }
    }
}

/// Returns the cgroup that is delegated to this process, which is ready for the cgroups of machines.
fn delegated() -> std::result::Result<PathBuf, String> {
    let none =
        |why: &str| format!("no cgroup v2 is delegated to the host ({why}; see Delegate= in its unit)");
    let own = fs::read_to_string("/proc/self/cgroup").map_err(|error| none(&error.to_string()))?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).ok_or_else(|| none("it is in none"))?;
    let own = Path::new("/sys/fs/cgroup").join(own);
    // After a restart within its unit, the host is in the cgroup below already.
    let delegated = if own.ends_with("host") { own.parent().unwrap_or(&own).to_owned() } else { own };
    if !is_delegated(&delegated) {
        return Err(none(&format!("{} is not", delegated.display())));
    }
    prepare(&delegated)
        .map_err(|error| format!("the cgroup {} cannot be used: {error}", delegated.display()))?;
    Ok(delegated)
}

fn is_delegated(folder: &Path) -> bool {
    let mut value = [0_u8; 8];
    ["user.delegate", "trusted.delegate"].into_iter().any(|name| {
        rustix::fs::getxattr(folder, name, &mut value[..])
            .is_ok_and(|length| value.get(..length) == Some(b"1"))
    })
}

fn prepare(delegated: &Path) -> io::Result<()> {
    let host = delegated.join("host");
    fs::create_dir_all(&host)?;
    fs::write(host.join("cgroup.procs"), "0")?;
    let offered = fs::read_to_string(delegated.join("cgroup.controllers"))?;
    let wanted = offered.split_whitespace().filter(|name| ["cpu", "memory", "pids"].contains(name));
    let wanted: Vec<String> = wanted.map(|name| format!("+{name}")).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    fs::write(delegated.join("cgroup.subtree_control"), wanted.join(" "))
}
