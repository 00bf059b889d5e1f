//! `machine create`: makes a machine of an installed disk, and adds it to the configuration.

use std::fs::{self, File};
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use machinery::config::find_interface;
use machinery::{Error, Result};
use machinery_images::MAGIC;

use super::arguments::{FIRMWARE_VARIABLES, LOOPBACK, TPM_STATE, accel, arguments, files, random_mac};
use super::base::identify;
use super::context::{Context, KVM};
use super::dependents::lock_base;
use super::folder::expect_kept;
use super::info::{DISK, Description, INFO, Info, MEMORY};
use super::isolation::{BRIDGE, Isolation};
use super::kvm;
use super::make::{Plan, make, version};
use super::options::Create;
use super::publish::{Made, expect_domain_accepted, expect_free, publish};
use super::unfinished::Unfinished;
use crate::cwd::make_reachable_folder;

/// Makes the machine.
///
/// # Errors
/// A value is wrong, the guest is not ready in time, or a step fails. Nothing of the machine remains then.
pub fn create(context: &Context<'_>, create: &Create) -> Result<Made> {
    create.ready.expect_in_time()?;
    create.expect_of_machinery()?;
    let isolation = Isolation::of(create)?;
    let section = isolation.as_ref().map(Isolation::section);
    let ip = match (&isolation, create.ip) {
        (Some(isolation), _) => isolation.address.into(),
        (None, Some(ip)) => ip,
        (None, None) => {
            return Err(Error::configuration("the machine has no address").advice("Give --ip ADDRESS"));
        }
    };
    let addresses = isolation.as_ref().map_or_else(|| vec![ip.to_string()], Isolation::addresses);
    expect_free(context, &create.name, &addresses, None, section.as_ref(), None)?;
    let dsn = (context.machinery == KVM).then(|| kvm::dsn(context.cwd, create)).transpose()?;
    let interface = interface(create, dsn.as_deref(), isolation.is_some())?;
    let base = base_disk(&create.disk)?;
    let _base = lock_base(context.cwd, &base)?;
    let files = files(create, &[DISK, MEMORY, INFO, FIRMWARE_VARIABLES, TPM_STATE])?;
    let folder = folder_of(context, create.folder.as_deref(), &create.name)?;
    let mut unfinished = Unfinished::begin(context.cwd, &create.name, &folder)?;
    let made = (|| {
        let mut info = describe(create, ip, &interface, &base)?;
        info.machine.guest_ip = isolation.map(|isolation| isolation.guest);
        if let Some(dsn) = &dsn {
            (context.step)("defining the domain");
            kvm::define(context.config, create, dsn, &mut info, &files, &mut unfinished)?;
            expect_domain_accepted(context, &info, &folder)?;
        } else {
            let version = version(context, &info, &mut unfinished)?;
            info.machine.start_args = arguments(create, &version, &info.machine.mac, accel(create.accel))?;
        }
        let plan = Plan { info, files, ready: &create.ready };
        let readiness = make(context, &plan, &mut unfinished, &folder)?;
        publish(context, &plan.info, &folder, readiness, || {
            // A host refuses the machine without its section.
            section.map_or(Ok(()), |section| unfinished.add_section(context.cwd, &section))
        })
    })();
    unfinished.conclude(context, &folder, made)
}

/// Returns the interface on which the machine's traffic is captured. That of an isolated machine exists only in its runs.
fn interface(create: &Create, dsn: Option<&str>, is_isolated: bool) -> Result<String> {
    if is_isolated {
        return Ok(BRIDGE.to_owned());
    }
    let interface = match dsn {
        Some(dsn) => kvm::interface(create, dsn)?,
        None => create.network.bridge.clone().unwrap_or_else(|| LOOPBACK.to_owned()),
    };
    find_interface(&interface).map_err(|error| error.machine(&create.name))?;
    Ok(interface)
}

/// Returns the real path of a machine's folder, in the given folder or in that of the CWD, which is made.
///
/// # Errors
/// The folder around it cannot be made, or other users can change it.
pub fn folder_of(context: &Context<'_>, parent: Option<&Path>, name: &str) -> Result<PathBuf> {
    let parent = parent.map_or_else(|| context.cwd.machines(), Path::to_owned);
    expect_kept(&parent).map_err(|error| error.machine(name))?;
    make_reachable_folder(&parent)?;
    let parent = fs::canonicalize(&parent).map_err(|error| Error::io("find", &parent, &error))?;
    Ok(parent.join(name))
}

fn describe(create: &Create, ip: IpAddr, interface: &str, base: &Path) -> Result<Info> {
    Ok(Info::new(Description {
        name: create.name.clone(),
        ip: ip.to_string(),
        agent_port: create.agent_port,
        os_name: create.platform.as_str().to_owned(),
        os_version: create.os_version.clone(),
        architecture: "amd64".to_owned(),
        bridge: interface.to_owned(),
        mac: random_mac()?,
        disk: DISK.to_owned(),
        memory_snapshot: MEMORY.to_owned(),
        tags: create.tags.clone(),
        start_args: Vec::new(),
        tpm_state: create.tpm.then(|| TPM_STATE.to_owned()),
        base: Some(base.to_owned()),
        guest_ip: None,
        base_files: identify(base)?,
        domain: None,
        copied_from: None,
    }))
}

/// Returns the real path of the installed disk.
fn base_disk(disk: &Path) -> Result<PathBuf> {
    let failed = |error| Error::io("open the disk", disk, &error);
    let real = fs::canonicalize(disk).map_err(failed)?;
    let mut magic = [0; MAGIC.len()];
    let read = File::open(&real).and_then(|mut file| file.read_exact(&mut magic));
    match read {
        Ok(()) if magic == *MAGIC => Ok(real),
        Err(error) if error.kind() != std::io::ErrorKind::UnexpectedEof => Err(failed(error)),
        _ => Err(Error::configuration(format!("{} is no disk in the format qcow2", disk.display()))
            .advice("Convert it: qemu-img convert -O qcow2 OLD NEW")),
    }
}
