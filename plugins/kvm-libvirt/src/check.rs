//! The checks of `cuckoo-machinery check`: libvirt, its QEMU, and each domain with its snapshot.
//!
//! The findings are collected on one connection to libvirt.

use std::fs;
use std::path::Path;
use std::time::Duration;

use machinery::config::ConfigFile;
use machinery::trust::expect_trusted;
use machinery::{Deadline, Diagnosis, Error, MachineInfo, Report, Result, Setup, State};
use virt::connect::Connect;
use virt::domain::Domain;

use crate::access::{self, Access, KVM_DEVICE, Permissions};
use crate::compare::{self, Described};
use crate::config::{Config, Keys, renamed_keys_of};
use crate::confinement;
use crate::connection::Connection;
use crate::console;
use crate::domain;
use crate::dsn::{self, is_local};
use crate::errors::explain;
use crate::files;
use crate::foreign;
use crate::leftovers::RunMarker;
use crate::reaping;
use crate::snapshot::{self, EXTERNAL_REVERTS, Snapshot, version_text};

/// The time that libvirt has to answer all requests.
const CHECK_TIMEOUT: Duration = Duration::from_secs(30);

/// Returns the versions of libvirt and of its hypervisor, for people.
///
/// # Errors
/// libvirt does not answer.
pub fn versions(connect: &Connect) -> Result<String> {
    let failed = |error| explain("report its version", &error);
    let libvirt = version_text(connect.lib_version().map_err(failed)?);
    let hypervisor = version_text(connect.hyp_version().map_err(failed)?);
    let uri = connect.uri().map_err(failed)?;
    let driver = dsn::driver(&uri);
    Ok(format!("libvirt {libvirt}, {driver} {hypervisor}"))
}

/// Checks the configuration and the environment.
pub fn check(setup: &Setup, report: &mut Report) {
    renamed_keys_of(setup).into_iter().for_each(|warning| report.warning(format!("kvm: {warning}")));
    let Some(config) = report.keep(Config::read(setup)) else { return };
    if config.machines.is_empty() {
        report.warning(
            "kvm: no machine is configured. Add some to kvm.yaml: a name, and the label of a domain",
        );
    }
    if let Some(folder) = config.image_folder() {
        report.keep(expect_trusted(folder).map_err(|error| error.action("checking instant_dir")));
    }
    let (mut domains, unreaped, dsns) = (Vec::new(), reaping::unreaped(), config.dsns());
    for dsn in &dsns {
        let machines = config.machines.iter().filter(|keys| keys.dsn == *dsn).cloned().collect();
        let found = report.keep(check_libvirt(setup, dsn, machines));
        if let Some((findings, described)) = found {
            report.append(if dsns.len() > 1 { of_libvirt(findings, dsn) } else { findings });
            domains.extend(described);
        }
    }
    compare::shared_disks(&domains).iter().for_each(|problem| report.problem(problem));
    let reaping = reaping::warning(&unreaped).filter(|_| dsns.iter().any(|dsn| is_local(dsn)));
    reaping.into_iter().for_each(|warning| report.warning(warning));
    compare::same_domains(&domains).into_iter().for_each(|warning| report.warning(warning));
}

/// Adds the address of the libvirt to findings about no machine: the findings of several libvirts are listed together.
fn of_libvirt(findings: Report, dsn: &str) -> Report {
    findings.map_text(|text| match text.strip_prefix("kvm: ") {
        Some(finding) if !text.contains(dsn) => format!("kvm at {dsn}: {finding}"),
        _ => text,
    })
}

/// Checks one libvirt and its machines, and returns the findings and the domains.
///
/// # Errors
/// libvirt cannot be reached, or does not answer.
fn check_libvirt(setup: &Setup, dsn: &str, machines: Vec<Keys>) -> Result<(Report, Vec<Described>)> {
    let deadline = Deadline::after(CHECK_TIMEOUT);
    let connection = Connection::new(dsn);
    connection.open(deadline)?;
    let (file, state_dir, dsn) = (setup.config.clone(), setup.state_dir.clone(), dsn.to_owned());
    let found = connection.ask(deadline, "libvirt to describe the domains", move |connect| {
        let mut report = Report::default();
        report.good(format!("kvm: {} at {dsn}", versions(connect)?));
        check_access(connect, &dsn, &mut report);
        let labels = machines.iter().map(|keys| keys.info.label.as_str());
        confinement::check(connect, labels, &mut report);
        let warnings = [remote_limits(&dsn), broken_reverts(connect)].into_iter().flatten();
        warnings.for_each(|warning| report.warning(warning));
        let infos: Vec<&MachineInfo> = machines.iter().map(|keys| &keys.info).collect();
        infos.iter().for_each(|info| check_machine(connect, info, &file, &state_dir, &mut report));
        let overlaid = machines.iter().filter(|keys| !keys.image.is_off());
        let found = overlaid.filter_map(|keys| overlay_warnings(connect, keys)).flatten();
        found.for_each(|warning| report.warning(warning));
        Ok((report, infos.iter().filter_map(|info| Described::of(connect, &dsn, info)).collect()))
    });
    connection.close(deadline);
    found
}

/// Checks one machine.
fn check_machine(
    connect: &Connect,
    info: &MachineInfo,
    file: &ConfigFile,
    state_dir: &Path,
    report: &mut Report,
) {
    let name = &info.name;
    let domain = match domain::domain(connect, &info.label) {
        Ok(domain) => domain,
        Err(error) => return report.problem(&file.error(&["machines", name, "label"], error.to_string())),
    };
    let snapshot = snapshot::find(&domain, info.snapshot.as_deref()).map_err(|error| error.machine(name));
    let snapshot = report.keep(snapshot);
    if let Some(snapshot) = &snapshot {
        check_snapshot(connect, name, snapshot, report);
    }
    for problem in file_problems(connect, &domain, snapshot.as_ref()) {
        report.problem(&problem.machine(name));
    }
    match domain::state(&domain) {
        Ok((State::Poweroff, _)) => {
            foreign::finding(name, &domain, state_dir).into_iter().for_each(|work| report.warning(work));
        }
        // libvirt's reason for a domain that was restored from a save image is a migration.
        Ok((State::Paused | State::Error, _))
            if RunMarker::of(name, state_dir).matches(&domain).unwrap_or(false) =>
        {
            report.good(format!("machine '{name}': it has a standby for its next restore"));
        }
        Ok((state, why)) => report.warning(format!(
            "machine '{name}': its domain is {state} now {why}, and its next start stops it first"
        )),
        Err(error) => report.problem(&error.machine(name)),
    }
    check_definition(name, &domain, report);
    let mut warnings =
        compare::warnings(connect, &domain, info).unwrap_or_else(|error| vec![error.to_string()]);
    warnings.extend(console_warning(info, &domain, snapshot.as_ref()));
    warnings.iter().for_each(|text| report.warning(format!("machine '{name}': {text}")));
}

/// Returns the problems of the domain's and the snapshot's files, if these are on this computer.
fn file_problems(connect: &Connect, domain: &Domain, snapshot: Option<&Snapshot>) -> Vec<Error> {
    if !connect.uri().is_ok_and(|uri| is_local(&uri)) {
        return Vec::new();
    }
    let defined = domain::defined(domain);
    defined.map_or_else(|error| vec![error], |defined| files::problems(&defined, snapshot))
}

/// Diagnoses one machine: its domain, its snapshot, and the files of both.
pub fn diagnose(connect: &Connect, info: &MachineInfo) -> Diagnosis {
    let mut diagnosis = Diagnosis::new(&info.name);
    let Some(domain) = diagnosis.keep(domain::domain(connect, &info.label)) else { return diagnosis };
    let snapshot = diagnosis.keep(snapshot::find(&domain, info.snapshot.as_deref()));
    for problem in file_problems(connect, &domain, snapshot.as_ref()) {
        diagnosis.keep::<()>(Err(problem));
    }
    diagnosis.warnings.extend(console_warning(info, &domain, snapshot.as_ref()));
    diagnosis
}

/// Returns the warning about a machine that cannot have its console.
fn console_warning(info: &MachineInfo, domain: &Domain, snapshot: Option<&Snapshot>) -> Option<String> {
    let described = info.console.then(|| domain::described(domain).ok()).flatten()?;
    console::warning(
        &info.label,
        &described,
        snapshot.and_then(|snapshot| snapshot.description.domain.as_ref()),
    )
}

/// Lists the features that a libvirt on another computer does not support.
fn remote_limits(dsn: &str) -> Option<String> {
    let host = dsn::host(dsn)?;
    Some(format!(
        "kvm: libvirt is on {host}. Restores, stops, standby and screenshots work; there are no save images, memory \
         dumps and captures of traffic, because files and interfaces are those of {host}, which is not checked"
    ))
}

/// Warns of [`snapshot::BROKEN_REVERTS`]. libvirt does not report patches, so its version decides about this
/// warning.
fn broken_reverts(connect: &Connect) -> Option<String> {
    let version = connect.lib_version().ok()?;
    let system = fs::read_to_string("/etc/os-release").unwrap_or_default();
    if connect.uri().is_ok_and(|uri| is_local(&uri)) && is_fixed(version, &system) {
        return None;
    }
    snapshot::BROKEN_REVERTS.contains(&version).then(|| {
        format!(
            "kvm: libvirt {} cannot revert to internal snapshots of every domain, unless its distribution has fixed \
             it (it is fixed in 11.4). Try `virsh snapshot-revert` once; upgrade libvirt if that fails",
            version_text(version)
        )
    })
}

/// Debian's 11.3.0-2 has the fix: its changelog lists the patch, and its reverts were tested.
fn is_fixed(version: u32, os_release: &str) -> bool {
    version >= 11_003_000 && os_release.lines().any(|line| line == "ID=debian")
}

/// Describes the snapshot, and checks that it can be restored.
fn check_snapshot(connect: &Connect, name: &str, snapshot: &Snapshot, report: &mut Report) {
    let kind = if snapshot.description.external { "external" } else { "internal" };
    report.good(format!(
        "machine '{name}': snapshot '{}', {kind}, of the domain when it was {}",
        snapshot.identity.name, snapshot.description.state
    ));
    let version = connect.lib_version().unwrap_or(EXTERNAL_REVERTS);
    if let Some(reason) = snapshot::not_revertible(snapshot, version) {
        let firmware = snapshot.description.domain.as_ref().map(|domain| domain.firmware.clone());
        let advice = snapshot::advice(version, &firmware.unwrap_or_default());
        report.problem(&Error::environment(reason).machine(name).advice(advice));
    }
    if !snapshot.has_memory() {
        report.warning(format!(
            "machine '{name}': its snapshot has no memory (it was taken while the domain was off, or with \
             --disk-only), so each restore boots the guest. \
             Take one of the running guest, with Cuckoo's agent waiting in it"
        ));
    }
}

/// Checks the domain's definition.
fn check_definition(name: &str, domain: &Domain, report: &mut Report) {
    let described = domain::described(domain).unwrap_or_default();
    if described.kind == "qemu" && Path::new(KVM_DEVICE).exists() {
        report.warning(format!(
            "machine '{name}': its domain is of the type qemu, which runs in software. Where /dev/kvm works, the \
             type kvm is many times faster"
        ));
    }
    if !domain.is_persistent().unwrap_or(true) {
        let reason = "its domain has no definition, so it does not exist any more once it is stopped";
        let problem = Error::environment(reason).machine(name).advice("Define it with `virsh define`");
        report.problem(&problem);
    }
}

/// Checks the [`access`] to `/dev/kvm`.
fn check_access(connect: &Connect, dsn: &str, report: &mut Report) {
    let device = Permissions::of(Path::new(KVM_DEVICE)).filter(|_| dsn.starts_with("qemu:///"));
    let user = || access::user_of_qemu(&connect.capabilities().ok()?);
    let Some((device, user)) = device.and_then(|device| Some((device, user()?))) else { return };
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let group = fs::read_to_string("/etc/group").unwrap_or_default();
    let name = access::name_of(user.uid, &passwd).map_or_else(|| user.uid.to_string(), str::to_owned);
    if device.allow(user, &access::groups_of(&name, &group)) {
        return report.good(format!("kvm: libvirt's QEMU, as user {name}, may use {KVM_DEVICE}"));
    }
    report.warning(format!(
        "kvm: libvirt runs QEMU as user {name}, which may not use {KVM_DEVICE}: domains of the type kvm do not start, \
         and libvirtd takes seconds longer at each of its starts. Add the user to the group `kvm` (usermod -aG \
         kvm {name}) and give the device to that group (mode 0660), then restart libvirtd"
    ));
}

/// Returns the warnings about a machine whose runs use overlays: QEMU's user may write to a disk below them nevertheless, or
/// may not reach the overlays.
fn overlay_warnings(connect: &Connect, keys: &Keys) -> Option<Vec<String>> {
    let domain = domain::domain(connect, &keys.info.label).ok()?;
    let snapshot = snapshot::find(&domain, keys.info.snapshot.as_deref()).ok()?;
    // While the domain is on, libvirt may have given its disks to QEMU's user.
    let is_off = domain::state(&domain).ok()?.0 == State::Poweroff;
    let source = keys.image.source(&domain, &snapshot).ok().filter(|_| is_off)?;
    let user = access::user_of_qemu(&connect.capabilities().ok()?)?;
    let (name, uid) = (&keys.info.name, user.uid);
    let writable = match source.access(user).ok()? {
        Access::Reads => None,
        Access::Writes(file) => Some(format!(
            "machine '{name}': QEMU's user (number {uid}) may write to {}. A run only reads that file, but code that has \
             escaped from the guest could write to it. Let another user own it, and QEMU's user only read it (chown root, \
             chmod 644)",
            file.display()
        )),
        Access::None(file) => Some(format!(
            "machine '{name}': QEMU's user (number {uid}) may not read {}, so libvirt gives the machine's disks to that user \
             during each run. A run only reads them, but code that has escaped from the guest could write to them then. Let \
             QEMU's user read the file (chmod o+r)",
            file.display()
        )),
    };
    let (_, overlay) = source.overlays.first()?;
    let unreachable = user.closed_folder(overlay).map(|folder| {
        format!(
            "machine '{name}': its overlays are made below {}, which QEMU's user (number {uid}) may not enter, so the domain \
             does not start with them. Open that folder (chmod o+x), or set another disposable_copy_dir",
            folder.display()
        )
    });
    Some([writable, unreachable].into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reverts_are_fixed_in_the_distribution_that_was_tested() {
        let debian = "NAME=x\nID=debian\n";
        assert!(is_fixed(11_003_000, debian));
        assert!(!is_fixed(11_002_000, debian) && !is_fixed(11_003_000, "ID=other\nID_LIKE=debian\n"));
        assert!(
            snapshot::BROKEN_REVERTS.contains(&11_003_000) && !snapshot::BROKEN_REVERTS.contains(&11_004_000)
        );
    }
}
