//! Which domains we have started, for the next host to know.
//!
//! A domain outlives the host that started it. The next host has to end what a host that was killed
//! has left running, but not what an operator has started by hand. So each run has a file in the
//! machinery's state folder, with the domain's id, which libvirt gives anew at each start; the file
//! goes with the run.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use virt::domain::Domain;

/// The note of one machine's run.
pub struct RunNote {
    path: PathBuf,
}

impl RunNote {
    /// The note of that machine, in the machinery's state folder.
    pub fn of(machine: &str, state_dir: &Path) -> Self {
        RunNote { path: state_dir.join(format!("{machine}.run")) }
    }

    /// Notes that the running domain is ours. A failure is only told: it matters if the host is killed.
    pub fn write(&self, domain: &Domain) {
        let Some(run) = identity(domain) else { return };
        if let Err(error) = fs::write(&self.path, run) {
            tracing::warn!(path = %self.path.display(), %error, "cannot note the run, so it would outlive a host that is killed");
        }
    }

    /// Whether the domain runs because of us.
    pub fn is_about(&self, domain: &Domain) -> bool {
        let noted = fs::read_to_string(&self.path).ok();
        noted.is_some() && noted == identity(domain)
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
fn identity(domain: &Domain) -> Option<String> {
    let (uuid, id) = (domain.uuid_string().ok()?, domain.id()?);
    Some(format!("{uuid} {id}\n"))
}
