//! Makes a machine in its folder, from a disk that is only read.
//!
//! ```text
//! description ─▶ cold boot by the plugin ─▶ the guest is ready ─▶ saved
//!    ─▶ template or save image ─▶ restored once ─▶ the agent answers again
//! ```
//!
//! For `qemu`, the overlay of the boot becomes the machine's disk, because the snapshot's guest has written to it. For
//! `kvm`, the snapshot is in that disk. The template only proves that restores are instant: a host builds its own.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use machinery::config::ConfigFile;
use machinery::{Error, RestoreReadiness, Result, Setup};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::context::{Context, MACHINERY};
use super::domain::{INSTALLED, reverting};
use super::folder::{copy_files, sync};
use super::info::{DISK, INFO, Info, MEMORY};
use super::options::Ready;
use super::ready;
use super::session::{Session, with_session, without_machines};
use super::unfinished::Unfinished;

/// The interval at which the progress of an action is shown.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);
/// The time to write the memory of a guest.
const SAVE_TIMEOUT: Duration = Duration::from_secs(3600);
/// The time in which the agent of a restored guest has to answer.
const RESTORED_TIMEOUT: u64 = 180;

/// The machine to make.
pub struct Plan<'a> {
    pub info: Info,
    /// The files that belong into the machine's folder, with their names there.
    pub files: Vec<(PathBuf, String)>,
    pub ready: &'a Ready,
}

/// The state of its disk in which a machine starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beginning {
    /// The installed disk.
    Installed,
    Snapshot,
}

/// The programs of the machinery.
#[derive(Debug, Deserialize)]
#[serde(default)]
pub struct Binaries {
    pub qemu_img: PathBuf,
    pub qemu_system_x86_64: PathBuf,
}

impl Default for Binaries {
    fn default() -> Self {
        Binaries {
            qemu_img: "/usr/bin/qemu-img".into(),
            qemu_system_x86_64: "/usr/bin/qemu-system-x86_64".into(),
        }
    }
}

/// Makes the machine, and returns its readiness. Its folder will be at `place`.
///
/// # Errors
/// A step fails. The folder then has an unfinished machine.
pub fn make(
    context: &Context<'_>,
    plan: &Plan<'_>,
    unfinished: &mut Unfinished,
    place: &Path,
) -> Result<RestoreReadiness> {
    let folder = unfinished.machine_folder().to_owned();
    copy_files(&plan.files, &folder)?;
    plan.info.write(&folder)?;
    let setup = setup(context, unfinished, &plan.info, Beginning::Installed)?;
    let scratch = unfinished.scratch().to_owned();
    with_session(context, &setup, plan.name(), |session| boot(context, plan, session, &folder, &scratch))?;
    prove(context, &plan.info, plan.ready, unfinished, place)
}

impl Plan<'_> {
    fn name(&self) -> &str {
        &self.info.machine.name
    }
}

fn boot(
    context: &Context<'_>,
    plan: &Plan<'_>,
    session: &Session,
    folder: &Path,
    scratch: &Path,
) -> Result<()> {
    (context.step)("booting");
    ready::expect_no_answer(plan.ready, agent_of(&plan.info)?)?;
    let limit = context.config.timeouts.norestore_start;
    session.open_network(limit)?;
    session
        .call("booting", limit, |instance, machine, deadline| instance.norestore_start(machine, deadline))?;
    ready::wait(session, plan.ready, agent_of(&plan.info)?, scratch, context.step)?;
    during(context, "saving the memory", session, || match &plan.info.machine.domain {
        None => {
            let (memory, disk) = (folder.join(MEMORY), folder.join(DISK));
            session.call("saving the guest", SAVE_TIMEOUT, move |instance, machine, deadline| {
                instance.save(machine, &memory, &disk, deadline)
            })
        }
        Some(domain) => {
            let taken = domain.take_snapshot(scratch).map_err(|error| error.machine(plan.name()));
            taken.and_then(|()| stop(context, session))
        }
    })?;
    session.close_network(context.config.timeouts.stop)
}

fn stop(context: &Context<'_>, session: &Session) -> Result<()> {
    let limit = context.config.timeouts.stop;
    session.call("stopping", limit, |instance, machine, deadline| instance.stop(machine, deadline))
}

/// Restores a machine whose files are complete once, and returns its readiness. Its folder will be at `place`.
///
/// # Errors
/// The machine cannot be restored, or its agent does not answer although it has to.
pub fn prove(
    context: &Context<'_>,
    info: &Info,
    ready: &Ready,
    unfinished: &mut Unfinished,
    place: &Path,
) -> Result<RestoreReadiness> {
    let folder = unfinished.machine_folder().to_owned();
    let setup = setup(context, unfinished, info, Beginning::Snapshot)?;
    let scratch = unfinished.scratch().to_owned();
    let limits = context.config.timeouts;
    let readiness = with_session(context, &setup, &info.machine.name, |session| {
        let what =
            if info.machine.domain.is_some() { "building the save image" } else { "building the template" };
        during(context, what, session, || prepare(context, session))?;
        let readiness = session.readiness();
        ready::expect_no_answer(ready, agent_of(info)?)?;
        (context.step)("restoring");
        session.open_network(limits.restore_start)?;
        session.call("restoring", limits.restore_start, |instance, machine, deadline| {
            instance.restore_start(machine, deadline)
        })?;
        if ready.ready_after.is_none() && !ready.ready_key {
            let again = Ready { timeout: RESTORED_TIMEOUT, screenshot: None, ..ready.clone() };
            ready::wait(session, &again, agent_of(info)?, &scratch, context.step)?;
        }
        stop(context, session)?;
        session.close_network(limits.stop)?;
        Ok(readiness)
    })?;
    if let Some(domain) = &info.machine.domain {
        // A host would take the changes of this run for the work of somebody else.
        with_session(context, &reverting(&setup, &domain.snapshot), &info.machine.name, |session| {
            during(context, "reverting the disk", session, || prepare(context, session))
        })?;
    }
    let names: Vec<String> = other_files(&folder)?.into_iter().map(|(_, name)| name).collect();
    info.clone().placed_in(place, &names).write(&folder)?;
    // Before the configuration names the folder, or an older machine is replaced by it.
    sync(&folder)?;
    Ok(readiness)
}

fn prepare(context: &Context<'_>, session: &Session) -> Result<()> {
    let limit = context.config.timeouts.prepare;
    session.call("preparing the restore", limit, |instance, machine, deadline| {
        instance.prepare(machine, deadline)
    })
}

/// Returns the further files in a machine's folder, such as its firmware's variables.
///
/// # Errors
/// The folder cannot be read.
pub fn other_files(folder: &Path) -> Result<Vec<(PathBuf, String)>> {
    let entries = fs::read_dir(folder).map_err(|error| Error::io("look into", folder, &error))?;
    let files = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    let named = files.filter_map(|entry| Some((entry.path(), entry.file_name().into_string().ok()?)));
    let is_own = |name: &str| [DISK, MEMORY, INFO].contains(&name) || name.starts_with('.');
    let is_of_run = |name: &str| name.contains("_disposable") || name.ends_with(".log");
    Ok(named.filter(|(_, name)| !is_own(name) && !is_of_run(name)).collect())
}

fn agent_of(info: &Info) -> Result<SocketAddr> {
    let ip: IpAddr = info.machine.ip.parse().map_err(|_| {
        Error::configuration(format!("'{}' is no IP address", info.machine.ip)).machine(&info.machine.name)
    })?;
    Ok(SocketAddr::new(ip, info.machine.agent_port))
}

/// Does the work, and shows the progress that the plugin reports meanwhile.
fn during<T>(context: &Context<'_>, what: &str, session: &Session, work: impl FnOnce() -> T) -> T {
    let step = context.step;
    step(what);
    let (done, ended) = channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            while ended.recv_timeout(PROGRESS_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                let progress = session.progress();
                progress.iter().for_each(|progress| step(&format!("{what}: {progress}")));
            }
        });
        let result = work();
        drop(done);
        result
    })
}

/// Returns the version of the hypervisor.
///
/// # Errors
/// The plugin cannot be loaded.
pub fn version(context: &Context<'_>, info: &Info, unfinished: &mut Unfinished) -> Result<String> {
    let setup = without_machines(&setup(context, unfinished, info, Beginning::Installed)?);
    let limit = context.config.timeouts.load;
    with_session(context, &setup, &info.machine.name, |session| {
        session.call("asking for the version", limit, |instance, _, deadline| instance.version(deadline))
    })
}

/// Returns the plugin's setup with this machine alone.
fn setup(
    context: &Context<'_>,
    unfinished: &mut Unfinished,
    info: &Info,
    beginning: Beginning,
) -> Result<Setup> {
    let config = scratch_config(context, info, unfinished.machine_folder(), beginning)?;
    let setup = unfinished.setup(config, host_config(context, info)?)?;
    Ok(Setup { result_server: context.config.result_server, ..setup })
}

/// Returns the programs that the configuration names.
///
/// # Errors
/// The configuration cannot be read, or other users can change it.
pub fn binaries(context: &Context<'_>) -> Result<Binaries> {
    let path = context.cwd.machinery_yaml(MACHINERY);
    if !path.exists() {
        return Ok(Binaries::default());
    }
    Ok(ConfigFile::read_trusted(&path)?.parse_at(&["binaries"])?.unwrap_or_default())
}

/// Returns the machinery's configuration with this machine alone. JSON is YAML.
fn scratch_config(
    context: &Context<'_>,
    info: &Info,
    folder: &Path,
    beginning: Beginning,
) -> Result<ConfigFile> {
    let machine = &info.machine;
    let mut entry = json!({
        "ip": machine.ip,
        "platform": machine.os_name,
        "os_version": machine.os_version,
        "architecture": machine.architecture,
        "agent_port": machine.agent_port,
    });
    let mut config = json!({"interface": machine.bridge});
    let is_installed = beginning == Beginning::Installed;
    if let Some(domain) = &machine.domain {
        config["dsn"] = json!(domain.dsn);
        entry["label"] = json!(domain.label);
        entry["snapshot"] = json!(if is_installed { INSTALLED } else { &domain.snapshot });
    } else {
        let binaries = binaries(context)?;
        config["disposable_copy_dir"] = json!(folder);
        config["binaries"] =
            json!({"qemu_img": binaries.qemu_img, "qemu_system_x86_64": binaries.qemu_system_x86_64});
        let base = machine.base.clone().filter(|_| is_installed);
        entry["qcow2_path"] = json!(base.unwrap_or_else(|| folder.join(DISK)));
        entry["snapshot_path"] = json!(folder.join(MEMORY));
        entry["machineinfo_path"] = json!(folder.join(INFO));
    }
    config["machines"] = json!({&machine.name: entry});
    Ok(ConfigFile { path: context.cwd.machinery_yaml(context.machinery), text: config.to_string() })
}

/// The keys of the machinery's section of `machinery-host.yaml` that hold while a machine is made, and those of the
/// machine.
const KEPT: [&str; 6] = ["jail", "jail_users", "instant", "instant_space_limit", "template_space", "network"];
const KEPT_OF_MACHINE: [&str; 6] =
    ["jail", "instant", "allow_shared_writes", "unsafe_start_args", "network", "guest_ip"];
/// The keys of the section of `kvm`. An image is made in a folder that is removed.
const KEPT_OF_KVM: [&str; 2] = ["instant", "save_images"];

/// Returns the host's configuration as far as it is about the confinement and the network of this machine, and about
/// space.
fn host_config(context: &Context<'_>, info: &Info) -> Result<ConfigFile> {
    let (name, machinery) = (&info.machine.name, context.machinery);
    let all: Value = context.config.host_file.as_ref().map_or(Ok(Value::Null), ConfigFile::parse)?;
    let section = &all["machineries"][machinery];
    let is_domain = info.machine.domain.is_some();
    let (keys, keys_of_machine) =
        if is_domain { (&KEPT_OF_KVM[..], &[][..]) } else { (&KEPT[..], &KEPT_OF_MACHINE[..]) };
    let mut own = kept(section, keys);
    own.insert("standby".to_owned(), json!("off"));
    let mut machine = kept(&section["machines"][name], keys_of_machine);
    if !section["machines"][name]["clones"].is_null() {
        // Clones are isolated, and so is the guest of their snapshot.
        machine.insert("network".to_owned(), json!("isolated"));
    }
    if let Some(guest) = info.machine.guest_ip.filter(|_| section["machines"][name].is_null()) {
        machine.insert("network".to_owned(), json!("isolated"));
        machine.insert("guest_ip".to_owned(), json!(guest));
    }
    own.insert("machines".to_owned(), json!({name: machine}));
    let mut host = kept(&all, &["free_space_reserve"]);
    host.insert("machineries".to_owned(), json!({machinery: own}));
    Ok(ConfigFile { path: context.cwd.host_yaml(), text: Value::Object(host).to_string() })
}

/// Returns these keys of a mapping, as far as it has them.
fn kept(mapping: &Value, keys: &[&str]) -> Map<String, Value> {
    let has_value = |key: &&&str| !mapping[**key].is_null();
    keys.iter().filter(has_value).map(|key| ((*key).to_owned(), mapping[*key].clone())).collect()
}
