//! The end of whatever a command has left of a machine: the runs of its guest, and its domain.

use std::fs;
use std::path::Path;

use machinery::{Result, Setup};

use super::context::{Context, KVM, MACHINERY};
use super::domain::{Recorded, reverting, wait_for_virsh};
use super::info;
use super::session::{with_session, without_machines};
use crate::cwd::Cwd;

/// Returns the machinery of a machine that is this domain, or none.
pub fn machinery_of(domain: Option<&Recorded>) -> &'static str {
    if domain.is_some() { KVM } else { MACHINERY }
}

/// Reports whether the configuration has the machine: its domain, or else a file in its folder.
///
/// # Errors
/// The configuration cannot be read.
pub fn is_configured(cwd: &Cwd, domain: Option<&Recorded>, folder: &Path) -> Result<bool> {
    match domain {
        None => info::is_configured(cwd, folder),
        Some(domain) => Ok(info::domain_entries(cwd)?.iter().any(|entry| domain.is_of(entry))),
    }
}

/// Ends the runs that the commands have left. The plugin does so when it is loaded, also without the machine: its files or
/// its bridge may not exist any more.
///
/// # Errors
/// A run remains.
pub fn end_runs(context: &Context<'_>, setup: &Setup, name: &str) -> Result<()> {
    // The state of the disks after a run of a domain is no run.
    let is_run = |entry: &fs::DirEntry| entry.path().extension().is_none_or(|end| end != "disks");
    let has_left =
        || fs::read_dir(&setup.state_dir).is_ok_and(|entries| entries.flatten().any(|entry| is_run(&entry)));
    let load = |setup: &Setup| with_session(context, setup, name, |_| Ok(()));
    let Err(error) = load(setup) else { return Ok(()) };
    if has_left() {
        tracing::debug!(machine = name, %error, "the plugin does not load with the machine");
        load(&without_machines(setup))?;
    }
    if has_left() { Err(error) } else { Ok(()) }
}

/// Removes everything of the domain that the configuration does not have, and reverts a disk that is kept. Without the
/// revert, a host would take the changes of the last run for the work of somebody else. `scratch` is the record's folder.
///
/// # Errors
/// libvirt fails.
pub fn clear_domain(
    context: &Context<'_>,
    name: &str,
    domain: &Recorded,
    setup: Option<&Setup>,
    scratch: &Path,
) -> Result<()> {
    wait_for_virsh(scratch)?;
    let entries = info::domain_entries(context.cwd)?;
    let entry = entries.iter().find(|entry| domain.is_of(entry));
    domain.clear(entry)?;
    let snapshot = entry.and_then(|entry| entry.snapshot.as_ref()).filter(|_| domain.is_changed());
    let Some((setup, snapshot)) = setup.zip(snapshot) else { return Ok(()) };
    let limit = context.config.timeouts.prepare;
    let reverted = with_session(context, &reverting(setup, snapshot), name, |session| {
        session.call("reverting the disk", limit, |instance, machine, deadline| {
            instance.prepare(machine, deadline)
        })
    });
    if let Err(error) = reverted {
        // The next restore reverts it, too.
        tracing::warn!(machine = name, %error, "the disk of its domain has changes");
    }
    Ok(())
}
