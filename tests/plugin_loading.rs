//! Loading of plugins: each problem is one clear error, and the host does not start. Only a plugin that lacks
//! a shared library is left out, if others load.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::process::Command;

use machinery_testkit::artifacts;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::scratch::{ScratchCwd, double};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;

/// Asserts that `serve` and `check` fail, each with all of `words`. Returns the output of `serve`.
#[track_caller]
fn assert_refused(cwd: &ScratchCwd, words: &[&str]) -> String {
    let serve = host::run(cwd, &["serve"]).unwrap();
    let check = host::run(cwd, &["-v", "check"]).unwrap();
    assert_eq!(serve.code, Some(2), "{serve:?}");
    for word in words {
        assert!(serve.stderr.contains(word), "{word:?} is not in: {}", serve.stderr);
        assert!(check.stdout.contains(word), "{word:?} is not in what `check` says: {}", check.stdout);
    }
    assert_eq!(check.code, Some(2), "{check:?}");
    let errors = serve.stderr.lines().filter(|line| line.starts_with("error: ")).count();
    assert_eq!(errors, 1, "{}", serve.stderr);
    assert!(!serve.stderr.contains("panicked"), "{}", serve.stderr);
    assert!(!cwd.socket().exists());
    serve.stderr
}

/// Creates a CWD that lists one machinery, whose configuration is not read.
fn listing(name: &str) -> ScratchCwd {
    ScratchCwd::new(&[(name, "machines: {}\n")]).unwrap()
}

#[test]
fn missing_plugin_is_reported_with_searched_folders_and_available_plugins() {
    let cwd = listing("quantum");
    cwd.install_plugin("double").unwrap();
    let built = artifacts::folder().unwrap().display().to_string();
    let own = cwd.root().join("machineries").display().to_string();
    let words = ["'quantum'", "libmachinery_quantum.so", &built, &own, "double", "minimal", "--plugin-dir"];
    assert_refused(&cwd, &words);
}

#[test]
fn plugin_is_refused_when_it_is_a_text_file() {
    let cwd = listing("letter");
    let path = cwd.root().join("machineries/libmachinery_letter.so");
    cwd.write(&path, "Dear host, please run me.\n").unwrap();
    assert_refused(&cwd, &[path.to_str().unwrap(), "cannot be loaded as a shared library"]);
}

#[test]
fn plugin_is_refused_when_it_is_truncated() {
    let cwd = listing("cut");
    let mut plugin = fs::read(artifacts::plugin("double").unwrap()).unwrap();
    // Debugging information is at the end, so cutting that alone would have no effect.
    plugin.truncate(100_000);
    cwd.write("machineries/libmachinery_cut.so", plugin).unwrap();
    assert_refused(&cwd, &["libmachinery_cut.so"]);
}

/// Returns the double plugin with all of these bytes replaced by others of the same length.
fn double_with(old: &[u8], new: &[u8]) -> Vec<u8> {
    let mut plugin = fs::read(artifacts::plugin("double").unwrap()).unwrap();
    let at: Vec<_> = (0..plugin.len() - old.len()).filter(|at| plugin[*at..].starts_with(old)).collect();
    assert!(!at.is_empty(), "the double plugin has no {}", old.escape_ascii());
    for at in at {
        plugin[at..at + old.len()].copy_from_slice(new);
    }
    plugin
}

/// Puts a plugin `lacking` into the CWD, which needs a library that does not exist.
fn put_lacking(cwd: &ScratchCwd) {
    // The tables of needed libraries and of their versions share this text.
    let plugin = double_with(b"libgcc_s.so.1\0", b"libgcc_x.so.1\0");
    cwd.write("machineries/libmachinery_lacking.so", plugin).unwrap();
}

/// The words of its error.
const LACKING: [&str; 4] =
    ["libmachinery_lacking.so", "the shared library libgcc_x.so.1", "not installed", "Install the package"];

#[test]
fn host_serves_other_machineries_when_a_plugin_lacks_a_library() {
    let cwd = ScratchCwd::new(&[("lacking", &double(&[("lost", "")])), ("double", &double(&[("m", "")]))]);
    let cwd = cwd.unwrap();
    put_lacking(&cwd);
    let mut host = RunningHost::start(&cwd).unwrap();
    let log = host.log();
    let reported: Vec<_> = log.lines().filter(|line| line.contains("ERROR")).collect();
    assert_eq!(reported.len(), 1, "{log}");
    for word in LACKING.iter().chain(&["machinery=\"lacking\"", "left out", "start the host anew"]) {
        assert!(reported[0].contains(word), "{word:?} is not in: {}", reported[0]);
    }

    let list = host::run(&cwd, &["list"]).unwrap();
    assert_eq!(list.code, Some(0), "{list:?}");
    let names: Vec<_> = list.stdout.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(names, ["NAME", "m"], "{}", list.stdout);
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), json!({"success": true}));
    let lost = client.act("restore_start", "lost").unwrap();
    assert_eq!(lost, json!({"success": false, "reason": "Machine with name lost does not exist"}));
    assert!(host.terminate().unwrap().success());
}

#[test]
fn check_and_plugins_report_a_plugin_that_lacks_a_library() {
    let cwd = ScratchCwd::new(&[("lacking", ""), ("double", &double(&[("m", "")]))]).unwrap();
    put_lacking(&cwd);
    let check = host::run(&cwd, &["-v", "check"]).unwrap();
    let plugins = host::run(&cwd, &["plugins"]).unwrap();
    assert_eq!((check.code, plugins.code), (Some(2), Some(2)), "{check:?} {plugins:?}");
    for word in LACKING {
        assert!(check.stdout.contains(word), "{word:?} is not in what `check` says: {}", check.stdout);
        assert!(plugins.stderr.contains(word), "{word:?} is not in what `plugins` says: {}", plugins.stderr);
    }
    assert!(check.stdout.contains("1 problem,"), "{}", check.stdout);
    assert!(plugins.stdout.contains("double  "), "{}", plugins.stdout);
}

#[test]
fn serve_fails_when_its_only_plugin_lacks_a_library() {
    let cwd = listing("lacking");
    put_lacking(&cwd);
    assert_refused(&cwd, &LACKING);
}

#[test]
fn serve_reports_a_missing_library_beside_other_problems() {
    let machines = double(&[("m", "")]);
    let cwd = ScratchCwd::new(&[("lacking", ""), ("double", &machines), ("conflicting", "")]).unwrap();
    put_lacking(&cwd);
    cwd.install_plugin("conflicting").unwrap();
    let text = assert_refused(&cwd, &[&LACKING[..], &["cannot share a host"]].concat());
    assert!(text.contains("2 problems"), "{text}");
}

#[test]
fn plugin_is_refused_when_it_is_another_library() {
    let cwd = listing("stranger");
    // A library that this test is linked to.
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let library = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    let library = library.into_iter().find(|path| path.contains("/libgcc_s.so")).unwrap();
    let copy = cwd.install_plugin_file(library.as_ref(), "stranger").unwrap();
    assert_refused(&cwd, &[copy.to_str().unwrap(), "not a machinery plugin", "MACHINERY_INTERFACE"]);
}

#[test]
fn plugin_is_refused_when_its_interface_is_newer() {
    let cwd = listing("newer_interface");
    cwd.install_plugin("newer_interface").unwrap();
    // The library consists of its header, so any step after the version check would fail otherwise.
    let text =
        assert_refused(&cwd, &["libmachinery_newer_interface.so", "built for machinery interface 2.0"]);
    assert!(text.contains("this host speaks 1."), "{text}");
    assert!(!text.contains("MACHINERY_PLUGIN"), "{text}");
}

/// Returns the double plugin with another interface version in its header.
fn double_of(major: u32, minor: u32) -> Vec<u8> {
    let header = |major: u32, minor: u32| {
        [&b"cuckoo-machinery"[..], &major.to_ne_bytes(), &minor.to_ne_bytes()].concat()
    };
    let own = machinery::host::interface_version();
    let (own_major, own_minor) = own.split_once('.').unwrap();
    double_with(&header(own_major.parse().unwrap(), own_minor.parse().unwrap()), &header(major, minor))
}

#[test]
fn plugin_is_refused_when_its_minor_is_newer_or_its_major_is_older() {
    for (major, minor) in [(1, 1000), (0, 9)] {
        let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
        cwd.write("first/libmachinery_double.so", double_of(major, minor)).unwrap();
        // This folder is searched before the build folder.
        let mut command = Command::new(artifacts::program().unwrap());
        command.arg("--cwd").arg(cwd.root()).arg("--plugin-dir").arg(cwd.root().join("first")).arg("serve");
        let refused = host::run_command(command).unwrap();
        assert_eq!(refused.code, Some(2), "{refused:?}");
        let version = format!("built for machinery interface {major}.{minor}");
        assert!(refused.stderr.contains(&version), "{refused:?}");
    }
}

#[test]
fn configuration_error_has_file_line_key_and_value() {
    let good = double(&[("a", ""), ("b", "")]);
    for (change, by, place, words) in [
        ("ip: 10.0.0.2", "ip: 10.0.0.1", ":4: machines.b.ip: ", "'10.0.0.1'"),
        ("label: b-label", "label: b-label, colour: red", ":4: machines.b: ", "`colour`"),
        ("platform: linux", "agent_port: 70000, platform: linux", ":3: machines.a.agent_port: ", "70000"),
        ("interface: lo\n", "", "double.yaml", "interface"),
        ("machines:\n", "machines: [\n", "double.yaml:", ""),
        ("  b:", "  a:", ":4: machines.a: ", "twice"),
    ] {
        let cwd = ScratchCwd::new(&[("double", &good.replace(change, by))]).unwrap();
        let file = cwd.root().join("conf/machineries/double.yaml");
        assert_refused(&cwd, &[file.to_str().unwrap(), place, words]);
    }
}

#[test]
fn serve_names_the_file_when_a_configuration_is_missing() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let file = cwd.root().join("conf/machineries/double.yaml");
    fs::remove_file(&file).unwrap();
    assert_refused(&cwd, &[file.to_str().unwrap()]);
}

#[test]
fn machineries_are_refused_when_they_conflict() {
    let machines = double(&[("m", "")]);
    for order in [["double", "conflicting"], ["conflicting", "double"]] {
        let cwd = ScratchCwd::new(&[("double", &machines), ("conflicting", "")]).unwrap();
        cwd.install_plugin("conflicting").unwrap();
        cwd.list_machineries(&order).unwrap();
        let words = ["'double'", "'conflicting'", "cannot share a host", "the same machines in memory"];
        assert_refused(&cwd, &words);
    }
    let alone = ScratchCwd::new(&[("conflicting", "")]).unwrap();
    alone.install_plugin("conflicting").unwrap();
    RunningHost::start(&alone).unwrap();
}

#[test]
fn plugin_file_has_underscores_when_its_name_has_hyphens() {
    let yaml = "steps: 1\nmachines:\n  m: {ip: 10.9.0.1, platform: linux, os_version: 12}\n";
    let cwd = ScratchCwd::new(&[("twin-older", yaml)]).unwrap();
    let file = artifacts::plugin("twin-older").unwrap();
    assert!(file.ends_with("libmachinery_twin_older.so"), "{}", file.display());
    let host = RunningHost::start(&cwd).unwrap();
    let plugins = host::run(&cwd, &["--json", "plugins"]).unwrap();
    assert_eq!(plugins.code, Some(0), "{plugins:?}");
    assert!(plugins.stdout.contains("twin-older"), "{plugins:?}");
    // The plugin is listed, so it is not among the unlisted ones.
    assert_eq!(plugins.stdout.matches("libmachinery_twin_older.so").count(), 1, "{plugins:?}");
    drop(host);
}

#[test]
fn host_serves_several_machineries_when_they_do_not_conflict() {
    let other = "machines:\n  next: {ip: 10.9.0.1, platform: linux, os_version: 12}\n";
    let cwd = ScratchCwd::new(&[("minimal", other), ("double", &double(&[("m", "")]))]).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    for (machine, machinery) in [("next", "minimal"), ("m", "double")] {
        assert_eq!(client.act("restore_start", machine).unwrap(), json!({"success": true}));
        assert_eq!(client.machine(machine).unwrap()["machinery_name"], machinery);
    }
    let version = client.ask(json!({"action": "version"})).unwrap();
    assert_eq!(version["machineries"]["minimal"], "next door");
    // An unsupported action fails, and the machine stays enabled.
    assert_eq!(client.act("acpi_stop", "next").unwrap()["success"], false);
    assert_eq!(client.machine("next").unwrap()["disabled"], false);
}

/// Creates a CWD of two machineries that both have a machine `m`.
fn with_a_name_used_twice() -> ScratchCwd {
    let other = "machines:\n  m: {ip: 10.9.0.1, platform: linux, os_version: 12}\n";
    ScratchCwd::new(&[("double", &double(&[("m", "")])), ("minimal", other)]).unwrap()
}

#[test]
fn serve_fails_when_two_machineries_have_a_machine_of_the_same_name() {
    let cwd = with_a_name_used_twice();
    let refused = host::run(&cwd, &["serve"]).unwrap();
    assert_eq!(refused.code, Some(2), "{refused:?}");
    for word in ["'m'", "'double'", "'minimal'"] {
        assert!(refused.stderr.contains(word), "{refused:?}");
    }
}

#[test]
fn check_fails_when_two_machineries_have_a_machine_of_the_same_name() {
    let check = host::run(&with_a_name_used_twice(), &["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(2), "{}", check.stdout);
    assert!(check.stdout.contains("'m'"), "{}", check.stdout);
}

#[test]
fn machinery_name_is_refused_when_it_has_uppercase_letters() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    cwd.list_machineries(&["Double"]).unwrap();
    assert_refused(&cwd, &["cuckoo.yaml:2", "'Double'", "Write 'double'"]);
}

#[test]
fn plugin_is_refused_when_its_file_has_another_machinerys_name() {
    let cwd = listing("other");
    let copy = cwd.install_plugin_file(&artifacts::plugin("double").unwrap(), "other").unwrap();
    assert_refused(&cwd, &[copy.to_str().unwrap(), "holds the machinery 'double', not 'other'"]);
}

#[test]
fn serve_reports_all_plugin_problems_together() {
    let cwd = ScratchCwd::new(&[("quantum", ""), ("newer_interface", ""), ("letter", "")]).unwrap();
    cwd.write("machineries/libmachinery_letter.so", "no").unwrap();
    let text = assert_refused(&cwd, &["'quantum'", "interface 2.0", "libmachinery_letter.so"]);
    assert!(text.contains("3 problems"), "{text}");
}

#[test]
fn unlisted_plugins_are_not_opened() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    cwd.write("machineries/libmachinery_letter.so", "no").unwrap();
    // Opening the pipe blocks for ever.
    let pipe = cwd.root().join("machineries/libmachinery_pipe.so");
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let host = RunningHost::start(&cwd).unwrap();
    let maps = fs::read_to_string(format!("/proc/{}/maps", host.pid())).unwrap();
    assert!(maps.contains("libmachinery_double.so") && !maps.contains("libmachinery_minimal.so"), "{maps}");
    let plugins = host::run(&cwd, &["plugins"]).unwrap();
    assert_eq!(plugins.code, Some(0), "{plugins:?}");
    for name in ["letter", "pipe"] {
        let line = plugins.stdout.lines().find(|line| line.contains(name)).unwrap();
        assert!(line.contains("not opened"), "{line}");
    }
    assert_eq!(host::run(&cwd, &["-v", "check"]).unwrap().code, Some(0));
}

#[test]
fn plugin_folders_are_searched_in_order() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let built = artifacts::plugin("double").unwrap();
    for folder in ["given", "named", "machineries"] {
        cwd.write(format!("{folder}/libmachinery_double.so"), fs::read(&built).unwrap()).unwrap();
    }
    let opened = |given: &[&str], named: &str| {
        let mut command = Command::new(artifacts::program().unwrap());
        command
            .arg("--cwd")
            .arg(cwd.root())
            .env("CUCKOO_MACHINERY_PLUGINS", named)
            .args(["plugins", "--json"]);
        for folder in given {
            command.arg("--plugin-dir").arg(cwd.root().join(folder));
        }
        let ran = host::run_command(command).unwrap();
        let plugins: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        let path = plugins["listed"][0]["path"].as_str().unwrap().to_owned();
        path.strip_prefix(cwd.root().to_str().unwrap()).map_or(path.clone(), str::to_owned)
    };
    let named = format!("/none/such::{}", cwd.root().join("named").display());
    assert_eq!(opened(&["empty", "given"], &named), "/given/libmachinery_double.so");
    assert_eq!(opened(&[], &named), "/named/libmachinery_double.so");
    assert_eq!(opened(&[], ""), "/machineries/libmachinery_double.so");
    fs::remove_dir_all(cwd.root().join("machineries")).unwrap();
    assert_eq!(opened(&[], ""), built.display().to_string());
}

#[test]
fn check_verifies_tcpdump_and_the_socket_group() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let checked = |tcpdump: &str, code: i32| {
        cwd.write("conf/cuckoo.yaml", format!("machineries: [double]\ntcpdump: {tcpdump}\n")).unwrap();
        let checked = host::run(&cwd, &["-v", "check"]).unwrap();
        assert_eq!(checked.code, Some(code), "{checked:?}");
        checked.stdout
    };
    assert!(checked("{enabled: false}", 0).contains("traffic is not captured"));
    let missing = checked("{enabled: true, path: /none/tcpdump}", 2);
    assert!(missing.contains("cannot run /none/tcpdump") && missing.contains("Install tcpdump"), "{missing}");
    assert!(checked("{enabled: true, path: /bin}", 2).contains("cannot run /bin: it is no file"));
    assert!(checked("{enabled: true, path: /bin/sh}", 0).contains("/bin/sh"));
    cwd.host_yaml("socket_group: no-such-group-here\n").unwrap();
    let unknown = checked("{enabled: false}", 2);
    assert!(unknown.contains("no-such-group-here"), "{unknown}");
}
