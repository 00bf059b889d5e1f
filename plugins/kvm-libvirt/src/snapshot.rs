//! A domain's snapshot: its lookup, and the revert to it.
//!
//! A snapshot may have been taken of a running, a paused or a shut-off domain. A revert leaves the domain in
//! that state, unless libvirt is asked to pause it. An internal snapshot keeps disk and memory inside the
//! disk's qcow2 file, an external one in files beside it. libvirt reverts to external ones from 9.9 on.
//! Source: libvirt's docs/formatsnapshot.rst and NEWS.rst.

use std::time::Duration;

use machinery::{Error, Result};
use virt::domain::Domain;
use virt::domain_snapshot::DomainSnapshot;
use virt_sys as sys;

use crate::description::{Firmware, SnapshotDescription};
use crate::domain;
use crate::errors::{explain, is_refused, is_unloadable};

/// The first libvirt that reverts QEMU's domains to external snapshots. Source: libvirt's NEWS.rst, v9.9.0.
pub const EXTERNAL_REVERTS: u32 = 9_009_000;

/// The first libvirt that takes internal snapshots of a domain with UEFI, if the variables are in a qcow2
/// file. Source: libvirt's NEWS.rst, v10.10.0.
const INTERNAL_WITH_UEFI: u32 = 10_010_000;

/// Versions of libvirt that cannot revert to every internal snapshot, unless the distribution has fixed them.
/// Source: libvirt's NEWS.rst, v11.4.0.
pub const BROKEN_REVERTS: std::ops::Range<u32> = 11_002_000..11_004_000;

/// Long enough for the clock to show another second.
const ANOTHER_SECOND: Duration = Duration::from_millis(1010);

/// The identity of a snapshot. It differs from that of a later snapshot with the same name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub name: String,
    /// The time of the snapshot, in seconds since 1970, as in the description.
    pub created: String,
}

/// A snapshot and its description.
pub struct Snapshot {
    snapshot: DomainSnapshot,
    pub identity: Identity,
    pub description: SnapshotDescription,
}

/// Finds the snapshot that a restore reverts to: the one of that name, else the current one.
///
/// # Errors
/// There is no such snapshot; the error lists the existing ones.
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
        // The list fails for the same reason as the lookup.
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
        Some(name) => Error::configuration(format!("the domain '{label}' has no snapshot '{name}': {there}"))
            .advice("Correct the machine's snapshot, or leave it out to use the domain's current one"),
        None => Error::configuration(format!("the domain '{label}' has no current snapshot: {there}")).advice(
            "Start the domain, wait until Cuckoo's agent runs in it, and take one with `virsh snapshot-create-as`; \
             or name one of those it has".to_owned() + &uefi_advice(domain),
        ),
    }
}

/// Returns the advice for a domain with UEFI, which does not support every kind of snapshot.
fn uefi_advice(domain: &Domain) -> String {
    let version = domain.connect().and_then(|connect| connect.lib_version());
    match (domain::described(domain), version) {
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

impl Snapshot {
    /// Reports whether the snapshot contains memory; without memory, a restore boots the guest.
    pub fn has_memory(&self) -> bool {
        self.description.has_memory
    }

    /// Reverts the domain to the snapshot, and leaves the domain paused.
    ///
    /// # Errors
    /// libvirt cannot revert. The domain may be in any state then.
    pub fn revert_paused(&self) -> Result<()> {
        self.revert_with(sys::VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED)
    }

    /// Reverts the domain to the snapshot, and leaves the domain in the snapshot's state.
    ///
    /// # Errors
    /// As [`revert_paused`](Snapshot::revert_paused).
    pub fn revert(&self) -> Result<()> {
        self.revert_with(0)
    }

    fn revert_with(&self, flags: sys::virDomainSnapshotRevertFlags) -> Result<()> {
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
        reverted.map_err(|error| self.revert_error(&error))
    }

    fn revert_error(&self, error: &virt::error::Error) -> Error {
        let failed = explain(&format!("revert to the snapshot '{}'", self.identity.name), error);
        // Another try would end in the same way.
        let failed = if is_unloadable(error) { Error::configuration(failed.reason()) } else { failed };
        match self.version() {
            Some(version) if self.description.external && version < EXTERNAL_REVERTS => {
                let firmware = self.description.domain.as_ref().map(|domain| domain.firmware.clone());
                failed.advice(format!(
                    "It is an external snapshot, and libvirt {} cannot revert to those. {}",
                    version_text(version),
                    advice(version, &firmware.unwrap_or_default())
                ))
            }
            Some(version) if BROKEN_REVERTS.contains(&version) => failed.default_advice(format!(
                "libvirt {} cannot revert to every internal snapshot, and 11.4 can: upgrade libvirt, or ask your \
                 distribution",
                version_text(version)
            )),
            _ => failed
                .default_advice("Try it by hand with `virsh snapshot-revert`; libvirtd's log may say more"),
        }
    }

    /// Returns the version of the libvirt that has the snapshot.
    fn version(&self) -> Option<u32> {
        self.snapshot.connect().and_then(|connect| connect.lib_version()).ok()
    }
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

/// Formats a version of libvirt: 9010002 is 9.10.2.
pub fn version_text(version: u32) -> String {
    format!("{}.{}.{}", version / 1_000_000, version / 1000 % 1000, version % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_names_a_kind_of_snapshot_that_this_libvirt_can_revert_to() {
        let flash = |nvram_is_qcow2| Firmware { is_flash: true, nvram: None, nvram_is_qcow2 };
        for (version, firmware, words) in [
            (9_000_000, Firmware::default(), "Upgrade libvirt to 9.9 or newer, or take an internal snapshot"),
            (9_009_000, Firmware::default(), "Or take an internal snapshot"),
            (
                9_000_000,
                flash(false),
                "to 9.9 or newer for external snapshots, or to 10.10 for internal ones",
            ),
            (9_009_000, flash(true), "no internal snapshot: take an external snapshot"),
            (10_010_000, flash(false), "or keep the firmware's variables in a qcow2 file"),
            (10_010_000, flash(true), "Or take an internal snapshot"),
        ] {
            let text = advice(version, &firmware);
            assert!(text.contains(words), "no {words:?} in {text}");
        }
        let old = advice(9_000_000, &flash(false));
        assert!(!old.contains("snapshot-create-as"), "{old}");
    }

    #[test]
    fn version_has_three_numbers() {
        assert_eq!(version_text(9_000_000), "9.0.0");
        assert_eq!(version_text(11_003_001), "11.3.1");
    }
}
