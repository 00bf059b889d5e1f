//! The cgroup of a run: limits, and an end that no process escapes.
//!
//! A cgroup v2 that is delegated to the host has `user.delegate` or `trusted.delegate` among its extended attributes;
//! systemd sets one of them for `Delegate=yes`. The kernel allows controllers only in a cgroup without processes of its
//! own, so the host moves to a cgroup below. Sources: cgroups(7), systemd.resource-control(5).
//!
//! ```text
//! <delegated>/host         this process
//! <delegated>/machine-…    the processes of a run
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use machinery::{Error, Result};
use machinery_jail::Limits;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

use crate::hash::fnv1a;

/// The content of a limit that is not set. Source: Documentation/admin-guide/cgroup-v2.rst of the kernel.
const NO_LIMIT: &str = "max";

/// The time that processes have to end after `cgroup.kill`.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// The cgroup of a machine's runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Returns the cgroup of the machine with that key, or the reason why it has none.
    pub(super) fn of(key: &Path) -> std::result::Result<Cgroup, String> {
        static DELEGATED: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
        let delegated = DELEGATED.get_or_init(delegated).clone()?;
        Ok(Cgroup(delegated.join(format!("machine-{:016x}", fnv1a([key.as_os_str()])))))
    }

    /// Returns the path of the cgroup's folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the cgroup with these limits, if it does not exist.
    pub(super) fn make(&self, limits: &Limits) -> Result<()> {
        let failed = |error: io::Error| Error::io("make the cgroup", &self.0, &error);
        match fs::create_dir(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
        self.limit(limits).map_err(failed)
    }

    /// Sets the limits of a run that goes on, if they were lost: that happens when nobody has the controllers enabled. A
    /// guest that has more memory than the present configuration allows keeps it, because the kernel would kill it.
    pub(super) fn limit_again(&self, limits: &Limits) {
        let read = |name: &str| fs::read_to_string(self.0.join(name)).unwrap_or_default().trim().to_owned();
        let has_more = |limit: u64| read("memory.current").parse::<u64>().is_ok_and(|used| used >= limit);
        let limits = Limits {
            processes: limits.processes.filter(|_| read("pids.max") == NO_LIMIT),
            memory: limits.memory.filter(|limit| read("memory.max") == NO_LIMIT && !has_more(*limit)),
            ..Limits::default()
        };
        if let Some(Err(error)) = self.0.exists().then(|| self.limit(&limits)) {
            tracing::warn!(%error, cgroup = %self.0.display(), "cannot limit a run again");
        }
    }

    fn limit(&self, limits: &Limits) -> io::Result<()> {
        for (name, limit) in [("pids.max", limits.processes), ("memory.max", limits.memory)] {
            let file = self.0.join(name);
            // A cgroup without the controller has no such file.
            if let Some(limit) = limit.filter(|_| file.exists()) {
                fs::write(file, limit.to_string())?;
            }
        }
        Ok(())
    }

    /// Kills all processes of the cgroup, and removes it.
    pub fn end(&self) {
        if !self.0.exists() {
            return;
        }
        if let Err(error) = self.kill_and_remove() {
            tracing::warn!(%error, cgroup = %self.0.display(), "cannot end a cgroup");
        }
    }

    fn kill_and_remove(&self) -> io::Result<()> {
        let mut events = File::open(self.0.join("cgroup.events"))?;
        // Since Linux 5.14. Source: Documentation/admin-guide/cgroup-v2.rst.
        fs::write(self.0.join("cgroup.kill"), "1")?;
        let until = Instant::now() + KILL_TIMEOUT;
        while is_populated(&mut events)? {
            let rest = until.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(io::Error::other("its processes do not end"));
            }
            let limit = Timespec::try_from(rest).ok();
            retry_on_intr(|| poll(&mut [PollFd::new(&events, PollFlags::PRI)], limit.as_ref()))?;
        }
        fs::remove_dir(&self.0)
    }
}

/// Reads whether the cgroup has processes. After that, `poll` reports the next change.
fn is_populated(events: &mut File) -> io::Result<bool> {
    let mut text = String::new();
    events.seek(SeekFrom::Start(0))?;
    events.read_to_string(&mut text)?;
    Ok(text.contains("populated 1"))
}

/// Returns the folder where cgroup v2 is mounted. Source: proc_mounts(5).
fn mounted() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let is_cgroup = |line: &&str| line.split(' ').nth(2) == Some("cgroup2");
    mounts.lines().find(is_cgroup)?.split(' ').nth(1).map(PathBuf::from)
}

/// Returns the cgroup that is delegated to this process, which is ready for the cgroups of machines.
fn delegated() -> std::result::Result<PathBuf, String> {
    let none =
        |why: &str| format!("no cgroup v2 is delegated to the host ({why}; see Delegate= in its unit)");
    let own = fs::read_to_string("/proc/self/cgroup").map_err(|error| none(&error.to_string()))?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).ok_or_else(|| none("it is in none"))?;
    let own = mounted().ok_or_else(|| none("it is not mounted"))?.join(own);
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
