//! From a snapshot to a running domain.
//!
//! A snapshot may have been taken of a running, a paused or a shut-off domain; reverted to, it leaves
//! the domain as it was then, unless libvirt is asked to let it run. It may keep disk and memory
//! inside the disk's qcow2 file (internal) or in files beside it (external); libvirt reverts to
//! external ones only from 9.9 on. Source: libvirt's docs/formatsnapshot.rst and NEWS.rst.

use std::time::Duration;

use machinery::{Error, Result, State};
use virt::connect::Connect;
use virt::domain::Domain;
use virt::domain_snapshot::DomainSnapshot;
use virt::error::ErrorNumber;
use virt_sys as sys;

use crate::description::{Description, Firmware, SnapshotDescription};
use crate::errors::{explain, is_no_domain, is_off, is_refused};
use crate::states::state_of_domain;

/// From here on libvirt reverts to external snapshots of QEMU's domains. Source: libvirt's NEWS.rst, v9.9.0.
pub const EXTERNAL_REVERTS: u32 = 9_009_000;

/// The first libvirt that takes internal snapshots of a domain with UEFI, if the variables are in a qcow2
/// file. Source: libvirt's NEWS.rst, v10.10.0.
pub const INTERNAL_WITH_UEFI: u32 = 10_010_000;

/// Versions of libvirt that cannot revert to every internal snapshot, unless the distribution has fixed them.
/// Source: libvirt's NEWS.rst, v11.4.0.
pub const BROKEN_REVERTS: std::ops::Range<u32> = 11_002_000..11_004_000;

/// Long enough for the clock to show another second.
const ANOTHER_SECOND: Duration = Duration::from_millis(1010);

/// What the `virt` crate gives for a state when libvirt has failed to tell it, in the place of the error.
/// Source: its src/domain.rs, 0.5.0.
const STATE_UNKNOWN: u32 = u32::MAX;

/// How a machine is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// From its snapshot's memory.
    Restored,
    /// Cold, but with the disk as it is in the snapshot.
    Cold,
}

/// What tells a snapshot from another that took its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub name: String,
    /// When it was taken, in seconds since 1970, as it is in the description.
    pub created: String,
}

/// A snapshot, and what its description says of it.
pub struct Snapshot {
    snapshot: DomainSnapshot,
    pub identity: Identity,
    pub description: SnapshotDescription,
}

/// The domain of that name.
///
/// # Errors
/// There is none; libvirt cannot be asked.
pub fn domain(connect: &Connect, label: &str) -> Result<Domain> {
    connect.lookup_domain_by_name(label).map_err(|error| match is_no_domain(&error) {
        true => no_domain(connect, label),
        false => explain(&format!("look up the domain '{label}'"), &error),
    })
}

fn no_domain(connect: &Connect, label: &str) -> Error {
    let domains = connect.list_all_domains(0).unwrap_or_default();
    let mut names: Vec<String> = domains.iter().filter_map(|domain| domain.name().ok()).collect();
    names.sort();
    let there = if names.is_empty() { "no domain at all".to_owned() } else { names.join(", ") };
    Error::environment(format!("libvirt has no domain '{label}'; there is {there}"))
        .advice("Correct the label, or define the domain; `virsh list --all` shows what there is")
}

/// Returns the domain's current description.
///
/// # Errors
/// libvirt does not answer.
pub fn described(domain: &Domain) -> Result<Description> {
    Description::read(&domain.xml_desc(0).map_err(|error| explain("describe the domain", &error))?)
}

/// Returns the reason why this libvirt cannot revert to the snapshot, if it cannot.
pub fn not_revertible(snapshot: &Snapshot, version: u32) -> Option<String> {
    (snapshot.description.external && version < EXTERNAL_REVERTS).then(|| {
        format!(
            "the snapshot '{}' is external, and libvirt {} cannot revert to those",
            snapshot.identity.name,
            version_text(version)
        )
    })
}

/// Advises which snapshot to take of a domain with that firmware and that libvirt.
pub fn advice(version: u32, firmware: &Firmware) -> String {
    let internal = "take an internal snapshot (virsh snapshot-create-as without --diskspec and --memspec)";
    let external = "take an external snapshot (virsh snapshot-create-as with --memspec and --diskspec)";
    let convert = "keep the firmware's variables in a qcow2 file (<nvram format='qcow2'>) and take an internal snapshot";
    match firmware {
        Firmware { is_flash: false, .. } if version < EXTERNAL_REVERTS => {
            format!("Upgrade libvirt to 9.9 or newer, or {internal}")
        }
        Firmware { is_flash: false, .. } => format!("Or {internal}"),
        _ if version < EXTERNAL_REVERTS => format!(
            "The domain boots by UEFI, of which libvirt {} takes no internal snapshot either. Upgrade libvirt to 9.9 or \
             newer for external snapshots, or to 10.10 for internal ones; or install the guest with BIOS",
            version_text(version)
        ),
        Firmware { nvram_is_qcow2: true, .. } if version >= INTERNAL_WITH_UEFI => format!("Or {internal}"),
        _ if version >= INTERNAL_WITH_UEFI => format!("The domain boots by UEFI: {external}, or {convert}"),
        _ => format!(
            "The domain boots by UEFI, of which libvirt {} takes no internal snapshot: {external}",
            version_text(version)
        ),
    }
}

/// What the domain does, and why where that needs telling.
///
/// # Errors
/// libvirt cannot be asked; the state has no name here.
pub fn state(domain: &Domain) -> Result<(State, String)> {
    let failed = |error| explain("tell the domain's state", &error);
    let (state, reason) = domain.state().map_err(failed)?;
    if state.to_raw() == STATE_UNKNOWN {
        return Err(failed(virt::error::Error::last_error()));
    }
    state_of_domain(state, reason)
}

/// The snapshot that a restore goes to: the one of that name, else the current one.
///
/// # Errors
/// There is none; the error lists those that there are.
pub fn find(domain: &Domain, wanted: Option<&str>) -> Result<Snapshot> {
    let found = match wanted {
        Some(name) => Domain::lookup_snapshot_by_name(domain, name, 0),
        None => domain.current_snapshot(0),
    };
    let snapshot = found.map_err(|error| no_snapshot(domain, wanted, &error))?;
    describe(snapshot)
}

fn no_snapshot(domain: &Domain, wanted: Option<&str>, error: &virt::error::Error) -> Error {
    let mut names: Vec<String> = match domain.list_all_snapshots(0) {
        Ok(snapshots) => snapshots.iter().filter_map(|snapshot| snapshot.name().ok()).collect(),
        // What kept it from being found keeps the others from being listed.
        Err(_) => return explain("look up the snapshot", error),
    };
    names.sort();
    let there = if names.is_empty() {
        "it has none at all".to_owned()
    } else {
        format!("it has {}", names.join(", "))
    };
    let label = domain.name().unwrap_or_default();
    match wanted {
        Some(name) => Error::environment(format!("the domain '{label}' has no snapshot '{name}': {there}"))
            .advice("Correct the machine's snapshot, or leave it out to use the domain's current one"),
        None => Error::environment(format!("the domain '{label}' has no current snapshot: {there}")).advice(
            "Start the domain, wait until Cuckoo's agent run_marker in it, and take one with `virsh snapshot-create-as`; \
             or name one of those it has".to_owned() + &flash_advice(domain),
        ),
    }
}

/// Returns the advice for a domain with UEFI, which does not support every kind of snapshot.
fn flash_advice(domain: &Domain) -> String {
    let version = domain.connect().and_then(|connect| connect.lib_version());
    match (described(domain), version) {
        (Ok(described), Ok(version)) if described.firmware.is_flash => {
            format!(". {}", advice(version, &described.firmware))
        }
        _ => String::new(),
    }
}

fn describe(snapshot: DomainSnapshot) -> Result<Snapshot> {
    let failed = |error| explain("describe the snapshot", &error);
    let name = snapshot.name().map_err(failed)?;
    let description = SnapshotDescription::read(&snapshot.xml_desc(0).map_err(failed)?)?;
    let identity = Identity { name, created: description.created.clone() };
    Ok(Snapshot { snapshot, identity, description })
}

/// Brings the domain, which is off, to its snapshot or to a cold start, and leaves it paused.
///
/// # Errors
/// The domain does not reach that state. It may be in any state then.
pub fn start_paused(domain: &Domain, wanted: Option<&str>, how: Start) -> Result<()> {
    match how {
        Start::Restored => find(domain, wanted)?.revert_paused(),
        Start::Cold => cold(domain, wanted),
    }
}

/// What the last run has written is still on the domain's disk, so that is put back first.
fn cold(domain: &Domain, wanted: Option<&str>) -> Result<()> {
    match domain.num_snapshots(0) {
        Ok(0) if wanted.is_none() => tracing::warn!(
            label = domain.name().unwrap_or_default(),
            "the domain has no snapshot: it starts with what its last run has left on its disk"
        ),
        _ => put_disk_back(domain, wanted)?,
    }
    boot_paused(domain).map_err(|error| explain("start the domain", &error))
}

/// Boots the domain, but never from a managed save, which somebody may have made meanwhile.
fn boot_paused(domain: &Domain) -> std::result::Result<(), virt::error::Error> {
    let booted = domain.create_with_flags(sys::VIR_DOMAIN_START_PAUSED | sys::VIR_DOMAIN_START_FORCE_BOOT);
    match booted {
        // Some drivers can only start a domain that runs at once.
        Err(error) if error.code().is(ErrorNumber::InvalidArg) => domain.create(),
        other => other,
    }
}

fn put_disk_back(domain: &Domain, wanted: Option<&str>) -> Result<()> {
    let snapshot = find(domain, wanted)?;
    // One with memory cannot be reverted to without it; it does not get to run.
    if snapshot.has_memory() {
        snapshot.revert_paused()?;
    } else {
        snapshot.revert(0)?;
    }
    destroy(domain).map(drop)
}

impl Snapshot {
    /// Whether there is memory in it; without, a restore boots the guest.
    pub fn has_memory(&self) -> bool {
        self.description.has_memory
    }

    /// Reverts the domain to it, and leaves it paused.
    ///
    /// # Errors
    /// libvirt cannot; the domain may be in any state then.
    pub fn revert_paused(&self) -> Result<()> {
        self.revert(sys::VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED)
    }

    fn revert(&self, flags: sys::virDomainSnapshotRevertFlags) -> Result<()> {
        let mut reverted = self.snapshot.revert(flags);
        if let Err(error) = &reverted
            && self.description.external
            && is_refused(error)
            && self.version().is_some_and(|version| version >= EXTERNAL_REVERTS)
        {
            // libvirt names the overlay of a restore after the current second, and refuses a name whose file
            // exists. It has no error code for just that.
            std::thread::sleep(ANOTHER_SECOND);
            reverted = self.snapshot.revert(flags);
        }
        reverted.map_err(|error| {
            let failed = explain(&format!("revert to the snapshot '{}'", self.identity.name), &error);
            let firmware = self.description.domain.as_ref().map(|domain| domain.firmware.clone());
            match self.version() {
                Some(version) if self.description.external && version < EXTERNAL_REVERTS => failed.advice(format!(
                    "It is an external snapshot, and libvirt {} cannot revert to those. {}",
                    version_text(version),
                    advice(version, &firmware.unwrap_or_default())
                )),
                Some(version) if BROKEN_REVERTS.contains(&version) => failed.default_advice(format!(
                    "libvirt {} cannot revert to every internal snapshot, and 11.4 can: upgrade libvirt, or ask your \
                     distribution",
                    version_text(version)
                )),
                _ => failed.default_advice(
                    "Try it by hand with `virsh snapshot-revert`; libvirtd's log may say more",
                ),
            }
        })
    }

    /// That of the libvirt that has it.
    fn version(&self) -> Option<u32> {
        self.snapshot.connect().and_then(|connect| connect.lib_version()).ok()
    }
}

/// libvirt's way to write versions: 9.10.2 is 9010002.
pub fn version_text(version: u32) -> String {
    format!("{}.{}.{}", version / 1_000_000, version / 1000 % 1000, version % 1000)
}

/// Expects a domain that can be started.
///
/// # Errors
/// It is not off; libvirt cannot be asked.
pub fn ensure_off(domain: &Domain) -> Result<()> {
    match state(domain)? {
        (State::Poweroff, _) => Ok(()),
        (state, _) => {
            let reason = format!("the machine is not powered off: the domain is {state}");
            Err(Error::unexpected_state(reason).advice("Stop it first"))
        }
    }
}

/// Expects a domain that runs, after it was started.
///
/// # Errors
/// It does not; libvirt cannot be asked.
pub fn ensure_runs(domain: &Domain) -> Result<()> {
    match state(domain)? {
        (State::Running, _) => Ok(()),
        (state, why) => {
            let why = if why.is_empty() { why } else { format!(" ({why})") };
            Err(Error::unexpected_state(format!("the domain was started, and is {state}{why}"))
                .advice("The domain's log in /var/log/libvirt/qemu may say why"))
        }
    }
}

/// Lets a paused domain run.
///
/// # Errors
/// libvirt cannot.
pub fn resume(domain: &Domain) -> Result<()> {
    domain.resume().map_err(|error| explain("let the domain run", &error))
}

/// Resumes a domain that was just started, if it does not run already.
///
/// # Errors
/// The domain does not run, or libvirt does not answer.
pub fn ensure_running(domain: &Domain) -> Result<()> {
    let resumed = resume(domain);
    ensure_runs(domain).map_err(|error| resumed.err().unwrap_or(error))
}

/// Waits until a libvirtd that has just started has taken the domain over. One that is stopped in the
/// middle of that can stay locked, as was seen with libvirt 9.0 and 11.3, and nothing tells when it is
/// done; but a question to the domain's QEMU waits for it.
pub fn settle(domain: &Domain) {
    // The answer does not matter.
    let _ = domain.memory_stats(0);
}

/// Pulls the plug; `false` when the domain was off already.
///
/// # Errors
/// libvirt cannot end it.
pub fn destroy(domain: &Domain) -> Result<bool> {
    match domain.destroy() {
        Ok(()) => Ok(true),
        // A domain without a definition is gone once it is off.
        Err(error) if is_off(&error) || is_no_domain(&error) => Ok(false),
        Err(error) => Err(explain("stop the domain", &error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_names_a_kind_of_snapshot_that_this_libvirt_can_revert_to() {
        let flash = |nvram_is_qcow2| Firmware { is_flash: true, nvram: None, nvram_is_qcow2 };
        for (version, firmware, words) in [
            (9_000_000, Firmware::default(), "take an internal snapshot"),
            (
                9_000_000,
                flash(false),
                "to 9.9 or newer for external snapshots, or to 10.10 for internal ones",
            ),
            (9_009_000, flash(true), "no internal snapshot: take an external snapshot"),
            (10_010_000, flash(false), "take an external snapshot (virsh"),
            (10_010_000, flash(true), "take an internal snapshot"),
        ] {
            let said = advice(version, &firmware);
            assert!(said.contains(words), "no {words:?} in {said}");
        }
        let circle = advice(9_000_000, &flash(false));
        assert!(!circle.contains("snapshot-create-as"), "{circle}");
    }

    #[test]
    fn versions_are_written_as_people_do() {
        assert_eq!(version_text(9_000_000), "9.0.0");
        assert_eq!(version_text(11_003_001), "11.3.1");
    }
}
