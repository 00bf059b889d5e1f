//! The standby: a domain that is restored from its save image, or reverted to its snapshot, and paused. So its memory is
//! loaded, and a restore only resumes it.
//!
//! Meanwhile the domain and its snapshot may change. libvirt reports changes of a domain by events, as long as
//! the connection is the same. It reports no changes of snapshots: no event says that one was deleted, taken
//! again or made the current one. So a restore checks, and resumes the domain only if
//!
//! - the domain still has the id that it had, so it is the same QEMU;
//! - it is still paused by that, so nobody has resumed it;
//! - the snapshot to restore has the name and the time of creation of the standby's snapshot;
//! - no file that the domain names, or that its disks are based on, was changed or replaced.
//!
//! These are four requests, which libvirtd answers without QEMU, in about a millisecond together. QEMU takes
//! three milliseconds to resume the micro guest, and ten for a guest with 600 MiB in use.

use machinery::{Error, Result};
use machinery_backend::Share;
use virt::connect::Connect;
use virt::domain::{Domain, DomainPausedReason, MemoryStat};
use virt_sys as sys;

use crate::description::Description;
use crate::domain;
use crate::dsn::is_local;
use crate::errors::explain;
use crate::files;
use crate::snapshot::{self, Identity};

/// The identity of a standby: domain, snapshot and files. A changed standby has another one.
#[derive(Debug, Clone)]
pub struct Fingerprint {
    id: u32,
    snapshot: Identity,
    /// The identity of the files; `None` if libvirt is on another computer.
    files: Option<files::Identity>,
}

/// A standby.
#[derive(Debug)]
pub struct StandbyDomain {
    pub fingerprint: Fingerprint,
    /// Why the standby must not be used, if there is a reason.
    pub unusable: Option<String>,
    /// The number of the connection that brings the events of the domain.
    pub events_from: u64,
    /// Its part of the memory for standbys.
    share: Share,
}

impl StandbyDomain {
    /// Makes a standby of the domain. Adjusts `share` to the memory that the domain uses, where libvirt knows it.
    pub fn new(
        domain: &Domain,
        fingerprint: Fingerprint,
        events_from: u64,
        mut share: Share,
    ) -> StandbyDomain {
        if let Some(bytes) = used_memory(domain) {
            share.set_actual(bytes);
        }
        StandbyDomain { fingerprint, unusable: None, events_from, share }
    }

    /// Returns the memory of the standby, in bytes.
    pub fn memory(&self) -> u64 {
        self.share.bytes()
    }
}

impl Fingerprint {
    /// Takes the fingerprint of a domain that was just reverted and is paused.
    ///
    /// # Errors
    /// The domain has ended; libvirt does not answer.
    pub fn of(domain: &Domain, snapshot: Identity) -> Result<Fingerprint> {
        let id = domain.id().ok_or_else(|| Error::failed("the domain ended while it was reverted"))?;
        let failed = |error| explain("describe the domain", &error);
        let uri = domain.connect().and_then(|connect| connect.uri()).map_err(failed)?;
        let files = match is_local(&uri) {
            true => Some(files::Identity::of(&Description::read(&domain.xml_desc(0).map_err(failed)?)?)),
            false => None,
        };
        Ok(Fingerprint { id, snapshot, files })
    }

    /// Returns the domain if it is unchanged, and at the snapshot to restore: the one of that name, else the
    /// current one.
    ///
    /// # Errors
    /// Something has changed; the error says what.
    pub fn check(&self, connect: &Connect, label: &str, wanted: Option<&str>) -> Result<Domain> {
        let domain = connect
            .lookup_domain_by_id(self.id)
            .map_err(|error| explain("find the standby's domain", &error))?;
        if domain.name().ok().as_deref() != Some(label) || !is_loaded(&domain)? {
            return Err(Error::unexpected_state("somebody has resumed or replaced the standby"));
        }
        let now = snapshot::find(&domain, wanted)?.identity;
        if now != self.snapshot {
            let reason = format!(
                "the snapshot is '{}' of {} now, and the standby is of '{}' of {}",
                now.name, now.created, self.snapshot.name, self.snapshot.created
            );
            return Err(Error::unexpected_state(reason));
        }
        self.files.as_ref().map_or(Ok(()), files::Identity::expect_unchanged)?;
        Ok(domain)
    }
}

/// Reports whether the domain is paused since it was restored from a save image, or reverted.
fn is_loaded(domain: &Domain) -> Result<bool> {
    Ok(domain::is_paused(domain, DomainPausedReason::Migration)?
        || domain::is_paused(domain, DomainPausedReason::FromSnapshot)?)
}

/// Returns the memory that the running domain uses, in bytes, where libvirt knows it.
fn used_memory(domain: &Domain) -> Option<u64> {
    resident_memory(&domain.memory_stats(0).ok()?)
}

fn resident_memory(known: &[MemoryStat]) -> Option<u64> {
    let resident = known.iter().find(|stat| stat.tag == sys::VIR_DOMAIN_MEMORY_STAT_RSS)?;
    resident.val.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_driver::TestDomain;
    use machinery_backend::{Budget, Standby};

    /// Returns a domain that is reverted to its snapshot `clean` and paused, with its fingerprint.
    fn reverted(name: &str) -> (TestDomain, Fingerprint) {
        let test = TestDomain::new(name);
        test.start();
        test.take_snapshot("clean").revert(sys::VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED).unwrap();
        let snapshot = snapshot::find(&test.domain, None).unwrap();
        let fingerprint = Fingerprint::of(&test.look_up(), snapshot.identity).unwrap();
        (test, fingerprint)
    }

    #[test]
    fn standby_is_unchanged_until_its_guest_runs() {
        let (test, fingerprint) = reverted("standby-resumed");
        let check = |label| fingerprint.check(&test.connect, label, None);
        assert_eq!(check("standby-resumed").unwrap().name().unwrap(), "standby-resumed");
        assert!(check("other").unwrap_err().to_string().contains("resumed or replaced"));
        test.domain.resume().unwrap();
        assert!(check("standby-resumed").unwrap_err().to_string().contains("resumed or replaced"));
        test.domain.suspend().unwrap();
        let error = check("standby-resumed").unwrap_err().to_string();
        assert!(error.contains("resumed or replaced"), "the guest has run meanwhile: {error}");
        test.domain.destroy().unwrap();
        assert!(check("standby-resumed").unwrap_err().to_string().contains("find the standby's domain"));
        let snapshot = fingerprint.snapshot.clone();
        let error = Fingerprint::of(&test.look_up(), snapshot).unwrap_err().to_string();
        assert!(error.contains("ended while it was reverted"), "{error}");
    }

    #[test]
    fn standby_is_of_one_snapshot() {
        let (test, fingerprint) = reverted("standby-snapshot");
        let label = "standby-snapshot";
        test.domain.resume().unwrap();
        test.take_snapshot("second").revert(sys::VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED).unwrap();
        let now = Fingerprint { id: test.look_up().id().unwrap(), ..fingerprint };
        now.check(&test.connect, label, Some("clean")).unwrap();
        let error = now.check(&test.connect, label, None).unwrap_err().to_string();
        assert!(error.contains("the snapshot is 'second' of "), "{error}");
    }

    #[test]
    fn standby_has_its_share_where_libvirt_reports_no_use() {
        let (test, fingerprint) = reverted("standby-memory");
        let share = Budget::new(Some(100 << 20), None).take("m", Standby::On, 8 << 20).unwrap();
        assert_eq!(StandbyDomain::new(&test.look_up(), fingerprint, 0, share).memory(), 8 << 20);
    }

    #[test]
    fn used_memory_is_what_is_resident() {
        let stat = |tag, val| MemoryStat { tag, val };
        let (rss, other) = (sys::VIR_DOMAIN_MEMORY_STAT_RSS, sys::VIR_DOMAIN_MEMORY_STAT_AVAILABLE);
        assert_eq!(resident_memory(&[stat(other, 1), stat(rss, 7)]), Some(7 << 10));
        assert_eq!(resident_memory(&[stat(other, 1)]), None);
        assert_eq!(resident_memory(&[stat(rss, u64::MAX)]), None);
    }
}
