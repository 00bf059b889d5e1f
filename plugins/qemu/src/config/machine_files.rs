//! One machine of the configuration: its keys, its files, and its arguments.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};

use machinery::{Error, MachineInfo, Result};
use machinery_backend::jail::{JailMode, UserRange};
use machinery_backend::{ImageFile, MachineKeys, overlay_path};
use machinery_images::{ChainRules, TrustedChain, probe_format};
use rustix::process::geteuid;

use super::section::PrepareOptions;
use crate::allowed::{Area, Refusal, refusals};
use crate::machineinfo::StartArgs;

/// One machine of the configuration. A reload replaces the machine if any of this has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineFiles {
    pub info: MachineInfo,
    pub disk: PathBuf,
    pub snapshot: PathBuf,
    pub disposable: PathBuf,
    /// The file that `start_args` were read from; QEMU runs in its folder.
    pub machineinfo: PathBuf,
    /// The arguments when the configuration was read; empty if they could not be read.
    pub start_args: StartArgs,
    /// The reason why the arguments could not be read, if they could not.
    pub args_error: Option<Error>,
    /// The interface where the machine's traffic can be captured, if it differs from that of all other
    /// machines.
    pub own_interface: Option<String>,
    pub keep_disk: bool,
    pub prepare: PrepareOptions,
    pub allow_shared_writes: bool,
    pub jail: JailMode,
    /// The users of the machines, where the host is root.
    pub jail_users: UserRange,
    pub unsafe_start_args: bool,
    /// The network of each run, if it has one of its own.
    pub isolation: Option<Isolation>,
    /// True if another machine has one of the same files.
    pub is_shared: bool,
    /// The name of the first machine with the same files.
    pub template: String,
    /// True for the first machine of its template, which reports the template's space.
    pub is_first_of_template: bool,
}

/// The network of a machine whose runs have one of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Isolation {
    /// The machine's own address.
    pub address: Ipv4Addr,
    /// The address inside the snapshot.
    pub guest: Ipv4Addr,
    /// The name of the interface on the host during a run.
    pub interface: String,
    /// The result server, which the guest may reach.
    pub result_server: Option<SocketAddrV4>,
}

impl MachineKeys for MachineFiles {
    fn info(&self) -> &MachineInfo {
        &self.info
    }

    fn unique(&self) -> Vec<(&'static str, Option<&str>)> {
        let info = &self.info;
        vec![
            ("qcow2_path", self.disk.to_str()),
            // A machine's disk must not be at the path of another machine's overlay, either.
            ("qcow2_path", self.disposable.to_str()),
            ("snapshot_path", self.snapshot.to_str()),
            ("ip", Some(&info.ip)),
            ("mac_address", info.mac_address.as_deref().filter(|_| self.isolation.is_none())),
        ]
    }

    fn may_share(&self, other: &Self, key: &str, value: &str) -> bool {
        let are_isolated = self.isolation.is_some() && other.isolation.is_some();
        let is_file = match key {
            "qcow2_path" => self.disk == other.disk && self.disk.to_str() == Some(value),
            _ => key == "snapshot_path",
        };
        are_isolated && is_file
    }
}

impl MachineFiles {
    /// Returns the machine's name in the configuration: that of the base, if the machine is a clone.
    pub fn entry(&self) -> &str {
        self.info.clone_of.as_deref().unwrap_or(&self.info.name)
    }

    /// Returns the images that each run has an overlay of: the disk, and the images in the arguments.
    pub fn images(&self) -> Vec<ImageFile> {
        let disk = ImageFile { path: self.disk.clone(), format: Some("qcow2".to_owned()) };
        let others = self.start_args.opened().images.iter().map(|image| image.source.clone());
        std::iter::once(disk).chain(others).collect()
    }

    /// Returns the paths of a run's overlays, in the order of the images.
    pub fn overlays(&self) -> Vec<PathBuf> {
        let count = self.start_args.opened().images.len() + 1;
        (0..count).map(|n| overlay_path(&self.disposable, n)).collect()
    }

    /// Describes the writes of a run that the next run would find; `None` if every run is clean.
    pub fn shared_writes(&self) -> Option<String> {
        let shared: Vec<String> = self.start_args.opened().shared.iter().map(ToString::to_string).collect();
        (!shared.is_empty()).then(|| shared.join("; "))
    }

    /// Returns the warning about a machine whose runs are not clean, if the operator allows that.
    pub fn shared_writes_warning(&self) -> Option<String> {
        let shared = self.shared_writes().filter(|_| self.allow_shared_writes)?;
        Some(format!(
            "a run leaves its changes to the next one (allow_shared_writes). Its start_args have {shared}"
        ))
    }

    /// Refuses a machine whose runs would not be clean, unless the operator allows them.
    ///
    /// # Errors
    /// A run would change something that the next run finds, and the operator has not allowed that.
    pub fn expect_clean_runs(&self) -> Result<()> {
        match self.shared_writes().filter(|_| !self.allow_shared_writes) {
            None => Ok(()),
            Some(shared) => Err(Error::configuration(format!(
                "a run would leave its changes to the next one. Its start_args have {shared}"
            ))
            .advice(format!(
                "Remove it, make it read-only (readonly=on), or use an image file, of which each run gets an overlay. \
                 To accept it, set machineries.qemu.machines.{}.allow_shared_writes: true in machinery-host.yaml",
                self.entry()
            ))),
        }
    }

    /// Returns the arguments that are not in the list of safe ones.
    fn refused_args(&self) -> Vec<Refusal> {
        let (opened, area) = (self.start_args.opened(), self.area());
        let mut refused = refusals(self.start_args.named(), &area);
        let files = opened.images.iter().map(|image| &image.source).chain(&opened.sources);
        let readable = files.filter(|file| !area.may_read(&file.path) && is_read_as_it_is(file));
        refused.extend(readable.map(|file| Refusal::of_file(&file.path)));
        refused
    }

    /// Returns the warning about a machine with unsafe arguments, if the operator accepts them.
    pub fn unsafe_args_warning(&self) -> Option<String> {
        let refused = if self.unsafe_start_args { self.refused_args() } else { Vec::new() };
        (!refused.is_empty())
            .then(|| format!("its unsafe arguments are accepted (unsafe_start_args): {}", listed(&refused)))
    }

    /// Refuses a machine with arguments that are not in the list of safe ones, unless the operator accepts them.
    ///
    /// # Errors
    /// The machine has such arguments; the error names each with the reason.
    pub fn expect_safe_args(&self) -> Result<()> {
        let refused = if self.unsafe_start_args { Vec::new() } else { self.refused_args() };
        if refused.is_empty() {
            return Ok(());
        }
        Err(Error::configuration(format!("start_args has unsafe arguments: {}", listed(&refused))).advice(
            format!(
                "Remove them. If you trust whoever made this machine, set \
             machineries.qemu.machines.{}.unsafe_start_args: true in machinery-host.yaml",
                self.entry()
            ),
        ))
    }

    /// Returns the name of the template. Machines with the same files have the same template. Its name has a checksum of the
    /// configuration that it depends on: a machine in use keeps an earlier one after a reload.
    pub fn template_name(&self) -> String {
        if !self.is_shared {
            return self.template.clone();
        }
        let files = [&self.disk, &self.snapshot, &self.machineinfo];
        let key =
            format!("{files:?} {:?} {:?} {:?}", self.start_args.unchanged(), self.jail, self.jail_users);
        format!("{}~{:08x}", self.template, crc32fast::hash(key.as_bytes()))
    }

    /// Returns all files that QEMU reads for the machine: the backing chains of its images, and the other files that
    /// its arguments name. A file that QEMU itself will report as missing is among them.
    ///
    /// # Errors
    /// A file of a chain breaks a [rule](TrustedChain::of), is missing, or cannot be read.
    pub fn chain(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for image in self.images() {
            files.append(&mut self.chain_of(&image)?.files);
        }
        for source in &self.start_args.opened().sources {
            match source.path.is_file() {
                true => files.append(&mut self.chain_of(source)?.files),
                false => files.push(source.path.clone()),
            }
        }
        files.sort();
        files.dedup();
        Ok(files)
    }

    /// Resolves the backing chain of one image.
    ///
    /// # Errors
    /// As [`chain`](MachineFiles::chain).
    pub fn chain_of(&self, image: &ImageFile) -> Result<TrustedChain> {
        // Host and root may change the files; nobody else can between this check and QEMU.
        let owners = vec![0, geteuid().as_raw()];
        let rules = ChainRules { owners, raw_folders: self.area().readable() };
        TrustedChain::of(&image.path, image.format.as_deref(), &rules)
    }

    fn area(&self) -> Area {
        Area::new(self.folder(), &self.disk)
    }

    /// Returns the folder in which QEMU runs: the machine's own, so relative paths in `start_args` start
    /// there.
    pub fn folder(&self) -> &Path {
        self.machineinfo.parent().unwrap_or(Path::new("/"))
    }

    /// Reports whether the arguments in machineinfo.json have changed since they were read.
    pub fn has_other_args(&self) -> bool {
        StartArgs::read(&self.machineinfo, &self.info.name).is_ok_and(|args| args != self.start_args)
    }
}

/// Reports whether the guest reads the bytes of the file, and not those of an image in it.
fn is_read_as_it_is(file: &ImageFile) -> bool {
    match file.format.as_deref() {
        Some(format) => format == "raw",
        None => !file.path.is_file() || probe_format(&file.path).map_or(true, |format| format == "raw"),
    }
}

fn listed(refused: &[Refusal]) -> String {
    refused.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
