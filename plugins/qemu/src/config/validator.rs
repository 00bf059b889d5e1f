//! Checks the configuration, and collects all problems with their file, line and key.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use machinery::config::{ConfigFile, Configured, Machines, expect_interface};
use machinery::trust::expect_trusted;
use machinery::{Error, MachineInfo, Result};
use rustix::fs::{Access, access};

use super::keys::OwnKeys;
use super::machine_files::MachineFiles;
use super::section::Section;
use crate::machineinfo::StartArgs;
use crate::version::Version;

/// Checks the configuration, and collects the problems.
pub struct Validator<'a> {
    pub file: &'a ConfigFile,
    pub problems: &'a mut Vec<Error>,
}

impl Validator<'_> {
    fn problem(&mut self, key: &[&str], reason: String, advice: &str) {
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
        if !folder.is_dir() {
            let reason = format!("{} is not a folder", folder.display());
            self.problem(key, reason, "Create it, or correct the path");
        } else if let Err(error) = expect_overlay_folder(folder) {
            self.about(key, &error);
        }
    }

    /// Refuses an address or a file that several machines have.
    pub fn duplicates(&mut self, machines: &Machines<OwnKeys>) {
        let doubles = machines.duplicates(self.file, |machine| {
            vec![("ip", Some(&machine.shared.ip)), ("mac_address", machine.shared.mac_address.as_deref())]
        });
        self.problems.extend(doubles);
        let mut seen: HashMap<&str, (&str, &str)> = HashMap::new();
        for machine in machines.iter() {
            for (key, path) in machine.own.paths() {
                if let Some((other, other_key)) = seen.insert(path, (&machine.name, key)) {
                    let reason = format!("{path} is already the {other_key} of machine '{other}'");
                    self.problem(
                        &["machines", &machine.name, key],
                        reason,
                        "Give each machine files of its own",
                    );
                }
            }
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
    pub fn machine(
        &mut self,
        machine: &Configured<OwnKeys>,
        interface: &str,
        disposables: Option<&Path>,
        section: &Section,
    ) -> Option<MachineFiles> {
        let before = self.problems.len();
        let name = machine.name.as_str();
        let own = &machine.own;
        let architecture = machine.shared.architecture.as_str();
        if !["amd64", "x86"].contains(&architecture) {
            let reason = format!("the architecture '{architecture}' is not supported");
            self.problem(&["machines", name, "architecture"], reason, "Use amd64 or x86");
        }
        let key = |key: &'static str| ["machines", name, key];
        for (name, path) in own.paths() {
            if !Path::new(path).is_absolute() {
                let reason = format!("{path} is not an absolute path");
                self.problem(&key(name), reason, "Write an absolute path: the host has no folder of its own");
            }
        }
        let folder = disposables.or(Path::new(&own.qcow2_path).parent()).unwrap_or(Path::new("/"));
        // Source: Cuckoo3's `machineries/modules/qemu.py`.
        let disposable = folder.join(format!("{name}_disposable.qcow2"));
        self.usable_in_arguments(&key("qcow2_path"), &disposable);
        let (label, snapshot) = (own.qcow2_path.clone(), Some(own.snapshot_path.clone()));
        let info = MachineInfo::new(name, &machine.shared, label, snapshot, interface);
        let info = MachineInfo { console: section.has_console(name), ..info };
        let machineinfo = PathBuf::from(&own.machineinfo_path);
        let (start_args, args_error) = match StartArgs::read(&machineinfo) {
            Ok(args) => (args, None),
            Err(error) => (StartArgs::default(), Some(error)),
        };
        (self.problems.len() == before).then_some(MachineFiles {
            info,
            disk: own.qcow2_path.clone().into(),
            snapshot: own.snapshot_path.clone().into(),
            disposable,
            start_args,
            args_error,
            machineinfo,
            own_interface: machine.shared.interface.clone(),
            keep_disk: section.keep_disposable_disks,
            prepare: section.prepare_options(name),
            allow_shared_writes: section.machines.get(name).is_some_and(|own| own.allow_shared_writes),
            jail: section.jail_of(name),
            jail_users: section.jail_users,
            unsafe_start_args: section.machines.get(name).is_some_and(|own| own.unsafe_start_args),
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

/// Checks that only trusted users, and this one, can create overlays in the folder.
///
/// # Errors
/// This user may not write there, or others may.
pub fn expect_overlay_folder(folder: &Path) -> Result<()> {
    expect_trusted(folder)?;
    if access(folder, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK).is_ok() {
        return Ok(());
    }
    let reason = format!("the folder {} is not writable for this user", folder.display());
    Err(Error::environment(reason)
        .advice("Disposable disks are made there: change its permissions, or set disposable_copy_dir"))
}
