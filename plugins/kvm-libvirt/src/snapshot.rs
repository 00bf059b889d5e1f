//! A domain's snapshot: its lookup, and the revert to it.
//!
//! A snapshot may have been taken of a running, a paused or a shut-off domain. A revert leaves the domain in
//! that state, unless libvirt is asked to pause it. An internal snapshot keeps disk and memory inside the
//! disk's qcow2 file, an external one in files beside it. libvirt reverts to external ones from 9.9 on.
//! Source: libvirt's docs/formatsnapshot.rst and NEWS.rst.

use std::path::Path;
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
        if reverted.as_ref().is_err_and(|error| self.may_work_later(error, self.version())) {
            std::thread::sleep(ANOTHER_SECOND);
            reverted = self.snapshot.revert(flags);
        }
        reverted.map_err(|error| self.revert_error(&error, self.version()))
    }

    /// Reports whether a revert that failed may work in another second: libvirt names the overlay of a restore after the
    /// current second, and refuses a name whose file exists. It has no error code for just that.
    fn may_work_later(&self, error: &virt::error::Error, version: Option<u32>) -> bool {
        self.description.external
            && is_refused(error)
            && version.is_some_and(|version| version >= EXTERNAL_REVERTS)
    }

    fn revert_error(&self, error: &virt::error::Error, version: Option<u32>) -> Error {
        let failed = explain(&format!("revert to the snapshot '{}'", self.identity.name), error);
        if let Some(overlay) = &self.description.overlay {
            return Error::configuration(failed.reason()).advice(advice_about_run(overlay));
        }
        // Another try would end in the same way.
        let failed = if is_unloadable(error) { Error::configuration(failed.reason()) } else { failed };
        match version {
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

/// Advises what to do about a snapshot that was taken of a run; `overlay` was a disk of that run.
pub fn advice_about_run(overlay: &Path) -> String {
    format!(
        "It was taken of a run with the disk {}, and an overlay is removed at the end of its run. Name another snapshot in \
         kvm.yaml, or delete this one with `virsh snapshot-delete`",
        overlay.display()
    )
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
    use crate::test_driver::TestDomain;
    use machinery::State;

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

    /// Returns an error of libvirt that is no refusal.
    fn any_error(domain: &Domain) -> virt::error::Error {
        Domain::lookup_snapshot_by_name(domain, "none", 0).unwrap_err()
    }

    /// Returns the error for a definition that libvirt's driver refuses: the domain has no such disk.
    fn refusal(test: &TestDomain) -> virt::error::Error {
        let disk = "<disk name='vda' snapshot='internal'/>";
        let xml = format!("<domainsnapshot><disks>{disk}</disks></domainsnapshot>");
        test.domain.create_snapshot_xml(&xml, 0).unwrap_err()
    }

    #[test]
    fn snapshot_is_the_named_one_or_else_the_current_one() {
        let test = TestDomain::new("snapshot-find");
        test.start();
        test.take_snapshot("first");
        test.take_snapshot("second");
        let found = |wanted| find(&test.domain, wanted).unwrap().identity;
        assert_eq!(found(Some("first")).name, "first");
        assert_eq!(found(None).name, "second");
        assert!(found(None).created.parse::<u64>().is_ok_and(|created| created > 0));
    }

    #[test]
    fn error_lists_the_snapshots_that_exist_when_there_is_no_such_one() {
        let test = TestDomain::new("snapshot-missing");
        let error = |wanted| find(&test.domain, wanted).err().unwrap().to_string();
        assert!(
            error(Some("clean")).contains("'snapshot-missing' has no snapshot 'clean': it has none at all")
        );
        test.take_snapshot("b").delete(0).unwrap();
        let current = error(None);
        assert!(current.contains("has no current snapshot: it has none"), "{current}");
        assert!(current.contains("or name one of those it has") && !current.contains("Upgrade"), "{current}");
        test.take_snapshot("b");
        test.take_snapshot("a");
        assert!(error(Some("clean")).contains("it has a, b"), "{}", error(Some("clean")));
    }

    #[test]
    fn error_advises_about_uefi_when_the_domain_boots_by_it() {
        let firmware = "<loader readonly='yes' type='pflash'>/f/code</loader><nvram>/f/vars</nvram>";
        let test = TestDomain::with(firmware, "", "snapshot-uefi");
        let error = find(&test.domain, None).err().unwrap().to_string();
        assert!(error.contains("one of those it has. ") && error.contains("UEFI"), "{error}");
    }

    #[test]
    fn snapshot_has_memory_when_the_domain_was_on() {
        let test = TestDomain::new("snapshot-memory");
        let off = test.take_snapshot("off");
        test.start();
        let on = test.take_snapshot("on");
        assert!(!describe(off).unwrap().has_memory());
        assert!(describe(on).unwrap().has_memory());
    }

    #[test]
    fn revert_leaves_the_domain_paused_or_in_the_state_of_the_snapshot() {
        let test = TestDomain::new("snapshot-revert");
        test.start();
        let snapshot = describe(test.take_snapshot("on")).unwrap();
        test.domain.destroy().unwrap();
        snapshot.revert_paused().unwrap();
        assert_eq!(domain::state(&test.domain).unwrap().0, State::Paused);
        test.domain.destroy().unwrap();
        snapshot.revert().unwrap();
        assert_eq!(domain::state(&test.domain).unwrap().0, State::Running);
        snapshot.snapshot.delete(0).unwrap();
        let error = snapshot.revert().unwrap_err().to_string();
        assert!(error.contains("libvirt cannot revert to the snapshot 'on'"), "{error}");
    }

    #[test]
    fn version_of_a_snapshot_is_that_of_its_libvirt() {
        let test = TestDomain::new("snapshot-version");
        let snapshot = describe(test.take_snapshot("s")).unwrap();
        assert_eq!(snapshot.version(), Some(test.connect.lib_version().unwrap()));
    }

    #[test]
    fn revert_error_has_advice_when_the_snapshot_was_taken_of_a_run() {
        let test = TestDomain::new("snapshot-of-run");
        test.start();
        let mut snapshot = describe(test.take_snapshot("r")).unwrap();
        let text = |snapshot: &Snapshot| snapshot.revert_error(&any_error(&test.domain), None).to_string();
        assert!(!text(&snapshot).contains("snapshot-delete"));
        snapshot.description.overlay = Some("/d/o.qcow2".into());
        let text = text(&snapshot);
        assert!(text.contains("disk /d/o.qcow2") && text.contains("virsh snapshot-delete"), "{text}");
    }

    #[test]
    fn external_snapshot_is_not_revertible_before_libvirt_9_9() {
        let test = TestDomain::new("snapshot-external");
        test.start();
        let (internal, external) = (test.take_snapshot("i"), test.take_external_snapshot("e"));
        let (internal, external) = (describe(internal).unwrap(), describe(external).unwrap());
        let why = not_revertible(&external, EXTERNAL_REVERTS - 1).unwrap();
        assert!(why.contains("'e' is external, and libvirt 9.8.999 cannot"), "{why}");
        assert_eq!(not_revertible(&external, EXTERNAL_REVERTS), None);
        assert_eq!(not_revertible(&internal, EXTERNAL_REVERTS - 1), None);
        let error = any_error(&test.domain);
        let advice_for = |snapshot: &Snapshot, version| snapshot.revert_error(&error, version).to_string();
        let old = advice_for(&external, Some(EXTERNAL_REVERTS - 1));
        assert!(old.contains("libvirt 9.8.999 cannot revert to those. Upgrade libvirt to 9.9"), "{old}");
        for (snapshot, version) in [
            (&external, Some(EXTERNAL_REVERTS)),
            (&internal, Some(EXTERNAL_REVERTS - 1)),
            (&internal, Some(BROKEN_REVERTS.start - 1)),
            (&internal, Some(BROKEN_REVERTS.end)),
            (&internal, None),
        ] {
            let text = advice_for(snapshot, version);
            assert!(text.contains("`virsh snapshot-revert`"), "{version:?}: {text}");
        }
        let broken = advice_for(&internal, Some(BROKEN_REVERTS.start));
        assert!(broken.contains("libvirt 11.2.0 cannot revert to every internal snapshot"), "{broken}");
    }

    #[test]
    fn revert_is_tried_again_only_when_an_overlay_of_the_same_second_may_exist() {
        let test = TestDomain::new("snapshot-again");
        test.start();
        let (internal, external) = (test.take_snapshot("i"), test.take_external_snapshot("e"));
        let (internal, external) = (describe(internal).unwrap(), describe(external).unwrap());
        let (refused, other) = (refusal(&test), any_error(&test.domain));
        assert!(external.may_work_later(&refused, Some(EXTERNAL_REVERTS)));
        assert!(!external.may_work_later(&refused, Some(EXTERNAL_REVERTS - 1)));
        assert!(!external.may_work_later(&refused, None));
        assert!(!external.may_work_later(&other, Some(EXTERNAL_REVERTS)));
        assert!(!internal.may_work_later(&refused, Some(EXTERNAL_REVERTS)));
    }

    #[test]
    fn version_has_three_numbers() {
        assert_eq!(version_text(9_000_000), "9.0.0");
        assert_eq!(version_text(11_003_001), "11.3.1");
    }
}
