//! Which domains we have started, for the next host to know.
//!
//! A domain outlives the host that started it. The next host has to end what a host that was killed
//! has left running, but not what an operator has started by hand. So each run has a file in the
//! machinery's state folder, from before libvirt is asked to start the domain until the domain is known
//! to be off; so has a domain that stands by, which becomes a run without a change to it. It holds the domain's id, which libvirt gives anew at each start and counts anew after a
//! boot; while a start is under way there is none yet.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use virt::domain::Domain;

/// The note of one machine's run.
#[derive(Debug, Clone)]
pub struct RunNote {
    path: PathBuf,
}

impl RunNote {
    /// The note of that machine, in the machinery's state folder.
    pub fn of(machine: &str, state_dir: &Path) -> Self {
        RunNote { path: state_dir.join(format!("{machine}.run")) }
    }

    /// Notes that the domain is about to be started. A failure is only told: it matters if the host is
    /// killed.
    pub fn begin(&self, domain: &Domain) {
        self.write(starting(domain));
    }

    /// Notes that the running domain is ours.
    pub fn started(&self, domain: &Domain) {
        self.write(running(domain));
    }

    fn write(&self, run: Option<String>) {
        let Some(run) = run else { return };
        if let Err(error) = fs::write(&self.path, run) {
            tracing::warn!(path = %self.path.display(), %error, "cannot note the run, so it would outlive a host that is killed");
        }
    }

    /// Whether a run, or what stands by, is noted.
    pub fn is_there(&self) -> bool {
        self.path.exists()
    }

    /// Whether the domain runs because of us.
    pub fn is_about(&self, domain: &Domain) -> bool {
        let Ok(noted) = fs::read_to_string(&self.path) else { return false };
        let run = running(domain);
        run.is_some() && [run, starting(domain)].contains(&Some(noted))
    }

    /// There is no run any more.
    pub fn remove(&self) {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.path.display(), %error, "cannot remove the note of a run");
            }
            _ => {}
        }
    }
}

/// What tells this run of a domain from its others; `None` when it does not run.
fn running(domain: &Domain) -> Option<String> {
    let id = domain.id()?;
    Some(format!("{} {id}\n", this_boots(domain)?))
}

fn starting(domain: &Domain) -> Option<String> {
    Some(format!("{} starting\n", this_boots(domain)?))
}

/// The domain, in the time since this host was booted.
fn this_boots(domain: &Domain) -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(format!("{} {}", boot.trim(), domain.uuid_string().ok()?))
}
