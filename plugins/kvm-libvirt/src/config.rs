//! The configuration: `conf/machineries/kvm.yaml` and this machinery's section of `machinery-host.yaml`.
//!
//! Both files are read into types first, and then checked as far as that is possible without libvirt. The
//! result is a [`Config`] with the [`Keys`] of each machine. A reload compares the keys: a machine whose keys
//! are equal is unchanged.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use machinery::config::{
    ConfigFile, Configured, Machines, empty_as_none, expect_interface, null_as_default, renamed_keys, text,
};
use machinery::{Error, MachineInfo, Result, Setup};
use machinery_backend::hash::fnv1a;
use machinery_backend::{MachineKeys, Standby, expect_overlay_folder};
use serde::Deserialize;

use crate::dsn::{self, is_local};
use crate::prepare::{Image, InstantMode};

/// The path of this machinery's section in `machinery-host.yaml`.
const SECTION: [&str; 2] = ["machineries", "kvm"];

/// Keys of the section that have a new name. The old name is accepted with a warning.
const RENAMED: [(&str, &str); 3] =
    [("save_images", "instant"), INSTANT_DIR, ("standby_memory", "standby_memory_limit")];
const INSTANT_DIR: (&str, &str) = ("save_dir", "instant_dir");

/// The content of `kvm.yaml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KvmFile {
    #[serde(default = "local", deserialize_with = "text")]
    dsn: String,
    #[serde(deserialize_with = "text")]
    interface: String,
    /// The folder of the overlays. The default is the folder of a domain's first disk.
    #[serde(default, deserialize_with = "empty_as_none")]
    disposable_copy_dir: Option<PathBuf>,
    #[serde(default)]
    machines: Machines<OwnKeys>,
}

/// The keys of a machine that only this machinery has.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct OwnKeys {
    #[serde(deserialize_with = "text")]
    label: String,
    #[serde(default, deserialize_with = "empty_as_none")]
    snapshot: Option<String>,
    /// The address of the domain's libvirt, if it is not the machinery's.
    #[serde(default, deserialize_with = "empty_as_none")]
    dsn: Option<String>,
}

/// This machinery's section of `machinery-host.yaml`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Section {
    /// Which machines have a standby.
    #[serde(deserialize_with = "null_as_default")]
    standby: Standby,
    /// The maximum memory of all standbys together, in bytes.
    #[serde(alias = "standby_memory", deserialize_with = "machinery::parse_bytes")]
    standby_memory_limit: Option<u64>,
    /// The memory that automatic standbys leave free, in bytes.
    #[serde(deserialize_with = "machinery::parse_bytes")]
    standby_memory_reserve: Option<u64>,
    /// True if machines without a standby have a save image.
    #[serde(alias = "save_images", deserialize_with = "null_as_default")]
    instant: InstantMode,
    /// True if machines have a console.
    console: bool,
    /// The folder for save images, which libvirtd must be able to access. The default is the plugin's cache.
    #[serde(alias = "save_dir")]
    instant_dir: Option<PathBuf>,
    /// Settings of single machines.
    #[serde(deserialize_with = "null_as_default")]
    machines: BTreeMap<String, MachineSection>,
}

/// The settings of one machine in the section.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MachineSection {
    standby: Option<Standby>,
    console: Option<bool>,
}

fn local() -> String {
    "qemu:///system".to_owned()
}

impl KvmFile {
    /// Returns the address of the libvirt of that machine.
    fn dsn_of<'a>(&'a self, machine: &'a Configured<OwnKeys>) -> &'a str {
        machine.own.dsn.as_deref().unwrap_or(&self.dsn)
    }

    /// Reports whether the interface of all machines is needed on this computer.
    fn needs_interface(&self) -> bool {
        let needs = |machine| is_local(self.dsn_of(machine)) && machine.shared.interface.is_none();
        is_local(&self.dsn) || self.machines.iter().any(needs)
    }
}

/// The checked configuration.
pub struct Config {
    /// The address of the libvirt of machines that name none.
    pub dsn: String,
    pub machines: Vec<Keys>,
    /// The maximum memory of all standbys together, in bytes, if it is configured.
    pub standby_memory_limit: Option<u64>,
    /// The memory that automatic standbys leave free, in bytes, if it is configured.
    pub standby_memory_reserve: Option<u64>,
    pub instant: InstantMode,
    /// The folder for save images.
    pub instant_dir: PathBuf,
}

/// The configuration of one machine. The machine is unchanged as long as this value is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// Its `label` is the name of the domain.
    pub info: MachineInfo,
    /// The address of the domain's libvirt.
    pub dsn: String,
    /// The domain, with the address of its libvirt: unique among all machines.
    domain: String,
    /// Which standby the machine has, if any.
    pub standby: Standby,
    pub image: Image,
}

impl MachineKeys for Keys {
    fn info(&self) -> &MachineInfo {
        &self.info
    }

    fn unique(&self) -> Vec<(&'static str, Option<&str>)> {
        let mut unique = self.info.unique();
        unique.push(("label", Some(&self.domain)));
        unique.push(("overlay", self.image.overlay().to_str()));
        unique
    }
}

impl Config {
    /// Reads and checks the configuration.
    ///
    /// # Errors
    /// The configuration is wrong. The error contains all problems.
    pub fn read(setup: &Setup) -> Result<Config> {
        let section: Section = setup.section(SECTION[1])?;
        let file: KvmFile = setup.config.parse()?;
        let mut problems = problems(&file, &setup.config);
        if let Some(host_config) = &setup.host_config {
            problems.extend(unknown_machines(&section, &file, host_config));
            problems.extend(relative_instant_dir(&section, host_config));
        }
        match Error::all(problems) {
            Some(problems) => Err(problems),
            None => Ok(Config::new(&file, section, setup)),
        }
    }

    fn new(file: &KvmFile, section: Section, setup: &Setup) -> Config {
        let instant_dir = section.instant_dir.clone().unwrap_or_else(|| setup.cache_dir.clone());
        // A libvirt on another host would write its save images there.
        let instant_at = |dsn: &str| if is_local(dsn) { section.instant } else { InstantMode::Off };
        let keys = |machine: &Configured<OwnKeys>| {
            let (name, dsn, own) = (&machine.name, file.dsn_of(machine), machine.own.clone());
            let info = MachineInfo::new(name, &machine.shared, own.label, own.snapshot, &file.interface);
            let hypervisor = Some(dsn.to_owned()).filter(|dsn| *dsn != file.dsn);
            let info = MachineInfo { console: section.has_console(name), hypervisor, ..info };
            let overlay = file.overlay_of(&info.label, dsn);
            let image = Image::of(name, instant_at(dsn), &instant_dir, overlay).of_host(dsn::host(dsn));
            let (domain, dsn) = (format!("{} at {dsn}", info.label), dsn.to_owned());
            Keys { info, dsn, domain, standby: section.standby_of(name), image }
        };
        let machines: Vec<Keys> = file.machines.iter().map(keys).collect();
        let is_any_local = is_local(&file.dsn) || machines.iter().any(|keys| is_local(&keys.dsn));
        Config {
            dsn: file.dsn.clone(),
            machines,
            standby_memory_limit: section.standby_memory_limit,
            standby_memory_reserve: section.standby_memory_reserve,
            instant: if is_any_local { section.instant } else { InstantMode::Off },
            instant_dir,
        }
    }

    /// Returns the addresses of all libvirts, each once: those of the machines, or else that of the machinery.
    pub fn dsns(&self) -> Vec<&str> {
        let mut dsns: Vec<&str> = self.machines.iter().map(|keys| keys.dsn.as_str()).collect();
        if dsns.is_empty() {
            dsns.push(&self.dsn);
        }
        dsns.sort_unstable();
        dsns.dedup();
        dsns
    }

    /// Returns the folder for save images, unless they are off.
    pub fn image_folder(&self) -> Option<&Path> {
        (self.instant != InstantMode::Off).then_some(self.instant_dir.as_path())
    }
}

/// Returns a warning for each key that has a new name.
pub fn renamed_keys_of(setup: &Setup) -> Vec<String> {
    let file = setup.host_config.as_ref();
    file.map(|file| renamed_keys(file, &SECTION, &RENAMED)).unwrap_or_default()
}

impl KvmFile {
    /// Returns the overlay of a domain's first disk: its path, or only its name if it lies beside that disk. A label is
    /// unique in its libvirt, so the name of any other than this computer's own has a hash of the address. Hosts of two
    /// libvirts may use one folder.
    fn overlay_of(&self, label: &str, dsn: &str) -> PathBuf {
        let file = match dsn == local() {
            true => format!("{label}_disposable.qcow2"),
            false => format!("{label}_{:016x}_disposable.qcow2", fnv1a([OsStr::new(dsn)])),
        };
        self.disposable_copy_dir.clone().unwrap_or_default().join(file)
    }
}

impl Section {
    fn standby_of(&self, machine: &str) -> Standby {
        self.machines.get(machine).and_then(|own| own.standby).unwrap_or(self.standby)
    }

    fn has_console(&self, machine: &str) -> bool {
        self.machines.get(machine).and_then(|own| own.console).unwrap_or(self.console)
    }
}

fn relative_instant_dir(section: &Section, host_config: &ConfigFile) -> Option<Error> {
    let relative = section.instant_dir.as_ref().filter(|folder| !folder.is_absolute())?;
    let reason = format!("'{}' is not an absolute path", relative.display());
    let (old, new) = INSTANT_DIR;
    let is_new = renamed_keys(host_config, &SECTION, &[INSTANT_DIR]).is_empty();
    let key = [SECTION[0], SECTION[1], if is_new { new } else { old }];
    Some(host_config.error(&key, reason).advice("Begin it with a slash"))
}

/// Reports settings of machines that `kvm.yaml` does not have.
fn unknown_machines(section: &Section, kvm: &KvmFile, host_config: &ConfigFile) -> Vec<Error> {
    let is_known = |name: &str| kvm.machines.iter().any(|machine| machine.name == name);
    let unknown = section.machines.keys().filter(|name| !is_known(name));
    let error = |name: &String| {
        let key = [SECTION[0], SECTION[1], "machines", name];
        host_config
            .error(&key, format!("kvm.yaml has no machine '{name}'"))
            .advice("Correct the name, or leave it out")
    };
    unknown.map(error).collect()
}

fn unusable_overlay_folder(kvm: &KvmFile, file: &ConfigFile) -> Option<Error> {
    let folder = kvm.disposable_copy_dir.as_deref()?;
    let problem = |reason: String| file.error(&["disposable_copy_dir"], reason);
    if !folder.is_absolute() {
        let reason = format!("'{}' is not an absolute path", folder.display());
        return Some(problem(reason).advice("Begin it with a slash"));
    }
    expect_overlay_folder(folder).err().map(|error| problem(error.to_string()))
}

/// Reports all problems of `kvm.yaml`.
fn problems(kvm: &KvmFile, file: &ConfigFile) -> Vec<Error> {
    let mut problems: Vec<Error> = no_uri(file, &["dsn"], &kvm.dsn).into_iter().collect();
    // The interfaces of another computer cannot be checked.
    if kvm.needs_interface() {
        problems.extend(expect_interface(file, &["interface"], &kvm.interface).err());
        problems.extend(unusable_overlay_folder(kvm, file));
    }
    for machine in kvm.machines.iter() {
        let key = |key: &'static str| ["machines", &machine.name, key];
        problems.extend(machine.own.dsn.as_ref().and_then(|dsn| no_uri(file, &key("dsn"), dsn)));
        if let Some(interface) = machine.shared.interface.as_ref().filter(|_| is_local(kvm.dsn_of(machine))) {
            problems.extend(expect_interface(file, &key("interface"), interface).err());
        }
        if machine.own.label.is_empty() {
            problems.push(
                file.error(&key("label"), "the label is empty")
                    .advice("Give the domain's name; `virsh list --all` shows them"),
            );
        }
    }
    problems.extend(kvm.machines.duplicates(file, |machine| {
        vec![("ip", Some(&machine.shared.ip)), ("mac_address", machine.shared.mac_address.as_deref())]
    }));
    problems.extend(same_domains(kvm, file));
    problems
}

fn no_uri(file: &ConfigFile, key: &[&str], dsn: &str) -> Option<Error> {
    let reason = format!("'{dsn}' is not a URI of libvirt");
    (!dsn.contains("://"))
        .then(|| file.error(key, reason).advice("libvirt of this machine is qemu:///system"))
}

/// Reports domains that two machines have. A label is unique in its libvirt.
fn same_domains(kvm: &KvmFile, file: &ConfigFile) -> Vec<Error> {
    let mut seen = BTreeMap::new();
    let mut problems = Vec::new();
    for machine in kvm.machines.iter() {
        let label = &machine.own.label;
        if let Some(other) = seen.insert((kvm.dsn_of(machine), label), &machine.name) {
            let reason = format!("'{label}' is already the label of machine '{other}'");
            let error = file.error(&["machines", &machine.name, "label"], reason);
            problems.push(error.advice("Give each machine its own label"));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn setup(text: &str) -> Setup {
        Setup {
            config: ConfigFile { path: "/c/conf/machineries/kvm.yaml".into(), text: text.to_owned() },
            host_config: None,
            sockets_dir: "/none".into(),
            state_dir: "/none".into(),
            cache_dir: "/none".into(),
            adopts: false,
            result_server: None,
        }
    }

    const MACHINE: &str = "ip: 10.0.0.1, platform: Windows, os_version: 10";

    #[test]
    fn file_of_cuckoo_is_read() {
        let text = format!(
            "dsn: \"qemu:///system\"\ninterface: lo\nmachines:\n  win10:\n    label: win10x64\n    \
             snapshot:\n    mac_address:\n    interface:\n    architecture: amd64\n    agent_port: 8000\n    \
             ip: 10.0.0.1\n    platform: windows\n    os_version: \"10\"\n    tags:\n    \n  \
             two: {{label: two, snapshot: clean, {}}}\n",
            MACHINE.replace("0.1", "0.2")
        );
        let config = Config::read(&setup(&text)).unwrap();
        assert_eq!(config.dsn, "qemu:///system");
        let [Keys { info: one, .. }, Keys { info: two, .. }] = &config.machines[..] else {
            panic!("{} machines", config.machines.len())
        };
        assert_eq!((one.label.as_str(), &one.snapshot), ("win10x64", &None));
        assert_eq!(one.interface.as_deref(), Some("lo"));
        assert_eq!(two.snapshot.as_deref(), Some("clean"));
        assert_eq!(two.platform, "windows");
    }

    #[test]
    fn default_file_and_its_example_are_read() {
        let default = include_str!("../../../conf/machineries/kvm.yaml").replace("virbr0", "lo");
        assert_eq!(Config::read(&setup(&default)).unwrap().machines, []);
        let used = default.replace("machines: {}", "machines:");
        let lines = used.lines().filter(|line| !line.contains("An example"));
        let used: String = lines.map(|line| format!("{}\n", line.replacen("  # ", "  ", 1))).collect();
        let config = Config::read(&setup(&used)).unwrap();
        assert_eq!(config.machines[0].info.snapshot.as_deref(), Some("clean"));
    }

    #[test]
    fn error_contains_all_problems() {
        let text = format!(
            "dsn: ''\ninterface: none9\nmachines:\n  a: {{label: same, {MACHINE}}}\n  b: {{label: same, {MACHINE}}}\n  \
             c: {{label: ' ', {}}}\n",
            MACHINE.replace("0.1", "0.3")
        );
        let text = Config::read(&setup(&text)).err().unwrap().to_string();
        for words in [
            "kvm.yaml:1: dsn: '' is not a URI",
            "'none9' does not exist",
            "'same' is already the label of machine 'a'",
            "the ip of",
            "c.label: the label is empty",
        ] {
            assert!(text.contains(words), "no {words:?} in {text}");
        }
    }

    #[test]
    fn unknown_key_is_refused_with_its_line() {
        let text = format!("interface: lo\nmachines:\n  a: {{lable: x, label: y, {MACHINE}}}\n");
        let text = Config::read(&setup(&text)).err().unwrap().to_string();
        assert!(text.contains("lable") && text.contains("kvm.yaml:3"), "{text}");
    }

    #[test]
    fn interface_is_not_checked_when_libvirt_is_on_another_computer() {
        let text = |dsn: &str| format!("dsn: {dsn}\ninterface: none9\nmachines: {{}}\n");
        assert!(Config::read(&setup(&text("qemu+ssh://lab/system"))).is_ok());
        assert!(Config::read(&setup(&text("qemu:///system"))).is_err());
    }

    #[test]
    fn overlays_lie_beside_the_disk_unless_a_folder_is_configured() {
        let text = |keys: &str| format!("interface: lo\n{keys}machines:\n  a: {{label: y, {MACHINE}}}\n");
        let with_folder =
            |folder: &str| Config::read(&setup(&text(&format!("disposable_copy_dir: {folder}\n"))));
        let overlay = |folder: &str| with_folder(folder).unwrap().machines[0].image.overlay().to_owned();
        assert_eq!(overlay(""), Path::new("y_disposable.qcow2"));
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(overlay(folder.path().to_str().unwrap()), folder.path().join("y_disposable.qcow2"));
        for (folder, words) in
            [("here", "'here' is not an absolute path"), ("/none", "/none is not a folder")]
        {
            let text = with_folder(folder).err().unwrap().to_string();
            assert!(text.contains("kvm.yaml:2: disposable_copy_dir: ") && text.contains(words), "{text}");
        }
        let remote = text("dsn: qemu+ssh://lab/system\ndisposable_copy_dir: /none\n");
        assert!(Config::read(&setup(&remote)).is_ok());
    }

    #[test]
    fn machine_has_the_libvirt_that_it_names_or_else_that_of_the_machinery() {
        let machine = |number: u8| MACHINE.replace("0.1", &format!("0.{number}"));
        let text = format!(
            "dsn: qemu+ssh://lab/system\ninterface: none9\nmachines:\n  a: {{label: x, {}}}\n  \
             b: {{label: x, dsn: 'qemu:///system', interface: lo, {}}}\n",
            machine(1),
            machine(2)
        );
        let config = Config::read(&setup(&text)).unwrap();
        let [a, b] = &config.machines[..] else { panic!("not two machines") };
        assert_eq!((a.dsn.as_str(), b.dsn.as_str()), ("qemu+ssh://lab/system", "qemu:///system"));
        assert_eq!((&a.info.hypervisor, b.info.hypervisor.as_deref()), (&None, Some("qemu:///system")));
        assert_eq!(a.image.overlay(), Path::new("x_444d4355094bdf85_disposable.qcow2"));
        assert_eq!(b.image.overlay(), Path::new("x_disposable.qcow2"));
        assert!(a.image.is_off() && !b.image.is_off() && config.image_folder().is_some());
        assert_eq!(config.dsns(), ["qemu+ssh://lab/system", "qemu:///system"]);
        let unique =
            [a, b].map(|keys| keys.unique().into_iter().filter(|(key, _)| *key == "label").collect());
        let [a, b]: [Vec<_>; 2] = unique;
        assert!(a.iter().all(|label| !b.contains(label)), "{a:?} {b:?}");
        for (old, new, words) in [
            ("dsn: 'qemu:///system'", "dsn: here", "machines.b.dsn: 'here' is not a URI of libvirt"),
            ("dsn: 'qemu:///system', ", "", "machines.b.label: 'x' is already the label of machine 'a'"),
            ("dsn: 'qemu:///system', ", "dsn: 'qemu+ssh://lab/system', ", "'x' is already the label"),
            ("interface: lo", "interface: none8", "machines.b.interface: "),
            ("interface: lo, ", "", "interface: the network interface 'none9' does not exist"),
        ] {
            let text = Config::read(&setup(&text.replace(old, new))).err().unwrap().to_string();
            assert!(text.contains(words), "no {words:?} in {text}");
        }
        assert_eq!(Config::read(&setup("interface: lo\n")).unwrap().dsns(), ["qemu:///system"]);
    }

    fn setup_with_section(section: &str) -> Setup {
        let mut setup = setup(&format!("interface: lo\nmachines:\n  a: {{label: y, {MACHINE}}}\n"));
        let text = format!("machineries:\n  kvm:\n{section}");
        setup.host_config = Some(ConfigFile { path: "/c/conf/machinery-host.yaml".into(), text });
        setup
    }

    fn with_section(section: &str) -> Result<Config> {
        Config::read(&setup_with_section(section))
    }

    #[test]
    fn old_key_works_and_is_reported_with_its_new_name() {
        let config =
            with_section("    save_images: on\n    save_dir: /i\n    standby_memory: 1 GiB\n").unwrap();
        assert_eq!(config.instant, InstantMode::On);
        assert_eq!((config.instant_dir.to_str(), config.standby_memory_limit), (Some("/i"), Some(1 << 30)));
        for ((old, new), value) in RENAMED.iter().zip(["off", "/i", "1 GiB"]) {
            let text = format!("    {old}: {value}\n");
            assert!(with_section(&text).is_ok(), "{text}");
            let warnings = renamed_keys_of(&setup_with_section(&text));
            let [warning] = &warnings[..] else { panic!("{warnings:?}") };
            assert!(
                warning.contains(&format!("machinery-host.yaml:3: machineries.kvm.{old}: ")),
                "{warning}"
            );
            assert!(warning.contains(&format!("`{new}`")), "{warning}");
        }
        assert_eq!(renamed_keys_of(&setup_with_section("    instant: on\n")), [""; 0]);
    }

    #[test]
    fn standby_of_a_machine_overrides_the_section() {
        let standby = |section: &str| with_section(section).unwrap().machines[0].standby;
        assert_eq!(standby(""), Standby::Auto);
        assert_eq!(standby("    standby: on\n"), Standby::On);
        assert_eq!(standby("    standby: on\n    machines: {a: {standby: off}}\n"), Standby::Off);
        assert_eq!(standby("    standby: on\n    machines: {a: {}}\n"), Standby::On);
        assert_eq!(
            with_section("    standby_memory_limit: 2 GiB\n").unwrap().standby_memory_limit,
            Some(2 << 30)
        );
    }

    #[test]
    fn console_is_off_unless_the_section_or_the_machine_enables_it() {
        let console = |section: &str| with_section(section).unwrap().machines[0].info.console;
        assert!(!console("") && console("    console: true\n"));
        assert!(!console("    console: true\n    machines: {a: {console: false}}\n"));
        assert!(console("    machines: {a: {console: true}}\n"));
    }

    #[test]
    fn problem_in_the_section_is_refused_with_its_line() {
        for (section, words) in [
            ("    standby: perhaps\n", "machinery-host.yaml:3: machineries.kvm.standby: "),
            (
                "    instant_dir: here\n",
                "machinery-host.yaml:3: machineries.kvm.instant_dir: 'here' is not an absolute",
            ),
            (
                "    save_dir: here\n",
                "machinery-host.yaml:3: machineries.kvm.save_dir: 'here' is not an absolute",
            ),
            ("    instant: yes\n", "machinery-host.yaml:3: machineries.kvm.instant: "),
            (
                "    standby_memory_limit: much\n",
                "machinery-host.yaml:3: machineries.kvm.standby_memory_limit: ",
            ),
            (
                "    machines:\n      b: {standby: on}\n",
                "machineries.kvm.machines.b: kvm.yaml has no machine 'b'",
            ),
        ] {
            let text = with_section(section).err().unwrap().to_string();
            assert!(text.contains(words), "no {words:?} in {text}");
        }
    }
}
