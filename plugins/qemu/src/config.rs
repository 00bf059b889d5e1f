//! `conf/machineries/qemu.yaml`: as types, then as machines that can be started.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use machinery::config::{
    ConfigFile, Configured, Machines, empty_as_none, expect_interface, null_as_default, text,
};
use machinery::{Error, MachineInfo, Result, Setup, Standby, parse_bytes};
use rustix::fs::{Access, access};
use serde::Deserialize;

use crate::disk;
use crate::images::Source;
use crate::machineinfo::StartArgs;
use crate::version::Version;

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct QemuFile {
    #[serde(deserialize_with = "text")]
    interface: String,
    #[serde(default, deserialize_with = "empty_as_none")]
    disposable_copy_dir: Option<String>,
    binaries: Binaries,
    #[serde(default)]
    machines: Machines<OwnKeys>,
}

/// The programs.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binaries {
    #[serde(deserialize_with = "text")]
    pub qemu_img: PathBuf,
    #[serde(deserialize_with = "text")]
    pub qemu_system_x86_64: PathBuf,
}

/// A machine's own keys.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct OwnKeys {
    #[serde(deserialize_with = "text")]
    qcow2_path: String,
    #[serde(deserialize_with = "text")]
    snapshot_path: String,
    #[serde(deserialize_with = "text")]
    machineinfo_path: String,
}

/// This machinery's section of `machinery-host.yaml`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Section {
    keep_disposable_disks: bool,
    instant: Instant,
    /// Where the templates are; the plugin's folder for caches unless given.
    #[serde(alias = "template_dir")]
    instant_dir: Option<PathBuf>,
    #[serde(alias = "template_space", deserialize_with = "parse_bytes")]
    instant_space_limit: Option<u64>,
    standby: Standby,
    #[serde(alias = "standby_memory", deserialize_with = "parse_bytes")]
    standby_memory_limit: Option<u64>,
    /// What is different for single machines.
    #[serde(deserialize_with = "null_as_default")]
    machines: BTreeMap<String, MachineSection>,
}

/// Whether restores are instant where they can be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Instant {
    #[default]
    Auto,
    Off,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MachineSection {
    instant: Option<Instant>,
    standby: Option<Standby>,
    /// Whether a run may write to files or devices that the next run finds changed.
    allow_shared_writes: bool,
}

/// What is to be done ahead of a machine's restores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrepareOptions {
    pub instant: bool,
    pub standby: Standby,
}

impl Section {
    fn prepare_options(&self, machine: &str) -> PrepareOptions {
        let own = self.machines.get(machine).copied().unwrap_or_default();
        let instant = own.instant.unwrap_or(self.instant) == Instant::Auto;
        PrepareOptions { instant, standby: own.standby.unwrap_or(self.standby) }
    }
}

/// Everything, checked.
pub struct Config {
    pub binaries: Binaries,
    pub version: Version,
    pub instant_dir: PathBuf,
    /// In bytes.
    pub instant_space_limit: Option<u64>,
    /// In bytes.
    pub standby_memory_limit: Option<u64>,
    pub machines: Vec<MachineFiles>,
}

/// One machine: what it is, and where its files are. As long as all of it is the same, so is the machine.
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
}

impl MachineFiles {
    /// Returns the images that each run has an overlay of: the disk, and the images in the arguments.
    pub fn images(&self) -> Vec<Source> {
        let disk = Source { path: self.disk.clone(), format: Some("qcow2".to_owned()) };
        let others = self.start_args.opened().images.iter().map(|image| image.source.clone());
        std::iter::once(disk).chain(others).collect()
    }

    /// Returns the paths of a run's overlays, in the order of the images.
    pub fn overlays(&self) -> Vec<PathBuf> {
        let count = self.start_args.opened().images.len() + 1;
        (0..count).map(|n| disk::overlay_path(&self.disposable, n)).collect()
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
                self.info.name
            ))),
        }
    }
}

impl MachineFiles {
    /// Returns the folder in which QEMU runs: the machine's own, so relative paths in `start_args` start
    /// there.
    pub fn folder(&self) -> &Path {
        self.machineinfo.parent().unwrap_or(Path::new("/"))
    }

    /// Whether the arguments in machineinfo.json have changed since they were read.
    pub fn has_other_args(&self) -> bool {
        StartArgs::read(&self.machineinfo).is_ok_and(|args| args != self.start_args)
    }
}

impl Config {
    /// Reads and checks everything.
    ///
    /// # Errors
    /// All problems at once.
    pub fn read(setup: &Setup) -> Result<Config> {
        let mut problems = Vec::new();
        let config = Config::read_noting(setup, &mut problems);
        match (config, Error::all(problems)) {
            (Some(config), None) => Ok(config),
            (_, Some(problems)) => Err(problems),
            (None, None) => Err(Error::configuration("the configuration cannot be read")),
        }
    }

    /// Reads as far as possible; what is wrong goes to `problems`.
    pub fn read_noting(setup: &Setup, problems: &mut Vec<Error>) -> Option<Config> {
        let mut note = |error: Error| problems.push(error);
        let section: Section = setup.section("qemu").map_err(&mut note).unwrap_or_default();
        let file = &setup.config;
        let qemu: QemuFile = file.parse().map_err(&mut note).ok()?;
        let mut validator = Validator { file, problems };
        validator.section(setup.host_config.as_ref(), &section, &qemu.machines);
        validator.interface(&["interface"], &qemu.interface);
        validator.program(&["binaries", "qemu_img"], &qemu.binaries.qemu_img);
        let version = validator.version(&qemu.binaries.qemu_system_x86_64);
        let folder = qemu.disposable_copy_dir.as_deref().map(Path::new);
        if let Some(folder) = folder {
            validator.writable(&["disposable_copy_dir"], folder);
        }
        validator.duplicates(&qemu.machines);
        let machine =
            |machine: &Configured<OwnKeys>| validator.machine(machine, &qemu.interface, folder, &section);
        let machines: Vec<MachineFiles> = qemu.machines.iter().filter_map(machine).collect();
        validator.overlays(&qemu.machines, &machines);
        Some(Config {
            binaries: qemu.binaries,
            version: version?,
            instant_dir: section.instant_dir.unwrap_or_else(|| setup.cache_dir.join("templates")),
            instant_space_limit: section.instant_space_limit,
            standby_memory_limit: section.standby_memory_limit,
            machines,
        })
    }
}

/// One look at everything, noting what is wrong.
struct Validator<'a> {
    file: &'a ConfigFile,
    problems: &'a mut Vec<Error>,
}

impl Validator<'_> {
    fn problem(&mut self, key: &[&str], reason: String, advice: &str) {
        self.problems.push(self.file.error(key, reason).advice(advice));
    }

    /// An error from elsewhere, about the value of a key.
    fn about(&mut self, key: &[&str], error: &Error) {
        self.problems.push(self.file.error(key, error.to_string()));
    }

    fn section(&mut self, host: Option<&ConfigFile>, section: &Section, machines: &Machines<OwnKeys>) {
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
            self.problems.push(error.advice("Write the path from / on: the host has no folder of its own"));
        }
    }

    fn interface(&mut self, key: &[&str], name: &str) {
        self.problems.extend(expect_interface(self.file, key, name).err());
    }

    fn program(&mut self, key: &[&str], path: &Path) -> bool {
        let usable = path.is_file() && access(path, Access::EXEC_OK).is_ok();
        if !usable {
            let reason = format!("{} is not a program this user may run", path.display());
            self.problem(key, reason, "Install QEMU (qemu-system-x86 and qemu-utils), or correct the path");
        }
        usable
    }

    fn version(&mut self, program: &Path) -> Option<Version> {
        let key = ["binaries", "qemu_system_x86_64"];
        if !self.program(&key, program) {
            return None;
        }
        Version::of(program).map_err(|error| self.about(&key, &error)).ok()
    }

    fn writable(&mut self, key: &[&str], folder: &Path) {
        if !folder.is_dir() {
            let reason = format!("{} is not a folder", folder.display());
            self.problem(key, reason, "Create it, or correct the path");
        } else if let Err(error) = expect_writable(folder) {
            self.about(key, &error);
        }
    }

    fn duplicates(&mut self, machines: &Machines<OwnKeys>) {
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
    fn overlays(&mut self, configured: &Machines<OwnKeys>, machines: &[MachineFiles]) {
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

    fn machine(
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
                self.problem(
                    &key(name),
                    reason,
                    "Write the path from / on: the host has no folder of its own",
                );
            }
        }
        let folder = disposables.or(Path::new(&own.qcow2_path).parent()).unwrap_or(Path::new("/"));
        let disposable = disk::path_for(folder, name);
        self.usable_in_arguments(&key("qcow2_path"), &disposable);
        let info = MachineInfo::new(
            name,
            &machine.shared,
            own.qcow2_path.clone(),
            Some(own.snapshot_path.clone()),
            interface,
        );
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
        })
    }

    /// The path goes into the middle of QEMU's arguments, where a comma ends a value and a quote or
    /// backslash would have to be escaped in those written as JSON.
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

impl OwnKeys {
    fn paths(&self) -> [(&'static str, &str); 3] {
        [
            ("qcow2_path", &self.qcow2_path),
            ("snapshot_path", &self.snapshot_path),
            ("machineinfo_path", &self.machineinfo_path),
        ]
    }
}

/// Expects that this user can create overlays in the folder.
///
/// # Errors
/// This user may not write there.
pub fn expect_writable(folder: &Path) -> Result<()> {
    if access(folder, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK).is_ok() {
        return Ok(());
    }
    let reason = format!("the folder {} is not writable for this user", folder.display());
    Err(Error::environment(reason)
        .advice("Disposable disks are made there: change its permissions, or set disposable_copy_dir"))
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::fs;

    /// Creates a machine whose files are in that folder: `disk.qcow2`, `snapshot`, `machineinfo.json`.
    pub fn machine_in(folder: &Path) -> MachineFiles {
        let path = |name: &str| folder.join(name);
        let args = ["-m", "32", "-drive", "file=%DISPOSABLE_DISK_PATH%"];
        let machineinfo = serde_json::json!({"machine": {"start_args": args}}).to_string();
        // The version 2 qcow2 header of an empty disk.
        let mut disk = b"QFI\xfb\0\0\0\x02".to_vec();
        disk.resize(1 << 16, 0);
        for (name, content) in
            [("disk.qcow2", &disk[..]), ("snapshot", b"QEVM"), ("machineinfo.json", machineinfo.as_bytes())]
        {
            fs::write(path(name), content).unwrap();
        }
        let text = format!(
            "interface: lo\ndisposable_copy_dir:\n\
             binaries: {{qemu_img: /bin/sh, qemu_system_x86_64: /bin/sh}}\n\
             machines:\n  m: {{qcow2_path: {}, snapshot_path: {}, machineinfo_path: {}, ip: 10.0.0.1, \
             platform: linux, os_version: 12}}\n",
            path("disk.qcow2").display(),
            path("snapshot").display(),
            path("machineinfo.json").display()
        );
        let file = ConfigFile { path: "/c/qemu.yaml".into(), text };
        let qemu: QemuFile = file.parse().unwrap();
        let mut problems = Vec::new();
        let mut validator = Validator { file: &file, problems: &mut problems };
        let machine = qemu.machines.iter().next().unwrap();
        let files = validator.machine(machine, "lo", None, &Section::default());
        assert_eq!(problems, []);
        files.unwrap()
    }
}
