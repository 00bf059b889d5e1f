//! The command `check`: the configuration, and beyond it disks, space, and KVM.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use machinery::config::ConfigFile;
use machinery::trust::expect_trusted;
use machinery::{Deadline, Error, Report, Result, Setup};
use machinery_backend::QemuImg;
use machinery_backend::cell::host_addresses;
use machinery_backend::files::free_space;
use rustix::fs::{Access, access};
use serde_json::Value;

use crate::config::{Config, MachineFiles};
use crate::diagnose::{faults, file_warnings};
use crate::images::PLACEHOLDER;
use crate::isolation::expect_free_address;
use crate::jail::{groups, jail_of, policy_of};
use crate::needs;
use crate::prepare::unavailable_reason;
use crate::resources::Resource;
use crate::snapshot::Snapshot;

/// The free space for disposable disks, in bytes, below which `check` warns: a Windows guest soon writes that
/// much.
const MIN_FREE_SPACE: u64 = 2 * 1024 * 1024 * 1024;
/// The maximum time for `qemu-img` to describe a disk.
const DISK_TIMEOUT: Duration = Duration::from_secs(30);

/// Checks the configuration and the environment.
pub fn check(setup: &Setup, report: &mut Report) {
    let mut problems = Vec::new();
    let config = Config::read_collecting(setup, &mut problems);
    problems.iter().for_each(|problem| report.problem(problem));
    let Some(config) = config else { return };
    config.warnings.iter().for_each(|warning| report.warning(warning));
    let program = config.binaries.qemu_system_x86_64.display();
    let usable = config.machines.iter().filter(|machine| faults(machine).is_empty());
    report.good(format!(
        "qemu: QEMU {} at {program}, {} of {} machines are in order",
        config.version,
        usable.count(),
        config.machines.len()
    ));
    if config.machines.is_empty() && problems.is_empty() {
        report.warning(
            "qemu: no machine is configured. Add some, for example with `cuckoo-machinery import vmcloak`",
        );
    }
    let mut checked = HashSet::new();
    for machine in &config.machines {
        // Clones have the same files.
        if checked.insert(machine.entry()) {
            check_machine(machine, &config, &setup.config, report);
        }
    }
    addresses(&config.machines, report);
    jails(&config, report);
    rivals(&config.machines, report);
    // QEMU tries the needs of a machine with the machine's own arguments.
    let tried = config.machines.iter().filter(|machine| machine.expect_safe_args().is_ok());
    needs::check_all(tried, &config.binaries.qemu_system_x86_64, report);
    if config.machines.iter().any(|machine| machine.prepare.instant) {
        template_folder(&config.instant_dir, report);
    }
    spaces(&config, report);
}

fn check_machine(machine: &MachineFiles, config: &Config, file: &ConfigFile, report: &mut Report) {
    let name = machine.entry();
    let faults = faults(machine);
    for (key, error) in &faults {
        report.problem(&file.error(&["machines", name, key], error.to_string()));
    }
    if let Ok(snapshot) = Snapshot::open(&machine.snapshot) {
        report.good(format!(
            "machine '{name}': {} snapshot {}",
            snapshot.format(),
            machine.snapshot.display()
        ));
    }
    let has_disk = faults.iter().all(|(key, _)| *key != "qcow2_path");
    let info = has_disk.then(|| disk_info(config, &machine.disk));
    if let Some(info) = info.and_then(|info| report.keep(info)) {
        disk_options(name, &info, report);
    }
    if machine.args_error.is_some() {
        return;
    }
    clean_runs(machine, report);
    for warning in file_warnings(machine) {
        report.warning(format!("machine '{name}': {warning}"));
    }
    report_restore_mode(machine, config, report);
    let clones = config.machines.iter().filter(|other| other.info.clone_of.as_deref() == Some(name)).count();
    if machine.isolation.is_some() && faults.is_empty() {
        let clones =
            if clones == 0 { String::new() } else { format!(", and {clones} clones share its files") };
        report.good(format!("machine '{name}': each run has a network of its own{clones}"));
    }
}

/// Reports isolated machines with an address that this host uses itself.
fn addresses(machines: &[MachineFiles], report: &mut Report) {
    let isolated = machines.iter().filter_map(|machine| Some((machine, machine.isolation.as_ref()?)));
    let mut isolated = isolated.peekable();
    if isolated.peek().is_none() {
        return;
    }
    let Some(host) = report.keep(host_addresses()) else { return };
    for (machine, isolation) in isolated {
        let free = expect_free_address(isolation.address, &host);
        report.keep(free.map_err(|error| error.machine(&machine.info.name)));
    }
}

/// Reports the layers of the jail that hold, once for all machines with the same ones.
fn jails(config: &Config, report: &mut Report) {
    let mut confined = Vec::new();
    for machine in config.machines.iter().filter(|machine| machine.args_error.is_none()) {
        let jail = jail_of(machine);
        let policy = policy_of(machine, &config.binaries.qemu_system_x86_64, machine.overlays());
        let name = machine.info.name.as_str();
        match jail.confine(policy) {
            Ok(confinement) => confined.push((name, confinement.layers().clone())),
            Err(error) => report.problem(&error.action(format!("confining machine '{name}'"))),
        }
    }
    for (layers, machines) in groups(confined.into_iter()) {
        match &layers.a {
            None if layers.is_weakened_by_machine() => {
                report
                    .warning(format!("the QEMU of {machines} is less confined than others: layers {layers}"));
            }
            None => report.good(format!("the QEMU of {machines} is confined: layers {layers}")),
            Some(_) => report.warning(format!("the QEMU of {machines} is not confined: {layers}")),
        }
    }
}

/// Reports machines whose runs find changes of earlier runs.
fn clean_runs(machine: &MachineFiles, report: &mut Report) {
    let (name, opened) = (machine.entry(), machine.start_args.opened());
    if let Some(warning) = machine.unsafe_args_warning() {
        report.warning(format!("machine '{name}': {warning}"));
    }
    if let Some(warning) = machine.shared_writes_warning() {
        report.warning(format!("machine '{name}': {warning}"));
    }
    for image in &opened.images {
        let path = image.source.path.display();
        report.good(format!("machine '{name}': each run writes to an overlay of {path}"));
    }
    if !opened.has_placeholder {
        report.warning(format!(
            "machine '{name}': no image in its start_args is {PLACEHOLDER}, so its qcow2_path is not its disk. \
             Use it where the disk is named, as in -drive file={PLACEHOLDER},format=qcow2"
        ));
    }
}

fn report_restore_mode(machine: &MachineFiles, config: &Config, report: &mut Report) {
    let name = machine.entry();
    if !machine.prepare.instant {
        report
            .good(format!("machine '{name}': is restored plainly, because instant restores are off for it"));
        return;
    }
    match unavailable_reason(&machine.start_args, config.version) {
        None => report.good(format!("machine '{name}': can be restored instantly")),
        Some(why) => report.warning(format!(
            "machine '{name}': is restored plainly, which takes seconds: {why}. Change that, or set instant: off for it"
        )),
    }
}

/// Reports machines that can never run at the same time.
fn rivals(machines: &[MachineFiles], report: &mut Report) {
    let mut claimed: HashMap<String, Vec<(&str, Resource)>> = HashMap::new();
    for machine in machines {
        let name = machine.info.name.as_str();
        for resource in Resource::contested(machine) {
            let others = claimed.entry(resource.key()).or_default();
            if let Some((other, theirs)) = others.iter().find(|(_, theirs)| theirs.clashes(&resource)) {
                report.warning(format!(
                    "machine '{name}': it claims {resource}, and machine '{other}' {theirs}: they cannot run at the \
                     same time, and the standby of one is discarded when the other starts. Give each its own in its \
                     start_args"
                ));
            }
            others.push((name, resource));
        }
    }
}

/// Checks the nearest existing folder, in which the host's start creates the templates' folder.
fn template_folder(folder: &Path, report: &mut Report) {
    report.keep(expect_trusted(folder).map_err(|error| error.action("checking instant_dir")));
    let existing = folder.ancestors().find(|folder| folder.exists()).unwrap_or(folder);
    if !existing.is_dir() || access(existing, Access::WRITE_OK | Access::EXEC_OK).is_err() {
        let why = format!(
            "qemu: templates cannot be kept in {}: {} is not a folder this user may write to",
            folder.display(),
            existing.display()
        );
        report.problem(&Error::environment(why).advice("Change its permissions, or set instant_dir"));
    }
}

/// Returns the information of `qemu-img` about the disk, also while a machine runs.
fn disk_info(config: &Config, disk: &Path) -> Result<Value> {
    let qemu_img = QemuImg::new(&config.binaries.qemu_img).with_jail(config.jail);
    let info = qemu_img.info(disk, Deadline::after(DISK_TIMEOUT));
    info.map_err(|error| error.default_advice("Restore the disk from a backup, or make the machine anew"))
}

fn disk_options(name: &str, info: &Value, report: &mut Report) {
    if let Some(backing) = info["backing-filename"].as_str() {
        report.good(format!("machine '{name}': its disk is based on {backing}"));
    }
    let clusters = info["cluster-size"].as_u64().unwrap_or(0);
    let lazy = info["format-specific"]["data"]["lazy-refcounts"] == Value::Bool(true);
    if clusters < 2 * 1024 * 1024 || !lazy {
        report.warning(format!(
            "machine '{name}': its disk was not made with lazy_refcounts=on,cluster_size=2M, so runs are slower. \
             Convert it with `qemu-img convert -O qcow2 -o lazy_refcounts=on,cluster_size=2M`"
        ));
    }
}

fn spaces(config: &Config, report: &mut Report) {
    let mut folders: Vec<&Path> =
        config.machines.iter().filter_map(|machine| machine.disposable.parent()).collect();
    folders.extend(config.instant_dir.ancestors().find(|folder| folder.is_dir()));
    folders.sort();
    folders.dedup();
    for folder in folders {
        let Ok(free) = free_space(folder) else { continue };
        if free < MIN_FREE_SPACE {
            report.warning(format!(
                "only {} MiB are free for disposable disks or templates in {}. Free some, or set disposable_copy_dir and instant_dir",
                free / (1024 * 1024),
                folder.display()
            ));
        }
    }
}
