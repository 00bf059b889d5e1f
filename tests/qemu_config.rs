//! A wrong configuration is reported by `check` and by `serve` alike, with file, line and key, and never as a
//! machine that fails later.
//!
//! The plugin's own tests cover the kinds of errors. These tests cover the whole way, from the file to the exit
//! code and the text on the terminal.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use machinery_testkit::guest::{DISK_PLACEHOLDER, Guest};
use machinery_testkit::lab::Lab;
use machinery_testkit::snapshot::SnapshotFormat;
use serde_json::{Value, json};

/// Options that `start_args` may not contain.
const REFUSED: [&str; 7] = ["incoming", "monitor", "qmp", "qmp-pretty", "loadvm", "no-shutdown", "snapshot"];

fn lab(names: &[&str]) -> Lab {
    let machines: Vec<_> = names.iter().map(|name| (*name, Guest::Micro, SnapshotFormat::Plain)).collect();
    Lab::new(&machines).unwrap()
}

/// Checks that `check` and `serve` report all of these words, and end with the exit code for a wrong
/// configuration.
#[track_caller]
fn assert_refused(lab: &Lab, words: &[impl AsRef<str>]) {
    let (check, serve) = (lab.run(&["-v", "check"]).unwrap(), lab.run(&["serve"]).unwrap());
    for (ran, said) in [(&check, &check.stdout), (&serve, &serve.stderr)] {
        assert_eq!(ran.code, Some(2), "{ran:?}");
        for word in words.iter().map(AsRef::as_ref) {
            assert!(said.contains(word), "{word:?} is not in {said}");
        }
    }
}

/// Checks that `check` reports these problems with their places, and that a host disables those machines for
/// them.
#[track_caller]
fn assert_unusable(lab: &Lab, problems: &[(&str, &str, impl AsRef<str>)]) {
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(2), "{check:?}");
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for (machine, place, reason) in problems {
        for word in [place, reason.as_ref()] {
            assert!(check.stdout.contains(word), "{word:?} is not in {}", check.stdout);
        }
        let machine = client.machine(machine).unwrap();
        let disabled = machine["disabled_reason"].as_str().unwrap();
        assert!(disabled.contains(reason.as_ref()), "{machine}");
    }
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
}

/// Checks that `check` reports no problem, and that a host starts.
#[track_caller]
fn assert_fine(lab: &Lab) {
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(0), "{check:?}");
    let mut host = lab.host().unwrap();
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
}

/// Returns the number of the first line of `qemu.yaml` with `text`, from 1.
fn line_of(lab: &Lab, text: &str) -> usize {
    lab.yaml().unwrap().lines().position(|line| line.contains(text)).unwrap() + 1
}

#[test]
fn configuration_of_the_lab_is_accepted() {
    assert_fine(&lab(&["m", "n"]));
}

#[test]
fn argument_is_refused_in_each_spelling() {
    // One machine for each option: all problems are reported at once.
    let lab = lab(&REFUSED);
    for (before, after) in [("-", ""), ("--", ""), ("-", "=x"), ("--", "=x,y=z")] {
        let spelt = |name: &str| format!("{before}{name}{after}");
        for name in REFUSED {
            lab.change_start_args(name, |args| args.push(spelt(name))).unwrap();
        }
        let problems = REFUSED.map(|name| {
            let path = lab.folder(name).machineinfo.display();
            (name, "", format!("{path}: start_args holds '{}', which is not allowed: ", spelt(name)))
        });
        assert_unusable(&lab, &problems);
    }
}

#[test]
fn qmp_monitor_is_refused_when_mon_or_readconfig_brings_it_in() {
    let lab = lab(&["mon", "readconfig"]);
    let file = lab.cwd().root().join("monitor.cfg");
    fs::write(&file, "[mon \"m\"]\n  mode = \"control\"\n  chardev = \"c\"\n").unwrap();
    lab.change_start_args("mon", |args| args.extend(["-mon", "c,mode=control"].map(str::to_owned))).unwrap();
    lab.change_start_args("readconfig", |args| {
        args.extend(["-readconfig".to_owned(), file.display().to_string()]);
    })
    .unwrap();
    let by_file = file.display().to_string();
    let problems = [("mon", "brings in a QMP monitor by '-mon c,mode=control'"), ("readconfig", &by_file)];
    assert_unusable(&lab, &problems.map(|(machine, problem)| (machine, "", problem)));
}

#[test]
fn argument_is_accepted_when_it_only_resembles_a_refused_one() {
    let near = [
        "-name",
        "/vms/win10-snapshot/x",
        "-device",
        "virtio-serial,id=a-monitor",
        "-append",
        "file=/x/-incoming,format=raw",
        "-incomingx",
        "x",
        "-snapshot-not",
        "snapshot",
        "-name=qmp",
        "-monitors",
    ];
    let lab = lab(&["m"]);
    lab.change_start_args("m", |args| args.extend(near.map(str::to_owned))).unwrap();
    lab.accept_unsafe_args("m").unwrap();
    assert_fine(&lab);
}

#[test]
fn machine_is_unusable_when_its_start_args_are_no_arguments() {
    let lab = lab(&["m"]);
    let path = &lab.folder("m").machineinfo;
    let args = |args: Value| json!({"machine": {"start_args": args}}).to_string();
    for (info, problem) in [
        (args(json!(["-m", "32", "-drive", "file=/own/disk.qcow2"])), DISK_PLACEHOLDER),
        (args(json!("-m 32")), "start_args is a single text, and has to be a list"),
        (args(json!([])), "start_args is an empty list"),
        (args(json!({"m": 32})), "start_args is a mapping"),
        (args(json!(["-m", ["32"]])), "start_args holds [\"32\"], which is no argument"),
        (args(json!(["/usr/bin/qemu-system-x86_64", DISK_PLACEHOLDER])), "without the binary"),
        (json!({"machine": {}}).to_string(), "the key machine.start_args is missing"),
        ("{\"machine\":\n  {\"start_args\": [,]}}".to_owned(), "not JSON: expected value at line 2"),
    ] {
        fs::write(path, info).unwrap();
        let place =
            format!("qemu.yaml:{}: machines.m.machineinfo_path: ", line_of(&lab, "machineinfo_path:"));
        assert_unusable(&lab, &[("m", &place, problem), ("m", "", &format!("{}: ", path.display()))]);
    }
}

#[test]
fn wrong_yaml_is_reported_with_its_line_and_key() {
    let lab = lab(&["m"]);
    let m = lab.folder("m");
    let path = |file: &Path| file.display().to_string();
    let whole = lab.yaml().unwrap();
    // The old text, the new text, the reported key if it is known, and the reported problem.
    for (old, new, key, problem) in [
        ("interface: lo", "interface: lo: lo", "", "mapping values are not allowed in this context"),
        ("interface: lo", "interface: lo\ncolour: red", "", "unknown key `colour`"),
        ("    ip:", "    colour: red\n    ip:", "machines.m", "unknown key `colour`"),
        ("interface: lo", "interface: br-none", "interface", "interface 'br-none' does not exist"),
        (
            "    ip:",
            "    architecture: arm64\n    ip:",
            "machines.m.architecture",
            "'arm64' is not supported",
        ),
        ("    ip:", "    agent_port: 0\n    ip:", "machines.m.agent_port", "0 is not a TCP port"),
        (&path(&m.disk), "disk.qcow2", "machines.m.qcow2_path", "disk.qcow2 is not an absolute path"),
        (&path(&lab.qemu().system), "/none", "binaries.qemu_system_x86_64", "/none is not a program"),
        (&path(&lab.qemu().img), "/none", "binaries.qemu_img", "/none is not a program"),
        (
            "disposable_copy_dir:",
            "disposable_copy_dir: /none",
            "disposable_copy_dir",
            "/none is not a folder",
        ),
    ] {
        lab.write_yaml(&whole).unwrap();
        lab.change_yaml(old, new).unwrap();
        let changed = lab.yaml().unwrap();
        let line = whole.lines().zip(changed.lines()).position(|(old, new)| old != new).unwrap() + 1;
        let place = format!("qemu.yaml:{line}: {key}");
        assert_refused(&lab, &[place.trim_end(), problem]);
    }
    lab.write_yaml(&whole).unwrap();
    assert_fine(&lab);
}

#[test]
fn machine_is_unusable_when_one_of_its_files_is_wrong() {
    let lab = lab(&["m"]);
    let m = lab.folder("m");
    let path = |file: &Path| file.display().to_string();
    let whole = lab.yaml().unwrap();
    for (old, new, key, problem) in [
        ("    ip:", "    interface: br-none\n    ip:", "interface", "'br-none' does not exist"),
        (&path(&m.disk), "/none", "qcow2_path", "cannot open the image /none: No such file"),
        (&path(&m.disk), "/etc/passwd", "qcow2_path", "/etc/passwd is not a qcow2 disk"),
        (&path(&m.snapshot), "/none", "snapshot_path", "cannot read the snapshot /none: No such"),
        (&path(&m.snapshot), "/etc/passwd", "snapshot_path", "so it is no memory snapshot"),
        (&path(&m.machineinfo), "/none", "machineinfo_path", "read the machineinfo /none: No such"),
    ] {
        lab.write_yaml(&whole).unwrap();
        lab.change_yaml(old, new).unwrap();
        let changed = lab.yaml().unwrap();
        let line = whole.lines().zip(changed.lines()).position(|(old, new)| old != new).unwrap() + 1;
        assert_unusable(&lab, &[("m", &format!("qemu.yaml:{line}: machines.m.{key}: "), problem)]);
    }
}

#[test]
fn other_machines_are_served_when_one_has_lost_its_files() {
    let lab = lab(&["m", "n"]);
    let n = lab.folder("n");
    let away = |file: &Path| file.with_extension("away");
    for file in [&n.disk, &n.snapshot, &n.machineinfo] {
        fs::rename(file, away(file)).unwrap();
    }
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    let done = json!({"success": true});
    assert_eq!(client.act("restore_start", "m").unwrap(), done);
    let reason = client.machine("n").unwrap()["disabled_reason"].as_str().unwrap().to_owned();
    for file in [&n.disk, &n.snapshot, &n.machineinfo] {
        assert!(reason.contains(&file.display().to_string()), "{reason}");
    }
    for action in ["restore_start", "norestore_start", "prepare", "enable_machine"] {
        assert_eq!(client.act(action, "n").unwrap()["success"], false, "{action}");
    }
    for file in [&n.disk, &n.snapshot, &n.machineinfo] {
        fs::rename(away(file), file).unwrap();
    }
    assert_eq!(client.act("enable_machine", "n").unwrap(), done);
    assert_eq!(client.act("restore_start", "n").unwrap(), done);
    assert_eq!(client.act("stop", "n").unwrap(), done);
    fs::rename(&n.snapshot, away(&n.snapshot)).unwrap();
    assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true);
    assert_eq!(client.machine("n").unwrap()["disabled"], true);
    fs::rename(away(&n.snapshot), &n.snapshot).unwrap();
    assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true);
    assert_eq!(client.act("restore_start", "n").unwrap(), done);
    for machine in ["m", "n"] {
        assert_eq!(client.act("stop", machine).unwrap(), done);
    }
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
    lab.assert_clean();
}

#[test]
fn machine_is_unusable_when_the_base_of_its_disk_is_gone() {
    let lab = lab(&["m"]);
    let m = lab.folder("m");
    let base = m.dir.join("base.qcow2");
    fs::rename(&m.disk, &base).unwrap();
    let options = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
    let made = Command::new(&lab.qemu().img).args(options).args([&base, &m.disk]).status().unwrap();
    assert!(made.success());
    assert_fine(&lab);
    fs::rename(&base, m.dir.join("away")).unwrap();
    assert_unusable(&lab, &[("m", "machines.m.qcow2_path: ", base.display().to_string())]);
    fs::rename(m.dir.join("away"), &base).unwrap();
    assert_fine(&lab);
}

#[test]
fn second_machine_is_refused_when_two_share_a_value() {
    let lab = lab(&["m", "n"]);
    let (m, n) = (lab.folder("m"), lab.folder("n"));
    let path = |file: &Path| file.display().to_string();
    let whole = lab.yaml().unwrap();
    for (theirs, ours, key) in [
        (&n.ip, &m.ip, "ip"),
        (&path(&n.disk), &path(&m.disk), "qcow2_path"),
        (&path(&n.snapshot), &path(&m.snapshot), "snapshot_path"),
        (&path(&n.machineinfo), &path(&m.machineinfo), "machineinfo_path"),
    ] {
        lab.write_yaml(&whole.replace(theirs, ours)).unwrap();
        assert_refused(
            &lab,
            &[&format!("machines.n.{key}: "), &format!("is already the {key} of machine 'm'")],
        );
    }
    let macs = ["AA:BB:CC:DD:EE:FF", "aa:bb:cc:dd:ee:ff"].map(|mac| format!("\n    mac_address: {mac}"));
    let with_mac = |yaml: &str, ip: &str, mac: &str| yaml.replace(ip, &format!("{ip}{mac}"));
    lab.write_yaml(&with_mac(&with_mac(&whole, &m.ip, &macs[0]), &n.ip, &macs[1])).unwrap();
    assert_refused(&lab, &["'aa:bb:cc:dd:ee:ff' is already the mac_address of machine 'm'"]);
    lab.write_yaml(&whole.replace("  n:\n", "  m:\n")).unwrap();
    assert_refused(&lab, &["machines.m: ", "this machine's name is given twice"]);
}

#[test]
fn disk_is_refused_and_kept_when_it_is_at_the_path_of_an_overlay() {
    let lab = lab(&["m", "n"]);
    // An operator may use a kept overlay as the disk of a new machine.
    let kept = lab.disposable("m");
    let disk = &lab.folder("n").disk;
    fs::rename(disk, &kept).unwrap();
    lab.change_yaml(&disk.display().to_string(), &kept.display().to_string()).unwrap();
    assert_refused(&lab, &["machines.n.qcow2_path: ", "is where an overlay of machine 'm' goes"]);
    assert!(kept.exists());
    fs::rename(&kept, disk).unwrap();
}

#[test]
fn program_is_refused_when_it_is_an_old_qemu_or_none() {
    for (version, problem) in [
        ("2.10.1", "is QEMU 2.10.1, and 2.11.0 is the oldest that works"),
        ("unknown", "does not report a version: QEMU emulator version unknown"),
    ] {
        let lab = lab(&["m"]);
        lab.fake_qemu(version, "exit 1").unwrap();
        assert_refused(&lab, &["binaries.qemu_system_x86_64: ", problem]);
    }
}

#[test]
fn problems_are_reported_at_once_when_there_are_several() {
    let lab = lab(&["m", "n"]);
    lab.change_yaml("interface: lo", "interface: br-none").unwrap();
    lab.change_yaml(&lab.folder("m").snapshot.display().to_string(), "none/snapshot").unwrap();
    lab.change_yaml(&lab.folder("n").ip, &lab.folder("m").ip).unwrap();
    lab.change_start_args("n", |args| args.push("-snapshot".to_owned())).unwrap();
    assert_refused(&lab, &["'br-none'", "none/snapshot is not", "is already the ip of machine 'm'"]);
    assert!(
        lab.run(&["-v", "check"]).unwrap().stdout.contains("'-snapshot'"),
        "the problem of one machine is missing"
    );
}

#[test]
fn machine_starts_when_its_name_has_the_maximum_length() {
    let names = ["n".repeat(100), "ж".repeat(50)];
    let lab = lab(&names.each_ref().map(String::as_str));
    assert_eq!(lab.run(&["-v", "check"]).unwrap().code, Some(0));
    let mut host = lab.host().unwrap();
    let mut client = host.client().unwrap();
    for name in &names {
        for action in ["restore_start", "stop"] {
            assert_eq!(client.act(action, name).unwrap(), json!({"success": true}), "{action} of {name}");
        }
    }
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
    lab.assert_clean();
}

#[test]
fn values_are_normalized_when_they_are_read() {
    let lab = lab(&["m", "n"]);
    lab.change_yaml("platform: windows", "platform: WINDOWS").unwrap();
    lab.change_yaml("    ip:", "    architecture: X86\n    mac_address: AA:BB:CC:DD:EE:FF\n    ip:").unwrap();
    let host = lab.host().unwrap();
    let m = host.client().unwrap().machine("m").unwrap();
    let read = ["platform", "os_version", "architecture", "mac_address"].map(|key| &m[key]);
    assert_eq!(read, ["windows", "10", "x86", "aa:bb:cc:dd:ee:ff"]);
    assert_eq!((&m["agent_port"], &m["interface"]), (&json!(8000), &json!("lo")));
    let n = host.client().unwrap().machine("n").unwrap();
    assert_eq!((&n["architecture"], &n["mac_address"]), (&json!("amd64"), &Value::Null));
}

#[test]
fn values_are_read_as_cuckoo_reads_them() {
    let lab = lab(&["m"]);
    let quoted = |file: &Path| format!("' {} '", file.display());
    lab.change_yaml("interface: lo", "interface: ' lo '").unwrap();
    for file in [&lab.folder("m").disk, &lab.folder("m").snapshot, &lab.qemu().img] {
        lab.change_yaml(&file.display().to_string(), &quoted(file)).unwrap();
    }
    lab.change_yaml("    ip:", "    agent_port: '8001'\n    ip:").unwrap();
    lab.cwd().change_cuckoo_yaml("machineries:\n- qemu", "machineries: qemu").unwrap();
    lab.cwd().change_cuckoo_yaml("enabled: false", "enabled: 'off'").unwrap();
    lab.cwd().change_cuckoo_yaml("listen_port: 2042", "listen_port: '2042'").unwrap();
    assert_fine(&lab);
    let host = lab.host().unwrap();
    let m = host.client().unwrap().machine("m").unwrap();
    assert_eq!((&m["agent_port"], &m["interface"]), (&json!(8001), &json!("lo")));
    assert_eq!(m["label"], lab.folder("m").disk.to_str().unwrap());
}

#[test]
fn check_names_each_value_when_cuckoo_reads_it_differently() {
    let lab = lab(&["m"]);
    let keys = "    mac_address: 52:54:00:00:01:01\n    architecture:\n    ip:";
    lab.change_yaml("    ip:", keys).unwrap();
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(2), "{check:?}");
    let line = line_of(&lab, "mac_address:");
    for problem in [
        format!("qemu.yaml:{line}: machines.m.mac_address: Cuckoo3 reads 52:54:00:00:01:01 as 41135040061"),
        "machines.m.architecture: Cuckoo3 refuses an empty value".to_owned(),
    ] {
        assert!(check.stdout.contains(&problem), "{problem:?} is not in {}", check.stdout);
    }
    // The host itself parses the text.
    let host = lab.host().unwrap();
    assert_eq!(host.client().unwrap().machine("m").unwrap()["mac_address"], "52:54:00:00:01:01");
}

#[test]
fn example_machine_of_cuckoos_default_file_comes_with_the_advice_to_remove_it() {
    let lab = lab(&["m"]);
    lab.change_yaml("  m:\n", "  example1:\n").unwrap();
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(0), "{check:?}");
    assert!(check.stdout.contains("cuckoo machine delete qemu example1"), "{check:?}");
    let mut host = lab.host().unwrap();
    assert!(host.log().contains("cuckoo machine delete qemu example1"), "{}", host.log());
    host.terminate().unwrap();
    // A file with an error keeps the host from starting.
    lab.change_yaml("interface: lo", "interface: br-none").unwrap();
    assert_refused(&lab, &["'br-none'", "cuckoo machine delete qemu example1"]);
}

#[test]
fn check_tries_kvm_and_bridges_when_arguments_need_them() {
    let lab = lab(&["m", "n"]);
    for name in ["m", "n"] {
        let more = ["-accel", "kvm", "-netdev", "bridge,id=b,br=br-none"].map(str::to_owned);
        lab.change_start_args(name, |args| args.extend(more)).unwrap();
    }
    let refuses = "case \"$*\" in *'-accel kvm'*) echo no module >&2; exit 1;; esac";
    lab.fake_qemu("7.2.0", &format!("{refuses}\nexec {} \"$@\"", lab.qemu().system.display())).unwrap();
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(2), "{check:?}");
    for problem in [
        "KVM cannot be used, which machines 'm', 'n' need: no module",
        "-netdev bridge,id=cuckoo-check,br=br-none cannot be used, which machines 'm', 'n' need: ",
        "bridge.conf",
    ] {
        assert!(check.stdout.contains(problem), "{problem:?} is not in {}", check.stdout);
    }
    lab.assert_clean();
}

#[test]
fn check_and_list_warn_when_a_file_that_arguments_name_is_missing() {
    let lab = lab(&["m"]);
    lab.change_start_args("m", |args| args.extend(["-cdrom", "tools.iso"].map(str::to_owned))).unwrap();
    let missing = format!("{}, which does not exist", lab.folder("m").dir.join("tools.iso").display());
    let check = lab.run(&["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(0), "{check:?}");
    let host = lab.host().unwrap();
    let listed = host.client().unwrap().machine("m").unwrap()["warnings"].to_string();
    for said in [&check.stdout, &listed] {
        assert!(said.contains(&missing) && said.contains("Write an absolute path"), "{said}");
    }
    fs::write(lab.folder("m").dir.join("tools.iso"), "iso").unwrap();
    assert!(!lab.run(&["-v", "check"]).unwrap().stdout.contains("does not exist"));
}
