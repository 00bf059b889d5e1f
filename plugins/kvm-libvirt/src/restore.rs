//! Starts of a domain that is off: a revert to its snapshot, or a cold boot with the snapshot's disk.
//!
//! Both leave the domain paused, so that the caller can mark it before its guest runs.

use machinery::Result;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt_sys as sys;

use crate::domain::destroy;
use crate::errors::explain;
use crate::snapshot;

/// The way in which a machine is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// From its snapshot's memory.
    Restored,
    /// A cold boot, with the disk of the snapshot.
    Cold,
}

/// Starts the domain, which is off, and leaves it paused.
///
/// # Errors
/// The domain cannot be started. It may be in any state then.
pub fn start_paused(domain: &Domain, wanted: Option<&str>, how: Start) -> Result<()> {
    match how {
        Start::Restored => snapshot::find(domain, wanted)?.revert_paused(),
        Start::Cold => boot_from_snapshots_disk(domain, wanted),
    }
}

/// Boots the domain with the disk of the snapshot. The disk still has the last run's changes, so it is
/// reverted first.
fn boot_from_snapshots_disk(domain: &Domain, wanted: Option<&str>) -> Result<()> {
    match domain.num_snapshots(0) {
        Ok(0) if wanted.is_none() => tracing::warn!(
            label = domain.name().unwrap_or_default(),
            "the domain has no snapshot: it starts with the changes of its last run on its disk"
        ),
        _ => revert_disk(domain, wanted)?,
    }
    boot_paused(domain).map_err(|error| explain("start the domain", &error))
}

/// Boots the domain, but never from a managed save, which somebody may have made meanwhile.
fn boot_paused(domain: &Domain) -> std::result::Result<(), virt::error::Error> {
    let booted = domain.create_with_flags(sys::VIR_DOMAIN_START_PAUSED | sys::VIR_DOMAIN_START_FORCE_BOOT);
    match booted {
        // Some drivers cannot start a domain paused.
        Err(error) if error.code().is(ErrorNumber::InvalidArg) => domain.create(),
        other => other,
    }
}

/// Boots the domain as `xml` describes it, which is off, and leaves it paused. libvirt's definition of the domain stays,
/// and so does a managed save.
///
/// # Errors
/// The domain cannot be started.
pub fn boot_paused_as(connect: &Connect, xml: &str) -> Result<()> {
    let booted = connect.create_domain_xml(xml, sys::VIR_DOMAIN_START_PAUSED);
    booted.map(drop).map_err(|error| explain("start the domain", &error))
}

fn revert_disk(domain: &Domain, wanted: Option<&str>) -> Result<()> {
    let snapshot = snapshot::find(domain, wanted)?;
    // libvirt reverts to a snapshot's disk only together with its memory. The guest stays paused meanwhile.
    if snapshot.has_memory() {
        snapshot.revert_paused()?;
    } else {
        snapshot.revert()?;
    }
    destroy(domain).map(drop)
}
