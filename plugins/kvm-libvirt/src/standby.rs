//! What stands by: a domain that is reverted to its snapshot and paused, so that all of its memory is
//! loaded and a restore only has to let it run.
//!
//! Until then anything may happen to the domain or to its snapshot. libvirt tells at once what happens
//! to a domain, as long as the connection is the same. Of snapshots it tells nothing: no event says that
//! one was deleted, taken anew or made the current one. So a restore asks, and lets the domain run only if
//!
//! - the domain still runs under the number that it had, so it is the same QEMU;
//! - it is still paused as a revert has left it, and not by somebody who has resumed it before;
//! - the snapshot that a restore goes to has the name and the time of creation of the one it came from;
//! - no file that the domain names, and none that its disks are based on, was changed or replaced.
//!
//! That is four questions, which libvirtd answers without asking QEMU, in about a millisecond together;
//! QEMU takes three to let the micro guest run, and ten for one with 600 MiB in use.

use machinery::{Error, Readiness, RestoreReadiness, Result, Share};
use virt::connect::Connect;
use virt::domain::{Domain, DomainPausedReason, DomainState, DomainStateReason};
use virt::enumutil::Enum;
use virt_sys as sys;

use crate::description::Description;
use crate::dsn::is_local;
use crate::errors::explain;
use crate::files;
use crate::snapshot::{self, Identity};

/// What tells the domain that stands by from what it may have become.
#[derive(Debug, Clone)]
pub struct Fingerprint {
    id: u32,
    snapshot: Identity,
    /// The identity of the files; `None` if libvirt is on another computer.
    files: Option<files::Identity>,
}

/// A domain that stands by.
#[derive(Debug)]
pub struct StandbyDomain {
    pub fingerprint: Fingerprint,
    /// Why it must not be used any more, if there is a reason.
    pub unusable: Option<String>,
    /// The connection by which is heard what happens to it.
    pub events_from: u64,
    /// Its part of the memory that may be held.
    share: Share,
}

impl StandbyDomain {
    /// One that was just made; `share` becomes as large as what is really held, where libvirt knows.
    pub fn new(
        domain: &Domain,
        fingerprint: Fingerprint,
        events_from: u64,
        mut share: Share,
    ) -> StandbyDomain {
        if let Some(bytes) = held(domain) {
            share.set_actual(bytes);
        }
        StandbyDomain { fingerprint, unusable: None, events_from, share }
    }

    /// What is told of it.
    pub fn ready(&self) -> RestoreReadiness {
        RestoreReadiness {
            mode: Readiness::Standby,
            memory: self.share.bytes(),
            ..RestoreReadiness::default()
        }
    }
}

impl Fingerprint {
    /// That of a domain which was just reverted, paused.
    ///
    /// # Errors
    /// It does not run.
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

    /// The domain, if it is still what it was and what a restore goes to: the snapshot of that name,
    /// else the current one.
    ///
    /// # Errors
    /// What it is that has changed.
    pub fn check(&self, connect: &Connect, label: &str, wanted: Option<&str>) -> Result<Domain> {
        let domain = connect
            .lookup_domain_by_id(self.id)
            .map_err(|error| explain("find the domain that stands by", &error))?;
        if domain.name().ok().as_deref() != Some(label) || !is_paused_by_revert(&domain)? {
            return Err(Error::unexpected_state(
                "somebody has resumed or replaced the domain that stands by",
            ));
        }
        let now = snapshot::find(&domain, wanted)?.identity;
        if now != self.snapshot {
            let reason = format!(
                "the snapshot is '{}' of {} now, and what stands by is of '{}' of {}",
                now.name, now.created, self.snapshot.name, self.snapshot.created
            );
            return Err(Error::unexpected_state(reason));
        }
        self.files.as_ref().map_or(Ok(()), files::Identity::expect_unchanged)?;
        Ok(domain)
    }
}

/// Whether it is paused, and by nothing but the revert.
fn is_paused_by_revert(domain: &Domain) -> Result<bool> {
    // Without an answer the state is one that is none.
    let (state, reason) = domain.state().map_err(|error| explain("tell the domain's state", &error))?;
    let from_snapshot = DomainStateReason::Paused(Enum::Known(DomainPausedReason::FromSnapshot));
    Ok(state == Enum::Known(DomainState::Paused) && reason == Enum::Known(from_snapshot))
}

/// What the domain may hold at most, in bytes.
///
/// # Errors
/// libvirt cannot be asked.
pub fn max_memory(domain: &Domain) -> Result<u64> {
    let kib = domain.max_memory().map_err(|error| explain("tell how much memory the domain has", &error))?;
    Ok(kib.saturating_mul(1024))
}

/// What the running domain holds, in bytes, where libvirt knows.
fn held(domain: &Domain) -> Option<u64> {
    let known = domain.memory_stats(0).ok()?;
    let resident = known.iter().find(|stat| stat.tag == sys::VIR_DOMAIN_MEMORY_STAT_RSS)?;
    resident.val.checked_mul(1024)
}
