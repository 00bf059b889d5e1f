//! Checks the configuration, and collects all problems with their file, line and key.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use machinery::config::{ConfigFile, Machines, expect_interface};
use machinery::trust::expect_trusted;
use machinery::{Error, MachineInfo};
use machinery_backend::{cell, expect_overlay_folder};
use rustix::fs::{Access, access};

use super::keys::OwnKeys;
use super::machine_files::{Isolation, MachineFiles};
use super::section::Section;
use super::wanted::Wanted;
use crate::machineinfo::StartArgs;
use crate::version::Version;

/// Checks the configuration, and collects the problems.
pub struct Validator<'a> {
    pub file: &'a ConfigFile,
    pub problems: &'a mut Vec<Error>,
}

/// The values that all machines have in common.
pub struct Origin<'a> {
    pub interface: &'a str,
    /// The folder of the overlays, if there is one for all machines.
    pub overlays: Option<&'a Path>,
    pub section: &'a Section,
    /// The plugin's own folder, which no other host has.
    pub state: &'a Path,
    pub result_server: Option<SocketAddr>,
}

impl Origin<'_> {
    /// Returns the network of an isolated machine.
    fn isolation(&self, wanted: &Wanted) -> Option<Isolation> {
        let (guest, machine) = (wanted.guest?, &wanted.machine);
        let address = machine.shared.ip.parse().ok()?;
        let interface = cell::interface_name(self.state, &machine.name);
        let result_server = match self.result_server {
            Some(SocketAddr::V4(server)) => Some(server),
            _ => None,
        };
        Some(Isolation { address, guest, interface, result_server })
    }
}

impl Validator<'_> {
    pub fn problem(&mut self, key: &[&str], reason: String, advice: &str) {
        self.problems.push(self.file.error(key, reason).advice(advice));
    }

    /// Adds an error about the value of a key.
    fn about(&mut self, key: &[&str], error: &Error) {
        self.problems.push(self.file.error(key, error.to_string()));
    }

    /// Checks this machinery's section of `machinery-host.yaml`.
    pub fn section(&mut self, host: Option<&ConfigFile>, section: &Section, machines: &Machines<OwnKeys>) {
        let Some(host) = host else { return };
        let known = |name: &str| machines.iter().any(|machine| machine.name == name);
        for name in section.machines.keys().filter(|name| !known(name)) {
            let reason = format!("there is no machine '{name}' in {}", self.file.path.display());
            let error = host.error(&["machineries", "qemu", "machines", name], reason);
            self.problems.push(error.advice("Correct the name, or remove the entry"));
        }
        if let Some(dir) = section.instant_dir.as_ref().filter(|dir| !dir.is_absolute()) {
            let reason = format!("{} is not an absolute path", dir.display());
            let error = host.error(&["machineries", "qemu", "instant_dir"], reason);
            self.problems.push(error.advice("Write an absolute path: the host has no folder of its own"));
        }
    }

    pub fn interface(&mut self, key: &[&str], name: &str) {
        self.problems.extend(expect_interface(self.file, key, name).err());
    }

    /// Refuses a file or a folder that other users could change.
    pub fn trusted(&mut self, key: &[&str], path: &Path) -> bool {
        expect_trusted(path).map_err(|error| self.about(key, &error)).is_ok()
    }

    /// Checks that the file can be executed, and that no other user could change it.
    pub fn program(&mut self, key: &[&str], path: &Path) -> bool {
        let usable = path.is_file() && access(path, Access::EXEC_OK).is_ok();
        if !usable {
            let reason = format!("{} is not a program this user may run", path.display());
            self.problem(key, reason, "Install QEMU (qemu-system-x86 and qemu-utils), or correct the path");
        }
        usable && self.trusted(key, path)
    }

    /// Returns the version of QEMU's program, which runs only if it is trusted.
    pub fn version(&mut self, program: &Path) -> Option<Version> {
        let key = ["binaries", "qemu_system_x86_64"];
        if !self.program(&key, program) {
            return None;
        }
        Version::of(program).map_err(|error| self.about(&key, &error)).ok()
    }

    /// Checks that overlays can be made in the folder, and that no other user could put a link in their place.
    pub fn overlay_folder(&mut self, key: &[&str], folder: &Path) {
        if let Err(error) = expect_overlay_folder(folder) {
            self.about(key, &error);
        }
    }

    /// Refuses a configured file at an overlay's path: overlays are replaced and deleted.
    pub fn overlays(&mut self, configured: &Machines<OwnKeys>, machines: &[MachineFiles]) {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let overlays = machines.iter().flat_map(|machine| {
            machine.overlays().into_iter().map(|overlay| (real(&overlay), machine.info.name.as_str()))
        });
        let overlays: HashMap<PathBuf, &str> = overlays.collect();
        let configured = configured.iter().flat_map(|machine| {
            machine.own.paths().map(|(key, path)| (machine.name.as_str(), key, PathBuf::from(path)))
        });
        let opened = machines.iter().flat_map(|machine| {
            let opened = machine.start_args.opened().paths();
            opened.map(|path| (machine.info.name.as_str(), "machineinfo_path", path.to_owned()))
        });
        for (machine, key, path) in configured.chain(opened) {
            if let Some(other) = overlays.get(&real(&path)) {
                let reason = format!("{} is where an overlay of machine '{other}' goes", path.display());
                let advice = "Give the file another name: an overlay is replaced at each start";
                self.problem(&["machines", machine, key], reason, advice);
            }
        }
    }

    /// Checks one machine, and reads its arguments.
    pub fn machine(&mut self, wanted: &Wanted, origin: &Origin<'_>) -> Option<MachineFiles> {
        let before = self.problems.len();
        let (machine, section, entry) = (&wanted.machine, origin.section, wanted.entry());
        let (name, own) = (machine.name.as_str(), &machine.own);
        let architecture = machine.shared.architecture.as_str();
        if !["amd64", "x86"].contains(&architecture) {
            let reason = format!("the architecture '{architecture}' is not supported");
            self.problem(&["machines", entry, "architecture"], reason, "Use amd64 or x86");
        }
        let key = |key: &'static str| ["machines", entry, key];
        for (name, path) in own.paths() {
            if !Path::new(path).is_absolute() {
                let reason = format!("{path} is not an absolute path");
                self.problem(&key(name), reason, "Write an absolute path: the host has no folder of its own");
            }
        }
        let folder = origin.overlays.or(Path::new(&own.qcow2_path).parent()).unwrap_or(Path::new("/"));
        // Source: Cuckoo3's `machineries/modules/qemu.py`.
        let disposable = folder.join(format!("{name}_disposable.qcow2"));
        self.usable_in_arguments(&key("qcow2_path"), &disposable);
        let isolation = origin.isolation(wanted);
        let machineinfo = PathBuf::from(&own.machineinfo_path);
        let (start_args, args_error) = match StartArgs::read(&machineinfo, name) {
            Ok(args) => (args, None),
            Err(error) => (StartArgs::default(), Some(error)),
        };
        let options = section.machines.get(entry);
        (self.problems.len() == before).then_some(MachineFiles {
            info: info_of(wanted, &disposable, isolation.as_ref(), origin),
            disk: own.qcow2_path.clone().into(),
            snapshot: own.snapshot_path.clone().into(),
            disposable,
            start_args,
            args_error,
            machineinfo,
            own_interface: machine.shared.interface.clone().filter(|_| isolation.is_none()),
            keep_disk: section.keep_disposable_disks,
            prepare: section.prepare_options(entry),
            allow_shared_writes: options.is_some_and(|own| own.allow_shared_writes),
            jail: section.jail_of(entry),
            jail_users: section.jail_users,
            unsafe_start_args: options.is_some_and(|own| own.unsafe_start_args),
            isolation,
            is_shared: wanted.is_shared,
            template: wanted.template.clone(),
            is_first_of_template: wanted.is_first,
        })
    }

    /// Refuses an overlay's path that cannot be part of QEMU's arguments. A comma ends a value there; a quote or
    /// backslash would need an escape in JSON.
    fn usable_in_arguments(&mut self, key: &[&str], disposable: &Path) {
        if disposable.to_string_lossy().contains([',', '"', '\\']) || !disposable.is_absolute() {
            let reason = format!(
                "the disposable disk would be {}, which QEMU's arguments cannot hold",
                disposable.display()
            );
            self.problem(
                key,
                reason,
                "Use an absolute path without comma, quote and backslash, or set such a disposable_copy_dir",
            );
        }
    }
}

/// Returns the machine's description. The label of a machine that shares its disk is the path of its overlay, because a
/// label is unique.
fn info_of(
    wanted: &Wanted,
    disposable: &Path,
    isolation: Option<&Isolation>,
    origin: &Origin<'_>,
) -> MachineInfo {
    let (machine, own) = (&wanted.machine, &wanted.machine.own);
    let label = if wanted.is_shared { disposable.display().to_string() } else { own.qcow2_path.clone() };
    let snapshot = Some(own.snapshot_path.clone());
    let info = MachineInfo::new(&machine.name, &machine.shared, label, snapshot, origin.interface);
    MachineInfo {
        console: origin.section.has_console(wanted.entry()),
        own_network: isolation.is_some(),
        interface: isolation.map(|isolation| isolation.interface.clone()).or(info.interface),
        clone_of: wanted.clone_of.clone(),
        ..info
    }
}
