//! The parts of the commands that differ for a machine of the machinery `kvm`: it is a domain of libvirt.
//!
//! ```text
//! overlay of the installed disk ─▶ domain ─▶ snapshot `installed` ─▶ cold boot ─▶ snapshot `clean`, with memory
//! ```
//!
//! Both snapshots are internal, in the overlay: every version of libvirt reverts to those. A new snapshot is taken from the
//! snapshot `installed`, beside the present one. The machine has it once its entry names it.

use std::path::{Path, PathBuf};

use machinery::{Error, ErrorKind, Result};
use machinery_images::Header;

use super::arguments::{LOOPBACK, accel, domain_arguments};
use super::base::{expect_unchanged, identify};
use super::context::{Context, KVM};
use super::dependents::lock_base;
use super::description::{Card, description};
use super::domain::{Domain, DomainEntry, INSTALLED, Recorded, next_snapshot};
use super::folder::expect_space;
use super::host;
use super::info::{DISK, Info, configured_dsn, domain_entries};
use super::make::{Plan, make};
use super::options::{Create, Ready};
use super::publish::Made;
use super::section::lock_configuration;
use super::unfinished::Unfinished;
use crate::commands::import::{self, DEFAULT_DSN, LOCAL, Network, Virsh};
use crate::config::Config;
use crate::cwd::Cwd;

/// Returns the address of the libvirt that gets the domain.
///
/// # Errors
/// It is on another computer, or does not answer.
pub fn dsn(cwd: &Cwd, create: &Create) -> Result<String> {
    let given = create.dsn.clone().map_or_else(|| configured_dsn(cwd), |dsn| Ok(Some(dsn)));
    let dsn = given?.unwrap_or_else(|| DEFAULT_DSN.to_owned());
    if !dsn.starts_with(LOCAL) {
        return Err(Error::unsupported(&format!(
            "making a machine at {dsn}, as its disk is a file of this computer"
        ))
        .machine(&create.name)
        .advice("Run the command on that computer, with --dsn qemu:///system"));
    }
    // Before anything is made, which this libvirt would have to remove.
    Virsh::new(&dsn)?.read(&["uri"]).map_err(|error| error.machine(&create.name))?;
    Ok(dsn)
}

/// Returns the interface on which the machine's traffic is captured.
///
/// # Errors
/// libvirt has no such network, or the network is off.
pub fn interface(create: &Create, dsn: &str) -> Result<String> {
    let Some(name) = &create.network.libvirt_network else {
        return Ok(create.network.bridge.clone().unwrap_or_else(|| LOOPBACK.to_owned()));
    };
    let virsh = Virsh::new(dsn)?;
    let network = Network::read(&virsh.read(&["net-dumpxml", "--network", name])?)?;
    let refused =
        |reason: String, advice: &str| Err(Error::environment(reason).machine(&create.name).advice(advice));
    if !virsh.names(&["net-list", "--name"])?.contains(name) {
        return refused(format!("libvirt's network '{name}' is off"), "Start it: virsh net-start NETWORK");
    }
    match network.bridge {
        Some(bridge) => Ok(bridge),
        None => {
            refused(format!("libvirt's network '{name}' has no bridge"), "Give another network, or --bridge")
        }
    }
}

/// Defines the domain of a new machine, with an overlay of the installed disk, and adds both to the description.
///
/// # Errors
/// The disk cannot be made, or libvirt refuses the domain.
pub fn define(
    config: &Config,
    create: &Create,
    dsn: &str,
    info: &mut Info,
    files: &[(PathBuf, String)],
    unfinished: &mut Unfinished,
) -> Result<()> {
    let card = match (&create.network.bridge, &create.network.libvirt_network) {
        (Some(bridge), _) => Card::Bridge(bridge),
        (None, Some(network)) => Card::Network(network),
        (None, None) => Card::Arguments,
    };
    expect_space(config, unfinished.machine_folder(), create.ram << 20)?;
    let domain = Domain::new(dsn, &create.name)?;
    unfinished.record_domain(Recorded::whole(&domain))?;
    let (folder, names) = (unfinished.machine_folder(), files.iter().map(|(_, name)| name.clone()));
    let (names, disk) = (names.collect::<Vec<_>>(), folder.join(DISK));
    let machine = &mut info.machine;
    machine.memory_snapshot.clear();
    machine.start_args = domain_arguments(create, &machine.mac)?;
    make_overlay(machine.base.as_deref().unwrap_or(&disk), &disk)?;
    let args = info.clone().placed_in(folder, &names).machine.start_args;
    let text = description(create, &domain, accel(create.accel), &disk, (&card, &info.machine.mac), &args);
    domain.define(&text, unfinished.scratch()).map_err(|error| error.machine(&create.name))?;
    info.machine.domain = Some(domain);
    Ok(())
}

/// Makes an overlay of a disk, which `qemu-img` does not open: an operating system has written to it.
fn make_overlay(base: &Path, overlay: &Path) -> Result<()> {
    let header = Header::read(base)?;
    let not_qcow2 = || Error::configuration(format!("{} is not a qcow2 disk", base.display()));
    let size = header.ok_or_else(not_qcow2)?.size;
    let mut make = machinery::command("qemu-img");
    make.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-u", "-b"]);
    make.arg(base).arg(overlay).arg(size.to_string());
    let ran = make.output().map_err(|error| Error::environment(format!("cannot run qemu-img: {error}")))?;
    if ran.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&ran.stderr).trim().to_owned();
    Err(Error::failed(format!("qemu-img cannot make {}: {why}", overlay.display())))
}

/// A machine that `machine create` has made.
pub struct Found {
    pub info: Info,
    pub domain: Domain,
    pub folder: PathBuf,
}

/// Finds a machine of the configuration. Its folder is that of its domain's disk.
///
/// # Errors
/// libvirt has no such domain, or another tool has made the machine.
pub fn find(cwd: &Cwd, name: &str) -> Result<Found> {
    let entry = domain_entries(cwd)?.into_iter().find(|entry| entry.name == name);
    let entry = entry.ok_or_else(|| Error::configuration("kvm.yaml has no such machine").machine(name))?;
    found(entry)
}

/// Finds the machine of an entry.
fn found(entry: DomainEntry) -> Result<Found> {
    let name = &entry.name;
    let described = Virsh::new(&entry.dsn)?.read(&["dumpxml", "--inactive", "--domain", &entry.label]);
    let by_hand = "Remove its entry from kvm.yaml by hand, and its domain by `virsh undefine`";
    let described = described.map_err(|error| error.machine(name).default_advice(by_hand))?;
    let described = import::Domain::read(&described)?;
    let folder = described.disks.first().and_then(|disk| Path::new(disk).parent()).unwrap_or(Path::new("/"));
    let foreign =
        || Error::configuration("`machine create` has not made this machine").machine(name).advice(by_hand);
    let info = Info::read(folder).map_err(|error| foreign().detail(error.reason()))?;
    let own = info.machine.domain.clone();
    let own = own.filter(|own| own.uuid == described.uuid && own.label == entry.label).ok_or_else(foreign)?;
    let domain = Domain { dsn: entry.dsn, snapshot: entry.snapshot.unwrap_or_default(), ..own };
    Ok(Found { folder: folder.to_owned(), info, domain })
}

/// Finds the machines of the configuration that `machine create` has made. A libvirt that does not answer is asked once.
pub fn all_found(cwd: &Cwd) -> impl Iterator<Item = Found> {
    let mut silent = Vec::new();
    domain_entries(cwd).unwrap_or_default().into_iter().filter_map(move |entry| {
        let dsn = entry.dsn.clone();
        if silent.contains(&dsn) {
            return None;
        }
        let found = found(entry);
        if matches!(&found, Err(error) if error.kind() == ErrorKind::Timeout) {
            silent.push(dsn);
        }
        found.ok()
    })
}

/// Takes the snapshot of a machine anew.
///
/// # Errors
/// A host uses the machine, the guest is not ready in time, or a step fails. The machine then is as it was.
pub fn snapshot(context: &Context<'_>, name: &str, ready: &Ready) -> Result<Made> {
    let cwd = context.cwd;
    let Found { info, domain: old, folder } = find(cwd, name)?;
    let entries = [name.to_owned()];
    host::expect_unused(&host::machines_of(cwd, KVM, &entries)?)?;
    let known = old.snapshots()?;
    if !known.iter().any(|known| known == INSTALLED) || old.snapshot.is_empty() {
        let reason = format!("its domain has no snapshot '{INSTALLED}', or its entry does not name one");
        return Err(Error::configuration(reason).machine(name).advice("Make the machine anew"));
    }
    let _base = info.machine.base.as_deref().map(|base| lock_base(cwd, base)).transpose()?;
    let warnings = expect_unchanged(&info.machine)?;
    let base_files = info.machine.base.as_deref().map_or_else(|| Ok(Vec::new()), identify);
    let base_files = base_files.map_err(|error| error.machine(name))?;
    let new = Domain { snapshot: next_snapshot(&known), ..old.clone() };
    let recorded = Recorded::snapshots(&new, &old.snapshot, &new.snapshot);
    let mut unfinished = Unfinished::begin_snapshot(cwd, name, &folder, recorded)?;
    let made = unfinished.hold(cwd, &entries).and_then(|()| {
        let mut plan = Plan { info, files: Vec::new(), ready };
        plan.info.machine.domain = Some(new.clone());
        let ready = make(context, &plan, &mut unfinished, &folder)?;
        let mut notes = publish(context, name, &old, &new)?;
        // The new snapshot depends on the installed disk as it is now.
        plan.info.machine.base_files = base_files;
        notes.extend(plan.info.write(&folder).err().map(|error| error.to_string()));
        let notes = warnings.into_iter().chain(notes).collect();
        Ok(Made { machine: name.to_owned(), folder: folder.clone(), ready, notes })
    });
    unfinished.conclude(context, &folder, made)
}

/// Gives the new snapshot to the machine and to a running host. Returns what the operator has to know.
fn publish(context: &Context<'_>, name: &str, old: &Domain, new: &Domain) -> Result<Vec<String>> {
    let _absent = host::keep_out(context.cwd)?;
    // A host that has started meanwhile may have the machine for a task of an earlier one.
    host::wait_until_unused(context.cwd, KVM, &[name.to_owned()], context.step)?;
    let lock = lock_configuration(context.cwd)?;
    import::set(&context.cwd.machinery_yaml(KVM), name, "snapshot", &new.snapshot)?;
    drop(lock);
    let mut notes: Vec<String> = host::reload(context.cwd).into_iter().collect();
    // The machine is finished by now: an old snapshot that remains is no failure.
    notes.extend(old.remove_snapshot(&old.snapshot).err().map(|error| error.to_string()));
    Ok(notes)
}

/// Expects that the domain of a machine that is to be removed is off.
///
/// # Errors
/// It is on, or libvirt does not answer.
pub fn expect_off(domain: &Domain) -> Result<()> {
    if domain.is_on()? {
        return Err(
            Error::unexpected_state(format!("its domain '{}' is on", domain.label)).advice("Stop it first")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_has_the_size_of_the_disk_below_it() {
        let folder = tempfile::tempdir().unwrap();
        let (base, overlay) = (folder.path().join("base, 1"), folder.path().join("disk.qcow2"));
        let mut make = machinery::command("qemu-img");
        assert!(make.args(["create", "-q", "-f", "qcow2"]).arg(&base).arg("7M").status().unwrap().success());
        make_overlay(&base, &overlay).unwrap();
        assert_eq!(Header::read(&overlay).unwrap().unwrap().size, 7 << 20);
        assert!(make_overlay(&folder.path().join("none"), &overlay).is_err());
    }
}
