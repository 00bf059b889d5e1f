//! `import libvirt --as qemu`: makes machines of the machinery `qemu` that are copies of domains at their snapshots.
//!
//! ```text
//! all domains: read ─▶ values, parts, files, arguments, space ─▶ every fault is named, and nothing is written
//! each domain: files ─▶ restored once ─▶ entry in qemu.yaml
//! ```
//!
//! The domain stays as it is: its disks are only read, and libvirt keeps its definition and its snapshots. A machine that
//! is finished stays also if a later one fails.

use std::fs;
use std::path::PathBuf;

use machinery::config::{ConfigFile, find_interface};
use machinery::{Error, Level, Result};
use serde_json::{Map, Value, json};

use super::context::{Context, KVM, MACHINERY};
use super::copied_files::{Files, origin};
use super::create::folder_of;
use super::domain::DomainEntry;
use super::folder::{expect_kept, expect_space};
use super::info::{DISK, Description, INFO, Info, MEMORY, domain_entries, entries};
use super::interrupt;
use super::make::{binaries, prove};
use super::options::Ready;
use super::publish::{expect_free, publish};
use super::replaced::{expect_removable, remove_entry};
use super::unfinished::{Unfinished, clear_abandoned};
use crate::commands::import::{Disks, DomainForQemu, Import, Imported, OptionsForQemu, Skipped};
use crate::commands::shell_word;
use crate::plugin::search::is_listed;

/// A machine to make.
struct Plan {
    domain: DomainForQemu,
    info: Info,
    files: Files,
    folder: PathBuf,
    /// The machine of `kvm` whose entry is removed.
    replaced: Option<DomainEntry>,
}

/// The work of an import.
#[derive(Default)]
struct Work {
    plans: Vec<Plan>,
    /// The entries of domains whose copies the configuration has already.
    removals: Vec<DomainEntry>,
    skipped: Vec<Skipped>,
}

/// Makes the machines.
///
/// # Errors
/// A domain cannot become a machine: nothing is written then. Or a machine cannot be restored: nothing of it and of later
/// ones remains.
pub fn copy_domains(context: &Context<'_>, import: &Import) -> Result<Imported> {
    if !import.is_dry() {
        interrupt::clear_when_interrupted(None, context.globals.clone())?;
    }
    (context.step)("reading the domains");
    let options = import.options();
    let Work { plans, removals, skipped } = work(context, import, &options)?;
    let mut imported = Imported { skipped, ..Imported::default() };
    if import.is_dry() {
        imported.dry_run = Some(plans.iter().map(|plan| plan.entry()).collect());
        imported.added = plans.into_iter().map(|plan| plan.domain.name).collect();
        return Ok(imported);
    }
    removals.iter().try_for_each(|entry| remove_entry(context, entry))?;
    if !plans.is_empty() {
        clear_abandoned(context, None)?;
    }
    for plan in plans {
        let done = &imported.added;
        let notes = plan.make(context, &options).map_err(|error| match done.is_empty() {
            true => error,
            false => error.detail(&format!("the machines {} are finished, and stay", done.join(", "))),
        })?;
        let notes = notes.into_iter().map(|note| format!("machine '{}': {note}", plan.domain.name));
        imported.notes.extend(notes);
        imported.added.push(plan.domain.name);
    }
    Ok(imported)
}

/// Plans the machines of all domains, and names every fault. Nothing is written.
fn work(context: &Context<'_>, import: &Import, options: &OptionsForQemu) -> Result<Work> {
    let (mut work, mut problems) = (Work::default(), Vec::new());
    for domain in import.domains_for_qemu(&context.cwd.machinery_yaml(KVM))? {
        let (name, replaced) = (domain.name.clone(), entry_of(context, &domain)?);
        if is_copied(context, &domain)? {
            if let Some(entry) = replaced.filter(|_| options.replace) {
                problems.extend(expect_removable(context, &entry).err());
                work.removals.push(entry);
            }
            let reason = "qemu.yaml has the copy of this snapshot already".to_owned();
            work.skipped.push(Skipped { name, reason });
            continue;
        }
        match plan(context, options, domain, replaced, &work.plans) {
            Ok(plan) => work.plans.push(plan),
            Err(error) => problems.push(error.machine(name)),
        }
    }
    expect_all_planned(context, &work.plans, problems)?;
    Ok(work)
}

/// Returns the machine of `kvm` that is this domain, if a host has both machineries.
fn entry_of(context: &Context<'_>, domain: &DomainForQemu) -> Result<Option<DomainEntry>> {
    if !is_listed(KVM, &context.config.machineries) {
        return Ok(None);
    }
    let is_domain = |entry: &DomainEntry| entry.label == domain.label && entry.dsn == domain.dsn;
    Ok(domain_entries(context.cwd)?.into_iter().find(is_domain))
}

/// Reports whether the configuration has the machine already.
fn is_copied(context: &Context<'_>, domain: &DomainForQemu) -> Result<bool> {
    let Some(entry) = entries(context.cwd)?.into_iter().find(|entry| entry.name == domain.name) else {
        return Ok(false);
    };
    let info = entry.paths.last().and_then(|path| Info::read(path.parent()?).ok());
    let origin = origin(domain)?;
    Ok(info.is_some_and(|info| info.machine.copied_from == Some(origin)))
}

fn plan(
    context: &Context<'_>,
    options: &OptionsForQemu,
    domain: DomainForQemu,
    replaced: Option<DomainEntry>,
    others: &[Plan],
) -> Result<Plan> {
    replaced.iter().try_for_each(|entry| expect_replaceable(context, options, entry))?;
    let (name, ip, mac) = (&domain.name, domain.text("ip"), domain.text("mac_address"));
    let mac = Some(mac).filter(|mac| !mac.is_empty());
    let replaced_name = replaced.as_ref().map(|entry| entry.name.as_str());
    expect_free(context, name, std::slice::from_ref(&ip), mac.as_deref(), None, replaced_name)?;
    if let Some(twin) = others.iter().find(|other| other.domain.name == *name || other.info.machine.ip == ip)
    {
        let reason = format!("the domain '{}' has the same name or address", twin.domain.label);
        return Err(Error::configuration(reason).advice("Give each its own --name and --ip"));
    }
    let parent = options.folder.clone().unwrap_or_else(|| context.cwd.machines());
    expect_kept(&parent)?;
    let folder = parent.join(name);
    if folder.exists() {
        return Err(Error::configuration(format!("{} exists", folder.display()))
            .advice("Give the machine another --name or --folder, or remove the folder"));
    }
    let interface = match domain.text("interface") {
        // User networking has none.
        none if none.is_empty() => "lo".to_owned(),
        interface => interface,
    };
    find_interface(&interface)?;
    let files = Files::of(&domain, options.disks)?;
    let base_files = if options.disks == Disks::Overlay { files.identities.clone() } else { Vec::new() };
    let port = domain.text("agent_port");
    let info = Info::new(Description {
        name: name.clone(),
        ip,
        agent_port: port.parse().unwrap_or(DEFAULT_PORT),
        os_name: domain.text("platform"),
        os_version: domain.text("os_version"),
        architecture: domain.text("architecture"),
        bridge: interface,
        mac: mac.unwrap_or_default(),
        disk: DISK.to_owned(),
        memory_snapshot: MEMORY.to_owned(),
        tpm_state: None,
        tags: domain.tags(),
        start_args: domain.arguments.clone(),
        base: None,
        guest_ip: None,
        base_files,
        domain: None,
        copied_from: Some(origin(&domain)?),
    });
    Ok(Plan { domain, info, files, folder, replaced })
}

/// Expects that the entry of the domain is to be removed, and can be.
fn expect_replaceable(context: &Context<'_>, options: &OptionsForQemu, entry: &DomainEntry) -> Result<()> {
    if options.replace {
        return expect_removable(context, entry);
    }
    let reason = format!(
        "kvm.yaml has its domain as the machine '{}', and no two machines share an address",
        entry.name
    );
    let advice = "Add --replace to remove that entry once the new machine is restored, or remove it yourself";
    Err(Error::configuration(reason).advice(advice))
}

/// The port of Cuckoo's agent.
const DEFAULT_PORT: u16 = 8000;

/// Expects that all machines can be made, and that their files have space.
fn expect_all_planned(context: &Context<'_>, plans: &[Plan], mut problems: Vec<Error>) -> Result<()> {
    problems.extend(refused_arguments(context, plans)?);
    let each = plans.iter().map(|plan| plan.files.bytes(&plan.domain)).collect::<Result<Vec<u64>>>()?;
    let bytes = each.into_iter().fold(0, u64::saturating_add);
    let folder = plans.first().and_then(|plan| plan.folder.ancestors().find(|folder| folder.exists()));
    problems.extend(folder.and_then(|folder| expect_space(context.config, folder, bytes).err()));
    Error::all(problems).map_or(Ok(()), Err)
}

/// Has the plugin check the arguments of all machines, as it does at each start.
fn refused_arguments(context: &Context<'_>, plans: &[Plan]) -> Result<Vec<Error>> {
    let scratch = tempfile::tempdir();
    let scratch = scratch.map_err(|error| Error::environment(format!("cannot make a folder: {error}")))?;
    let mut machines = Map::new();
    for plan in plans {
        let folder = scratch.path().join(&plan.domain.name);
        let failed = |error| Error::io("write", &folder, &error);
        fs::create_dir(&folder).map_err(failed)?;
        plan.info.write(&folder)?;
        let names = plan.domain.images.iter().map(|(_, name)| name);
        for name in names.chain(plan.domain.files.iter().map(|(_, name)| name)) {
            fs::write(folder.join(name), "").map_err(failed)?;
        }
        machines.insert(plan.domain.name.clone(), plan.keys(&folder));
    }
    let programs = binaries(context)?;
    let binaries = json!({"qemu_img": programs.qemu_img, "qemu_system_x86_64": programs.qemu_system_x86_64});
    let text = json!({"interface": "lo", "binaries": binaries, "machines": machines}).to_string();
    let path = context.cwd.machinery_yaml(MACHINERY);
    let report = context.check_of(MACHINERY, ConfigFile { path, text }, context.config)?;
    let problems = report.findings().iter().filter(|finding| finding.level == Level::Problem);
    let problems: Vec<&str> = problems.map(|finding| finding.text.as_str()).collect();
    let of = |plan: &Plan| {
        let key = format!("machines.{}.machineinfo_path: ", plan.domain.name);
        let reasons =
            problems.iter().filter_map(|text| text.split_once(&key)).map(|(_, reason)| reason.to_owned());
        reasons.collect::<Vec<_>>()
    };
    let refused = |plan: &Plan| {
        of(plan)
            .into_iter()
            .map(|reason| Error::configuration(reason).machine(&plan.domain.name))
            .collect::<Vec<_>>()
    };
    Ok(plans.iter().flat_map(refused).collect())
}

impl Plan {
    /// Makes the machine, and returns facts that the operator has to know.
    fn make(&self, context: &Context<'_>, options: &OptionsForQemu) -> Result<Vec<String>> {
        let name = &self.domain.name;
        let folder = folder_of(context, options.folder.as_deref(), name)?;
        let mut unfinished = Unfinished::begin(context.cwd, name, &folder)?;
        let made = (|| {
            self.files.write(context, &self.domain, &folder).map_err(|error| error.machine(name))?;
            self.info.write(&folder)?;
            let ready = Ready::restored(options.no_agent);
            let readiness = prove(context, &self.info, &ready, &mut unfinished, &folder)?;
            publish(context, &self.info, &folder, readiness, || {
                self.replaced.iter().try_for_each(|entry| unfinished.replace(context.cwd, entry))
            })
        })();
        let made = unfinished.conclude(context, &folder, made)?;
        let mut notes = self.domain.notes.clone();
        notes.extend(made.notes);
        let ready =
            if made.ready.reason.is_empty() { String::new() } else { format!(" ({})", made.ready.reason) };
        notes.push(format!("restored once; its restores are {}{ready}", made.ready.mode));
        if options.disks == Disks::Overlay {
            let label = shell_word(&self.domain.label);
            notes.push(format!("its disks are overlays: do not start or revert the domain {label} any more"));
        }
        Ok(notes)
    }

    /// Returns the entry of the machine, whose files are in that folder.
    fn keys(&self, folder: &std::path::Path) -> Value {
        let machine = &self.info.machine;
        json!({
            "qcow2_path": folder.join(DISK), "snapshot_path": folder.join(MEMORY), "machineinfo_path": folder.join(INFO),
            "ip": machine.ip, "platform": machine.os_name, "os_version": machine.os_version,
            "architecture": machine.architecture, "interface": machine.bridge, "agent_port": machine.agent_port,
        })
    }

    /// Returns the text of the entry.
    fn entry(&self) -> String {
        let text =
            serde_yaml::to_string(&json!({&self.domain.name: self.keys(&self.folder)})).unwrap_or_default();
        text.lines().map(|line| format!("  {line}\n")).collect()
    }
}
