//! The configuration: `conf/machineries/qemu.yaml`, and this machinery's section of `machinery-host.yaml`.
//!
//! The configuration is refused as a whole for a wrong key, or for two machines with one disk. The faults of a
//! single machine's files are found by [`diagnose`](crate::diagnose), so that the host serves all others.
//!
//! | module | content |
//! | --- | --- |
//! | `keys`, `section`, `clones` | the keys of the two files |
//! | `machines`, `wanted` | the machines that the two files together describe |
//! | `machine_files` | one machine, as the rest of the plugin sees it |
//! | `addresses` | the checks of isolated machines' addresses |
//! | `validator` | all other checks |

mod addresses;
mod clones;
mod keys;
mod machine_files;
mod machines;
mod section;
mod validator;
mod wanted;

pub use machine_files::{Isolation, MachineFiles};

use std::path::{Path, PathBuf};

use machinery::config::{ConfigFile, renamed_keys};
use machinery::{Error, FreeSpaceReserve, Result, Setup};
use machinery_backend::jail::JailMode;

use crate::version::Version;
use keys::{Binaries, QemuFile};
use section::{RENAMED, Section};
use validator::{Origin, Validator};
use wanted::{Files, Wanted};

/// The whole configuration, checked.
pub struct Config {
    pub binaries: Binaries,
    pub version: Version,
    pub instant_dir: PathBuf,
    /// The limit for all templates together, in bytes.
    pub instant_space_limit: Option<u64>,
    /// The limit for all standbys together, in bytes.
    pub standby_memory_limit: Option<u64>,
    /// The memory that automatic standbys leave free, in bytes, if it is configured.
    pub standby_memory_reserve: Option<u64>,
    /// The jail of programs that run for all machines.
    pub jail: JailMode,
    pub free_space_reserve: FreeSpaceReserve,
    pub machines: Vec<MachineFiles>,
    /// Warnings about keys that were renamed, and about addresses.
    pub warnings: Vec<String>,
}

impl Config {
    /// Reads and checks the configuration.
    ///
    /// # Errors
    /// All problems at once.
    pub fn read(setup: &Setup) -> Result<Config> {
        let mut problems = Vec::new();
        let config = Config::read_collecting(setup, &mut problems);
        match (config, Error::all(problems)) {
            (Some(config), None) => Ok(config),
            (_, Some(problems)) => Err(problems),
            (None, None) => Err(Error::configuration("the configuration cannot be read")),
        }
    }

    /// Reads the configuration as far as possible, and adds the problems to `problems`.
    pub fn read_collecting(setup: &Setup, problems: &mut Vec<Error>) -> Option<Config> {
        let mut add = |error: Error| problems.push(error);
        let section: Section = setup.section("qemu").map_err(&mut add).unwrap_or_default();
        let free_space_reserve = FreeSpaceReserve::read(setup).map_err(&mut add).unwrap_or_default();
        let file = &setup.config;
        let qemu: QemuFile = file.parse().map_err(&mut add).ok()?;
        let mut validator = Validator { file, problems };
        validator.section(setup.host_config.as_ref(), &section, &qemu.machines);
        let files = Files { own: file, host: setup.host_config.as_ref(), section: &section };
        let wanted = validator.wanted(&files, &qemu.machines);
        // Runs that have a network of their own do without it.
        if wanted.is_empty() || wanted.iter().any(|machine| machine.guest.is_none()) {
            validator.interface(&["interface"], &qemu.interface);
        }
        // A program that is not trusted must not run, so `check` ends with such a configuration.
        let is_trusted = validator.program(&["binaries", "qemu_img"], &qemu.binaries.qemu_img);
        let version = validator.version(&qemu.binaries.qemu_system_x86_64);
        let folder = qemu.disposable_copy_dir.as_deref().map(Path::new);
        if let Some(folder) = folder {
            validator.overlay_folder(&["disposable_copy_dir"], folder);
        }
        validator.duplicates(&files, &wanted, &qemu.machines);
        validator.addresses(&files, &wanted, setup.result_server);
        let origin = Origin {
            interface: &qemu.interface,
            overlays: folder,
            section: &section,
            state: &setup.state_dir,
            result_server: setup.result_server,
        };
        let machine = |wanted: &Wanted| validator.machine(wanted, &origin);
        let machines: Vec<MachineFiles> = wanted.iter().filter_map(machine).collect();
        validator.overlays(&qemu.machines, &machines);
        validator.problems.dedup();
        let mut warnings = setup.host_config.as_ref().map_or_else(Vec::new, renamed);
        warnings.extend(addresses::warnings(&files, &wanted, setup.result_server));
        is_trusted.then_some(())?;
        Some(Config {
            binaries: qemu.binaries,
            version: version?,
            instant_dir: section.instant_dir.unwrap_or_else(|| setup.cache_dir.join("templates")),
            instant_space_limit: section.instant_space_limit,
            jail: section.jail,
            standby_memory_limit: section.standby_memory_limit,
            standby_memory_reserve: section.standby_memory_reserve,
            free_space_reserve,
            machines,
            warnings,
        })
    }
}

/// Returns a warning for each renamed key of this machinery's section.
fn renamed(host_config: &ConfigFile) -> Vec<String> {
    renamed_keys(host_config, &["machineries", "qemu"], &RENAMED)
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::jail::jail_of;
    use machinery_backend::MachineKeys;
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
        let section = Section::default();
        let wanted = validator.wanted(&Files { own: &file, host: None, section: &section }, &qemu.machines);
        let (interface, state) = ("lo", folder);
        let origin = Origin { interface, overlays: None, section: &section, state, result_server: None };
        let files = validator.machine(&wanted[0], &origin);
        assert_eq!(problems, []);
        files.unwrap()
    }

    /// Creates an isolated machine, whose files are in that folder and shared.
    pub fn isolated_machine_in(folder: &Path, name: &str) -> MachineFiles {
        let files = machine_in(folder);
        let (address, guest) = ("10.0.0.1".parse().unwrap(), "192.168.30.11".parse().unwrap());
        let interface = "cm0000-00000000".to_owned();
        MachineFiles {
            isolation: Some(Isolation { address, guest, interface, result_server: None }),
            is_shared: true,
            disposable: folder.join(format!("{name}_disposable.qcow2")),
            ..files
        }
    }

    #[test]
    fn isolated_machines_may_share_their_files_and_not_their_addresses_or_overlays() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| isolated_machine_in(folder.path(), name));
        let (disk, snapshot) = (a.disk.to_str().unwrap(), a.snapshot.to_str().unwrap());
        assert!(a.may_share(&b, "qcow2_path", disk) && a.may_share(&b, "snapshot_path", snapshot));
        assert!(!a.may_share(&b, "qcow2_path", a.disposable.to_str().unwrap()));
        assert!(!a.may_share(&b, "ip", &a.info.ip));
        let operator = MachineFiles { isolation: None, ..b };
        assert!(!a.may_share(&operator, "qcow2_path", disk) && !operator.may_share(&a, "qcow2_path", disk));
    }

    #[test]
    fn machines_that_share_a_disk_differ_in_their_users_and_have_a_group_in_common() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| jail_of(&isolated_machine_in(folder.path(), name)));
        assert_eq!(a.shared_group(), b.shared_group());
        // Only root gives machines users.
        assert!(a.user().is_none() || a.user().map(|user| user.uid) != b.user().map(|user| user.uid));
    }

    fn host_config(section: &str) -> ConfigFile {
        let text = format!("machineries:\n  qemu:\n    {section}\n");
        ConfigFile { path: "/c/machinery-host.yaml".into(), text }
    }

    #[test]
    fn console_is_off_unless_the_section_or_the_machine_enables_it() {
        let has_console = |section: &str| {
            let section: Section = host_config(section).parse_at(&["machineries", "qemu"]).unwrap().unwrap();
            section.has_console("m")
        };
        assert!(!has_console("standby: off") && has_console("console: true"));
        assert!(!has_console("{console: true, machines: {m: {console: false}}}"));
        assert!(has_console("machines: {m: {console: true}, other: {}}"));
    }

    #[test]
    fn section_reads_each_renamed_key_with_a_warning() {
        for ((old, new), value) in RENAMED.into_iter().zip(["/t", "2 GiB", "3 GiB"]) {
            let read = |key: &str| {
                let file = host_config(&format!("{key}: {value}"));
                let section: Section = file.parse_at(&["machineries", "qemu"]).unwrap().unwrap();
                (format!("{section:?}"), renamed(&file))
            };
            let (before, warnings) = read(old);
            let (after, none) = read(new);
            assert_eq!(before, after, "{old}");
            assert_ne!(before, format!("{:?}", Section::default()), "{old}");
            let [warning] = &warnings[..] else { panic!("one warning: {warnings:?}") };
            assert!(warning.contains(old) && warning.contains(&format!("`{new}`")), "{warning}");
            assert!(warning.starts_with("/c/machinery-host.yaml:3: "), "{warning}");
            assert_eq!(none, [""; 0]);
        }
    }
}
