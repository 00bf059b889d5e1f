use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use machinery::Report;
use serde_json::json;
use serde_yaml::Value;

use super::*;

const DEFAULT: &str = QEMU_DEFAULT;

/// Imports VMCloak's machines from these folders.
fn vmcloak(qemu_yaml: &Path, folders: &[PathBuf], check: Check<'_>) -> Result<Imported> {
    let source = Source::Vmcloak(vmcloak::Vmcloak { folders: folders.to_vec() });
    import(&Import { source, dry_run: false, is_strict: false }, qemu_yaml, check)
}

/// A scratch folder with a `qemu.yaml` and machine folders in it.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new(yaml: &str) -> Self {
        let scratch = Scratch(tempfile::tempdir().unwrap());
        fs::write(scratch.yaml(), yaml).unwrap();
        scratch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn yaml(&self) -> PathBuf {
        self.path("qemu.yaml")
    }

    fn text(&self) -> String {
        fs::read_to_string(self.yaml()).unwrap()
    }

    /// Makes a machine as VMCloak does. `change` overrides keys of its description; null removes a key.
    fn machine(&self, folder: &str, ip: &str, change: serde_json::Value) -> PathBuf {
        let path = self.path(folder);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("disk.qcow2"), "disk").unwrap();
        fs::write(path.join("memory.snapshot"), "memory").unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let mut machine = json!({
            "name": name, "ip": ip, "agent_port": 8000, "os_name": "windows", "os_version": "10",
            "architecture": "amd64", "bridge": "br0", "disk": "disk.qcow2", "tags": ["dotnet"],
            "memory_snapshot": "memory.snapshot", "start_args": ["-m", "2048"],
            "gateway": "192.168.30.1", "netmask": "255.255.255.0",
        });
        for (key, value) in change.as_object().unwrap() {
            machine[key] = value.clone();
        }
        let keys = machine.as_object_mut().unwrap();
        keys.retain(|_, value| !value.is_null());
        let info = json!({"vmcloak_version": "0.9", "machinery": "qemu", "machine": machine});
        fs::write(path.join("machineinfo.json"), info.to_string()).unwrap();
        path
    }

    fn import(&self, folders: &[PathBuf]) -> Result<Imported> {
        vmcloak(&self.yaml(), folders, &accept)
    }

    /// Imports `win10` and `win7` into a file and returns the new text.
    fn imported(yaml: &str) -> String {
        let scratch = Scratch::new(yaml);
        let folders = [two_machines(&scratch)];
        assert_eq!(scratch.import(&folders).unwrap().added, ["win10", "win7"], "{yaml:?}");
        scratch.text().replace(scratch.0.path().to_str().unwrap(), "/S")
    }

    /// Expects that the import fails and leaves the file unchanged.
    fn fails(&self, folders: &[PathBuf]) -> String {
        let before = self.text();
        let error = self.import(folders).unwrap_err().to_string();
        assert_eq!(self.text(), before);
        error
    }
}

/// A check that finds no problem.
fn accept(_: ConfigFile) -> Result<Report> {
    Ok(Report::default())
}

#[test]
fn machine_of_a_folder_is_refused_when_only_its_entry_causes_the_problem() {
    let scratch = Scratch::new("machines:\ninterface: none\n");
    let folder = two_machines(&scratch).join("win10");
    let import_folder = |check: Check<'_>| import(&Import::of_folder(&folder), &scratch.yaml(), check);
    let before = scratch.text();
    // The entry shifts the line of the problem that the file has already.
    let find = |key: &'static [&'static str]| {
        move |file: ConfigFile| {
            let mut report = Report::default();
            report.problem(&file.error(&["interface"], "there is no such bridge"));
            if file.text.contains("win10:") {
                key.iter().take(1).for_each(|_| report.problem(&file.error(key, "another machine has it")));
            }
            Ok(report)
        }
    };
    for key in [&["machines", "win10", "ip"][..], &["machines", "win10", "name"], &["machines", "other", "x"]]
    {
        let error = import_folder(&find(key)).unwrap_err().to_string();
        assert!(error.contains("another machine has it") && !error.contains("bridge"), "{error}");
        assert_eq!(scratch.text(), before);
    }
    assert!(import_folder(&|_| Err(Error::environment("there is no plugin"))).is_err());
    let imported = import_folder(&find(&[])).unwrap();
    assert!(imported.added == ["win10"] && imported.notes[0].contains("bridge"), "{imported:?}");
}

#[test]
fn import_is_refused_when_the_plugin_refuses_the_arguments() {
    let scratch = Scratch::new("machines:\n");
    let folders = [two_machines(&scratch)];
    let before = scratch.text();
    let finds = |key: &'static str| {
        move |file: ConfigFile| {
            assert!(file.text.contains("win10:") && file.text.contains("win7:"));
            let mut report = Report::default();
            report.problem(&file.error(&["machines", "win7", key], "it is refused"));
            Ok(report)
        }
    };
    let error = vmcloak(&scratch.yaml(), &folders, &finds("machineinfo_path")).unwrap_err().to_string();
    assert!(error.contains("win7") && error.contains("it is refused"), "{error}");
    assert_eq!(scratch.text(), before);
    // The bridge may be missing and the plugin not installed at the time of the import.
    let missing = |_| Err(Error::environment("there is no plugin"));
    assert_eq!(vmcloak(&scratch.yaml(), &folders[..], &missing).unwrap().added.len(), 2);
    fs::write(scratch.yaml(), before).unwrap();
    assert_eq!(vmcloak(&scratch.yaml(), &folders, &finds("interface")).unwrap().added.len(), 2);
}

/// Makes a folder of two machines.
fn two_machines(scratch: &Scratch) -> PathBuf {
    scratch.machine("vms/win10", "10.0.0.1", json!({"mac": "00:19:3C:CE:71:E2"}));
    scratch.machine("vms/win7", "10.0.0.2", json!({"os_version": 7, "tags": []}));
    scratch.path("vms")
}

/// Returns the text that an import of [`two_machines`] writes, with `outer` and `inner` indentation.
fn block(outer: &str, inner: &str, newline: &str) -> String {
    let lines = [
        "Owin10:",
        "Iqcow2_path: /S/vms/win10/disk.qcow2",
        "Isnapshot_path: /S/vms/win10/memory.snapshot",
        "Imachineinfo_path: /S/vms/win10/machineinfo.json",
        "Iip: \"10.0.0.1\"",
        "Iplatform: windows",
        "Ios_version: \"10\"",
        "Iarchitecture: amd64",
        "Iinterface: br0",
        "Iagent_port: 8000",
        "Imac_address: \"00:19:3c:ce:71:e2\"",
        "Itags: [dotnet]",
        "Owin7:",
        "Iqcow2_path: /S/vms/win7/disk.qcow2",
        "Isnapshot_path: /S/vms/win7/memory.snapshot",
        "Imachineinfo_path: /S/vms/win7/machineinfo.json",
        "Iip: \"10.0.0.2\"",
        "Iplatform: windows",
        "Ios_version: \"7\"",
        "Iarchitecture: amd64",
        "Iinterface: br0",
        "Iagent_port: 8000",
        "Itags: []",
    ];
    let indent = |line: &str| {
        let (first, rest) = line.split_at(1);
        format!("{}{rest}{newline}", if first == "O" { outer } else { inner })
    };
    lines.iter().map(|line| indent(line)).collect()
}

fn block2() -> String {
    block("  ", "    ", "\n")
}

#[test]
fn import_inserts_at_the_end_of_the_mapping_and_changes_nothing_else() {
    // `«»` marks the position of the new machines.
    for yaml in [
        "machines:\n«»",
        "machines:\n«»\n# the end\n",
        "interface: br0 # ours\n\nmachines:\n  old:\n    ip: 1.1.1.1\n    platform: linux\n    os_version: 8\n«»",
        "machines:\n  old:\n    ip: 1.1.1.1\n    platform: linux\n    os_version: 8\n  # new: later\n«»\n\n# x\nz: 1\n",
        "machines:\n  old: {ip: 1.1.1.1, platform: a, os_version: '8'}\n    # odd\n«»interface: br0\n",
        "machines: # all of them\n\n# not indented\n  old:\n    ip: 1.1.1.1\n    platform: a\n    os_version: 8\n    tags:\n    - a\n«»# end",
        "\"machines\" :\n  old:\n    ip: 1.1.1.1\n    platform: a\n    os_version: |\n      # 8\n«»\n\n",
        "---\nmachines:\n«»...\n",
        "a: |\n  machines:\n    b: 1\nmachines:\n«»c: 1\n",
    ] {
        assert_eq!(Scratch::imported(&yaml.replace("«»", "")), yaml.replace("«»", &block2()), "{yaml}");
    }
}

#[test]
fn import_fills_an_empty_mapping() {
    for (yaml, head, tail) in [
        ("machines: {}\n", "machines:\n", ""),
        ("machines: { }   # none yet\ninterface: br0\n", "machines:   # none yet\n", "interface: br0\n"),
        ("machines: null\n\nx: 1\n", "machines:\n", "\nx: 1\n"),
        ("x: 1\nmachines: ~", "x: 1\nmachines:\n", ""),
        ("x: 1\nmachines:", "x: 1\nmachines:\n", ""),
        ("x: 1", "x: 1\nmachines:\n", ""),
        ("# only this\n", "# only this\nmachines:\n", ""),
    ] {
        assert_eq!(Scratch::imported(yaml), format!("{head}{}{tail}", block2()), "{yaml}");
    }
}

#[test]
fn import_keeps_the_indentation_of_the_file() {
    let old = "machines:\n    old:\n      ip: 1.1.1.1\n      platform: a\n      os_version: 8\n";
    assert_eq!(Scratch::imported(old), format!("{old}{}", block("    ", "      ", "\n")));
    let old = "binaries:\n    a: b\nmachines:\n";
    assert_eq!(Scratch::imported(old), format!("{old}{}", block("    ", "        ", "\n")));
    let old = "machines:\n old:\n  ip: 1.1.1.1\n  platform: a\n  os_version: 8";
    assert_eq!(Scratch::imported(old), format!("{old}\n{}", block(" ", "  ", "\n")));
}

#[test]
fn import_keeps_windows_line_ends() {
    let old = "interface: br0\r\nmachines: {}\r\n";
    let new = format!("interface: br0\r\nmachines:\r\n{}", block("  ", "    ", "\r\n"));
    assert_eq!(Scratch::imported(old), new);
}

#[test]
fn import_starts_from_the_commented_default_when_the_file_is_empty_or_missing() {
    let new = Scratch::imported(" \n");
    assert!(new.starts_with(&DEFAULT[..DEFAULT.find("machines: {}").unwrap()]), "{new}");
    assert!(new.ends_with(&block2()), "{new}");

    let scratch = Scratch::new("");
    let deep = scratch.path("conf/machineries/qemu.yaml");
    vmcloak(&deep, &[two_machines(&scratch)], &accept).unwrap();
    assert_eq!(fs::read_to_string(&deep).unwrap(), scratch_text(&scratch, &new));
    assert_eq!(fs::metadata(&deep).unwrap().mode() & 0o077, 0o044 & !umask(&scratch));
}

fn scratch_text(scratch: &Scratch, text: &str) -> String {
    text.replace("/S", scratch.0.path().to_str().unwrap())
}

fn umask(scratch: &Scratch) -> u32 {
    let path = scratch.path("plain");
    fs::write(&path, "").unwrap();
    0o666 & !fs::metadata(&path).unwrap().mode()
}

#[test]
fn import_leaves_the_file_unchanged_when_it_cannot_be_edited() {
    for yaml in [
        "machines: {a: {ip: 1.1.1.1, platform: a, os_version: 8}}\n",
        "machines: {\n}\n",
        "{interface: br0}\n",
        "interface: br0\n...\n",
        "x: &all {a: {ip: 1.1.1.1, platform: a, os_version: 8}}\nmachines: *all\n",
        "machines:\n  old:\n    ip: 1.1.1.1\n    platform: a\n    os_version: |+\n      8\n\n\n",
        "machines:\r  old:\r    ip: 1.1.1.1\r    platform: a\r    os_version: 8\r",
    ] {
        let scratch = Scratch::new(yaml);
        let error = scratch.fails(&[two_machines(&scratch)]);
        assert!(error.contains("qemu.yaml") && error.contains("The file is as it was"), "{yaml}: {error}");
    }
}

#[test]
fn import_reports_the_line_when_the_machinery_could_not_read_the_file() {
    let scratch = Scratch::new("machines:\n  old:\n    platform: a\n    ip:\n");
    let error = scratch.fails(&[two_machines(&scratch)]);
    assert!(
        error.starts_with("import failed: ")
            && error.contains("qemu.yaml:4: machines.old.ip: a value is needed"),
        "{error}"
    );
    let scratch = Scratch::new("machines: [a]\n");
    assert!(scratch.fails(&[two_machines(&scratch)]).contains("qemu.yaml:1: machines: "));
}

#[test]
fn dry_run_returns_the_entries_and_writes_nothing() {
    let scratch = Scratch::new("machines:\n");
    let source = Source::Vmcloak(vmcloak::Vmcloak { folders: vec![two_machines(&scratch)] });
    let imported =
        import(&Import { source, dry_run: true, is_strict: false }, &scratch.yaml(), &accept).unwrap();
    assert_eq!((imported.added.len(), scratch.text().as_str()), (2, "machines:\n"));
    let entries = imported.dry_run.unwrap().replace(scratch.0.path().to_str().unwrap(), "/S");
    assert_eq!(entries, format!("machines:\n{}", block2()));
}

#[test]
fn second_import_changes_nothing() {
    let scratch = Scratch::new("machines:\n");
    let folder = two_machines(&scratch);
    scratch.import(std::slice::from_ref(&folder)).unwrap();
    let (text, inode) = (scratch.text(), fs::metadata(scratch.yaml()).unwrap().ino());
    let again = scratch.import(&[folder]).unwrap();
    assert_eq!(again.added, Vec::<String>::new());
    let skipped: Vec<_> = again.skipped.iter().map(|machine| machine.name.as_str()).collect();
    assert_eq!(skipped, ["win10", "win7"]);
    assert!(again.skipped[0].reason.contains("unchanged"));
    assert_eq!((scratch.text(), fs::metadata(scratch.yaml()).unwrap().ino()), (text, inode));
}

#[test]
fn equal_entry_in_another_notation_is_unchanged() {
    let scratch = Scratch::new("");
    let tags = json!({"tags": ["b", "a"], "mac": "AA:BB:CC:DD:EE:FF"});
    let folder = scratch.machine("win10", "10.0.0.1", tags);
    let yaml = "machines:\n  win10:\n    ip: 10.0.0.1\n    platform: Windows\n    os_version: 10\n    interface: br0\n    \
                mac_address: aa:bb:cc:dd:ee:ff\n    tags:\n    - a\n    - b\n    qcow2_path: /S/./win10/disk.qcow2\n    \
                snapshot_path: /S/win10/memory.snapshot\n    machineinfo_path: /S/win10/machineinfo.json\n";
    fs::write(scratch.yaml(), scratch_text(&scratch, yaml)).unwrap();
    let imported = scratch.import(&[folder]).unwrap();
    assert_eq!((imported.added.len(), imported.skipped.len()), (0, 1));
}

#[test]
fn import_is_refused_when_an_entry_differs() {
    let scratch = Scratch::new("machines:\n");
    scratch.import(&[two_machines(&scratch)]).unwrap();
    scratch.machine("vms/win10", "10.0.0.9", json!({"tags": ["office"], "mac": "00:19:3C:CE:71:E2"}));
    scratch.machine("vms/win11", "10.0.0.3", json!({}));
    let error = scratch.fails(&[scratch.path("vms")]);
    for expected in ["qemu.yaml:", "machine 'win10'", "another ip, tags", "Remove this entry"] {
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn import_is_refused_with_both_names_when_machines_share_a_value() {
    let old = "machines:\n  old:\n    ip: 10.0.0.2\n    platform: a\n    os_version: 8\n";
    let scratch = Scratch::new(old);
    let error = scratch.fails(&[two_machines(&scratch)]);
    assert!(error.contains("win7/machineinfo.json: machine.ip: '10.0.0.2' is"), "{error}");
    assert!(error.contains("'10.0.0.2' is already the ip of machine 'old'"), "{error}");

    let scratch = Scratch::new("machines:\n");
    scratch.machine("a", "10.0.0.1", json!({"mac": "aa:bb:cc:dd:ee:ff"}));
    scratch.machine("b", "10.0.0.1", json!({}));
    scratch.machine("c", "10.0.0.3", json!({"mac": "AA:BB:CC:DD:EE:FF"}));
    scratch.machine("d", "10.0.0.4", json!({"disk": "../a/disk.qcow2"}));
    scratch.machine("e/a", "10.0.0.5", json!({}));
    let folders = ["a", "b", "c", "d", "e"].map(|name| scratch.path(name));
    let error = scratch.fails(&folders);
    for expected in [
        "4 problems",
        "machine 'b': '10.0.0.1' is already the ip of machine 'a'",
        "c/machineinfo.json: machine.mac: ",
        "d/machineinfo.json: machine.disk: ",
        "a/machineinfo.json has the same name",
    ] {
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn import_reports_the_faults_of_each_folder_at_once() {
    let scratch = Scratch::new("machines:\n");
    let broken = scratch.machine("vms/a", "1.1.1.1", json!({"bridge": null, "start_args": null, "disk": ""}));
    scratch.machine("vms/b", "1.1.1.2", json!({}));
    fs::write(scratch.path("vms/b/machineinfo.json"), "{\n\"machine\": }").unwrap();
    scratch.machine("vms/c", "1.1.1.3", json!({"memory_snapshot": "gone"}));
    scratch.machine("vms/d", "1.1.1.4", json!({}));
    fs::write(scratch.path("vms/d/machineinfo.json"), "{\"machine\": []}").unwrap();
    let piped = scratch.machine("vms/e", "1.1.1.5", json!({"memory_snapshot": "pipe"}));
    assert!(std::process::Command::new("mkfifo").arg(piped.join("pipe")).status().unwrap().success());
    let error = scratch.fails(&[scratch.path("vms")]);
    for expected in [
        "5 problems",
        "a/machineinfo.json: machine: these keys are missing: bridge, disk, start_args",
        "b/machineinfo.json:2: this is not JSON",
        "c/machineinfo.json: machine.memory_snapshot: cannot read",
        "d/machineinfo.json: machine: there is no description",
        "pipe is not a file",
    ] {
        assert!(error.contains(expected), "{expected}: {error}");
    }
    fs::remove_file(broken.join("machineinfo.json")).unwrap();
}

#[test]
fn import_refuses_values_that_the_machinery_would_refuse() {
    for (change, expected) in [
        (json!({"name": "../x"}), "machine.name: '../x' cannot be"),
        (json!({"agent_port": 70000}), "machine.agent_port: '70000' is not a TCP port"),
        (json!({"mac": "nonsense"}), "machine.mac: 'nonsense' is not a MAC"),
        (json!({"os_version": 18.1}), "machine.os_version: 18.1 is not a text"),
        (json!({"tags": "dotnet"}), "machine.tags: \"dotnet\" is not a list"),
        (json!({"start_args": []}), "machine.start_args: this must be a list"),
        (json!({"disk": "."}), "machine.disk: "),
    ] {
        let scratch = Scratch::new("machines:\n");
        let error = scratch.fails(&[scratch.machine("m", "1.1.1.1", change.clone())]);
        assert!(error.contains(expected), "{change}: {error}");
    }
}

#[test]
fn imported_texts_stay_texts() {
    let scratch = Scratch::new("machines:\n");
    let odd = json!({"name": "10", "os_version": "18.10", "os_name": "NO", "agent_port": "8001",
        "tags": ["on", "a, b", "- x", "0x1", "é\"\\", "# y", 7, "1:30", "~"]});
    let folder = scratch.machine("odd: \"folder\" #1", "1.1.1.1", odd);
    scratch.import(&[folder]).unwrap();
    let text = scratch.text();
    let yaml: Value = serde_yaml::from_str(&text).unwrap();
    let machine = &yaml["machines"]["10"];
    assert_eq!(machine["os_version"], "18.10");
    assert_eq!(machine["platform"], "no");
    assert_eq!(machine["agent_port"], 8001);
    assert!(machine["qcow2_path"].as_str().unwrap().ends_with("/odd: \"folder\" #1/disk.qcow2"));
    assert_eq!(machine["tags"][4], "é\"\\");
    assert_eq!(machine["tags"][6], "7");
    for quoted in ["\"10\":", "platform: \"no\"", "\"on\"", "\"1:30\"", "\"~\"", "\"0x1\""] {
        assert!(text.contains(quoted), "{quoted}: {text}");
    }
}

#[test]
fn import_accepts_a_machine_folder_and_a_folder_of_machines() {
    let scratch = Scratch::new("machines:\n");
    let all = two_machines(&scratch);
    fs::create_dir(scratch.path("vms/half")).unwrap();
    fs::write(scratch.path("vms/file"), "").unwrap();
    // The folder of win10 is given twice, in two ways.
    let imported = scratch.import(&[all.join("win10"), all]).unwrap();
    assert_eq!(imported.added, ["win10", "win7"]);
    assert_eq!(imported.skipped.len(), 1);
    assert_eq!(imported.skipped[0].name, "half");

    let none = scratch.path("vms/half");
    let error = scratch.fails(&[none, scratch.path("gone")]);
    assert!(error.contains("there is no machineinfo.json in"), "{error}");
    assert!(error.contains("cannot look into the folder") && error.contains("gone"), "{error}");
}

#[test]
fn import_keeps_mode_and_link_and_leaves_no_other_file() {
    let scratch = Scratch::new("machines:\n");
    fs::set_permissions(scratch.yaml(), fs::Permissions::from_mode(0o640)).unwrap();
    let link = scratch.path("link.yaml");
    std::os::unix::fs::symlink("qemu.yaml", &link).unwrap();
    vmcloak(&link, &[two_machines(&scratch)], &accept).unwrap();
    assert!(link.is_symlink());
    assert!(scratch.text().contains("win10"));
    assert_eq!(fs::metadata(scratch.yaml()).unwrap().mode() & 0o777, 0o640);
    assert_eq!(fs::read_dir(scratch.0.path()).unwrap().count(), 3);
}

#[test]
fn import_fails_when_the_file_cannot_be_written() {
    let scratch = Scratch::new("");
    let error = vmcloak(Path::new("/proc/none/qemu.yaml"), &[two_machines(&scratch)], &accept)
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("import failed: cannot write /proc/none/qemu.yaml"), "{error}");
}

#[test]
fn default_file_and_its_example_are_valid() {
    let file = |text: String| ConfigFile { path: "qemu.yaml".into(), text };
    let known = file(DEFAULT.to_owned()).parse::<ExistingMachines>().unwrap();
    assert_eq!(known.machines.iter().count(), 0);
    let (head, example) = DEFAULT.split_once("machines: {}").unwrap();
    let example: Vec<&str> = example
        .lines()
        .skip_while(|line| !line.contains("# win10_1:"))
        .filter_map(|line| line.get(4..))
        .collect();
    let known =
        file(format!("{head}machines:\n  {}\n", example.join("\n  "))).parse::<ExistingMachines>().unwrap();
    let machines: Vec<_> = known.machines.into_iter().collect();
    assert_eq!((machines[0].name.as_str(), machines[0].shared.os_version.as_str()), ("win10_1", "10"));
}

#[test]
fn entry_is_removed_with_its_comments_and_all_other_text_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qemu.yaml");
    let others = (
        "# top\nmachines:\n  # the first\n  a: {ip: 10.0.0.1}\n",
        "  # of c\n  'c':\n    ip: x\n\n# end\nz: 1\n",
    );
    let text = format!("{}  \"b\":\n    # its address\n    ip: y\n\n{}", others.0, others.1);
    std::fs::write(&path, &text).unwrap();
    assert_eq!(remove(&path, "b").unwrap().0, text);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}{}", others.0, others.1));
    remove(&path, "c").unwrap();
    remove(&path, "a").unwrap();
    let left = std::fs::read_to_string(&path).unwrap();
    assert!(left.contains("# top\nmachines:\n  # the first\n") && left.ends_with("# end\nz: 1\n"), "{left}");
    assert!(remove(&path, "a").is_err());
    std::fs::write(&path, "machines: {a: {ip: x}}\n").unwrap();
    assert!(remove(&path, "a").is_err(), "the block is on one line");
}

#[test]
fn value_of_an_entry_is_replaced_and_its_comment_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kvm.yaml");
    let text = |snapshot: &str| {
        format!(
            "dsn: x\nmachines:\n  # the first\n  a:\n    snapshot: other\n  'b':\n    label: b\n    # which one\n    \
             snapshot: {snapshot} # of May\n    ip: y\nz: 1\n"
        )
    };
    std::fs::write(&path, text("\"clean\"")).unwrap();
    let changed = set(&path, "b", "snapshot", "clean-2").unwrap();
    assert_eq!(changed, (text("\"clean\""), text("clean-2")));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text("clean-2"));
    assert!(set(&path, "b", "tags", "x").unwrap_err().to_string().contains("has no line with its tags"));
    for other in ["machines: {b: {snapshot: x}}\n", "machines:\n  b: |\n    snapshot: x\n"] {
        std::fs::write(&path, other).unwrap();
        assert!(set(&path, "b", "snapshot", "y").is_err(), "{other}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), other);
    }
}
