//! The domain of a machine of the machinery `kvm`, which `virsh` makes, saves and removes.
//!
//! Every call names the domain by its UUID: a domain that somebody else has given the same name is never touched.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use machinery::{Error, Result, Setup};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::context::KVM;
use crate::commands::import::Virsh;
use crate::plugin::call::call_blocking;

/// The snapshot of the installed disk, without memory. A cold boot begins with it.
pub const INSTALLED: &str = "installed";
/// The first snapshot of a machine. Later ones have a number.
pub const SNAPSHOT: &str = "clean";

/// The time to write the memory of a guest into its disk, and to remove a snapshot from it.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(3600);
/// The file on which virsh has a lock while libvirt makes a domain or a snapshot, and the time in which it does.
const LOCK: &str = "virsh";
const LOCK_TIMEOUT: Duration = Duration::from_secs(120);
/// The kernel's source of random identifiers.
const RANDOM_UUID: &str = "/proc/sys/kernel/random/uuid";

/// A domain of libvirt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// The address of libvirt.
    pub dsn: String,
    pub label: String,
    pub uuid: String,
    /// The snapshot that a restore reverts to. Only the configuration keeps it.
    #[serde(skip)]
    pub snapshot: String,
}

impl Domain {
    /// Returns a domain that does not exist yet.
    ///
    /// # Errors
    /// The kernel has no random identifier.
    pub fn new(dsn: &str, label: &str) -> Result<Domain> {
        let uuid = fs::read_to_string(RANDOM_UUID);
        let uuid = uuid.map_err(|error| Error::io("read", Path::new(RANDOM_UUID), &error))?;
        Ok(Domain {
            dsn: dsn.to_owned(),
            label: label.to_owned(),
            uuid: uuid.trim().to_owned(),
            snapshot: SNAPSHOT.to_owned(),
        })
    }

    /// Defines the domain, with a snapshot of its disk. `scratch` is a folder for the description.
    ///
    /// # Errors
    /// libvirt refuses the description, or another domain has the name.
    pub fn define(&self, description: &str, scratch: &Path) -> Result<()> {
        let file = scratch.join("domain.xml");
        fs::write(&file, description).map_err(|error| Error::io("write", &file, &error))?;
        let virsh = self.virsh()?.holding(scratch.join(LOCK));
        virsh.run(&["define", "--file", &file.to_string_lossy()])?;
        virsh.run(&["snapshot-create-as", "--domain", &self.uuid, "--name", INSTALLED]).map(drop)
    }

    /// Takes a snapshot of the running domain, with its memory. `scratch` is the folder of the definition.
    ///
    /// # Errors
    /// libvirt cannot take it.
    pub fn take_snapshot(&self, scratch: &Path) -> Result<()> {
        let take = ["snapshot-create-as", "--domain", &self.uuid, "--name", &self.snapshot];
        self.virsh()?.holding(scratch.join(LOCK)).run_within(SNAPSHOT_TIMEOUT, &take).map(drop)
    }

    /// Returns the names of the snapshots.
    ///
    /// # Errors
    /// libvirt has no such domain, or does not answer.
    pub fn snapshots(&self) -> Result<Vec<String>> {
        self.virsh()?.names(&["snapshot-list", "--name", "--domain", &self.uuid])
    }

    /// Removes a snapshot, if it exists.
    ///
    /// # Errors
    /// libvirt cannot remove it.
    pub fn remove_snapshot(&self, name: &str) -> Result<()> {
        if !self.exists()? || !self.snapshots()?.iter().any(|known| known == name) {
            return Ok(());
        }
        let remove = ["snapshot-delete", "--domain", &self.uuid, "--snapshotname", name];
        self.virsh()?.run_within(SNAPSHOT_TIMEOUT, &remove).map(drop)
    }

    /// Ends and removes the domain, if it exists. Its disk stays.
    ///
    /// # Errors
    /// libvirt cannot remove it.
    pub fn remove(&self) -> Result<()> {
        if !self.exists()? {
            return Ok(());
        }
        let virsh = self.virsh()?;
        if let Err(error) = virsh.run(&["destroy", "--domain", &self.uuid])
            && self.is_on()?
        {
            return Err(error);
        }
        virsh.run(&["undefine", "--domain", &self.uuid, "--managed-save", "--snapshots-metadata"]).map(drop)
    }

    fn exists(&self) -> Result<bool> {
        Ok(self.virsh()?.names(&["list", "--all", "--uuid"])?.contains(&self.uuid))
    }

    /// Reports whether the domain is on.
    ///
    /// # Errors
    /// libvirt does not answer.
    pub fn is_on(&self) -> Result<bool> {
        Ok(self.virsh()?.names(&["list", "--uuid"])?.contains(&self.uuid))
    }

    fn virsh(&self) -> Result<Virsh<'_>> {
        Virsh::new(&self.dsn)
    }
}

/// Waits until libvirt has ended the work of a command that was killed. `scratch` is the folder of the definition.
///
/// # Errors
/// libvirt does not end it.
pub fn wait_for_virsh(scratch: &Path) -> Result<()> {
    let path = scratch.join(LOCK);
    let Ok(file) = File::open(&path) else { return Ok(()) };
    call_blocking(LOCK_TIMEOUT, "the work of libvirt for an earlier command", move || {
        flock(&file, FlockOperation::LockExclusive).map_err(|error| Error::io("lock", &path, &error.into()))
    })
}

/// A machine of the machinery `kvm` in the configuration.
pub struct DomainEntry {
    pub name: String,
    pub label: String,
    /// The address of its libvirt.
    pub dsn: String,
    pub snapshot: Option<String>,
}

/// The part of a record that is about a domain.
#[derive(Debug, Serialize, Deserialize)]
pub struct Recorded {
    domain: Domain,
    /// The old and the new snapshot, if the domain gets a new one. The configuration names the one to keep.
    snapshots: Option<[String; 2]>,
}

impl Recorded {
    /// Returns the record of a domain that is made or removed.
    pub fn whole(domain: &Domain) -> Recorded {
        Recorded { domain: domain.clone(), snapshots: None }
    }

    /// Returns the record of a domain that gets a new snapshot.
    pub fn snapshots(domain: &Domain, old: &str, new: &str) -> Recorded {
        Recorded { domain: domain.clone(), snapshots: Some([old, new].map(str::to_owned)) }
    }

    /// Reports whether the entry is that of the domain.
    pub fn is_of(&self, entry: &DomainEntry) -> bool {
        entry.label == self.domain.label && entry.dsn == self.domain.dsn
    }

    /// Reports whether the domain has run, and continues with a snapshot of before.
    pub fn is_changed(&self) -> bool {
        self.snapshots.is_some()
    }

    /// Removes the domain, unless the configuration has it: then only the snapshot that the entry does not name.
    ///
    /// # Errors
    /// libvirt fails.
    pub fn clear(&self, entry: Option<&DomainEntry>) -> Result<()> {
        let [old, new] = match (&self.snapshots, entry) {
            (None, None) => return self.domain.remove(),
            (None, Some(_)) => return Ok(()),
            (Some(snapshots), _) => snapshots,
        };
        let is_new = entry.is_some_and(|entry| entry.snapshot.as_ref() == Some(new));
        self.domain.remove_snapshot(if is_new { old } else { new })
    }
}

/// Returns the setup in which a preparation leaves the disk at this snapshot: the end of a standby leaves no changes.
pub fn reverting(setup: &Setup, snapshot: &str) -> Setup {
    let mut setup = setup.clone();
    let mut config: Value = serde_json::from_str(&setup.config.text).unwrap_or_default();
    let machines = config["machines"].as_object_mut().into_iter().flatten();
    machines.for_each(|(_, machine)| machine["snapshot"] = json!(snapshot));
    setup.config.text = config.to_string();
    if let Some(host) = &mut setup.host_config {
        let mut all: Value = serde_json::from_str(&host.text).unwrap_or_default();
        all["machineries"][KVM]["standby"] = json!("on");
        host.text = all.to_string();
    }
    setup
}

/// Returns the name of the next snapshot of a domain with these ones.
pub fn next_snapshot(known: &[String]) -> String {
    let mut names = (1..).map(|number| match number {
        1 => SNAPSHOT.to_owned(),
        number => format!("{SNAPSHOT}-{number}"),
    });
    names.find(|name| !known.contains(name)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_snapshot_has_a_name_that_is_free() {
        let next =
            |known: &[&str]| next_snapshot(&known.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(next(&[]), "clean");
        assert_eq!(next(&[INSTALLED, "clean"]), "clean-2");
        assert_eq!(next(&["clean-2", "operator"]), "clean");
        assert_eq!(next(&["clean", "clean-2"]), "clean-3");
    }

    #[test]
    fn work_of_virsh_is_waited_for_until_its_process_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        wait_for_virsh(folder.path()).unwrap();
        let lock = File::create(folder.path().join(LOCK)).unwrap();
        flock(&lock, FlockOperation::LockShared).unwrap();
        // The temporary command, which has the lock too, ends with this line.
        let mut process = std::process::Command::new("sleep").arg("1000").stdin(lock).spawn().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait_for_virsh(folder.path()));
            assert!(!waiting.is_finished());
            process.kill().unwrap();
            process.wait().unwrap();
            waiting.join().unwrap().unwrap();
        });
    }

    #[test]
    fn new_domain_has_an_identifier_of_its_own() {
        let (one, two) =
            (Domain::new("qemu:///system", "m").unwrap(), Domain::new("qemu:///system", "m").unwrap());
        assert!(one.uuid.len() == 36 && one.uuid != two.uuid);
    }
}
