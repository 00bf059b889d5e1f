//! The stability of the interface: installed plugins still load, plugins of a newer interface are refused
//! without running their code, and the compiler of a plugin does not matter.
//!
//! `tests/interfaces` has the released interfaces. Their builds are kept for the next run of these tests.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::artifacts;
use machinery_testkit::conformance::{self, BackendSpec};
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::separate_build::{SeparateBuild, other_toolchain};
use serde_json::json;
use sha2::{Digest, Sha256};

/// The oldest supported compiler.
const OLDEST_RUSTC: &str = env!("CARGO_PKG_RUST_VERSION");

const MACHINES: &str = "machines:\n  \
    m: {label: one, ip: 10.0.0.1, platform: linux, os_version: 12}\n  \
    n: {label: two, ip: 10.0.0.2, platform: linux, os_version: 12}\n";

fn interfaces() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("interfaces")
}

/// Builds interface 1.0 with its plugin and its host: optimised, unlike today's plugins, and with another
/// compiler if there is one.
fn of_1_0() -> PathBuf {
    let build = SeparateBuild::of(&interfaces().join("1.0/Cargo.toml"), "interface-1.0").release();
    let build = match other_toolchain(OLDEST_RUSTC).unwrap() {
        Some(toolchain) => build.with(&toolchain),
        None => build,
    };
    build.build(&["--workspace", "--locked"]).unwrap()
}

/// Creates a CWD with the plugin of interface 1.0, which has an allocator of its own.
fn elder() -> ScratchCwd {
    let cwd = ScratchCwd::new(&[("elder", MACHINES)]).unwrap();
    cwd.install_plugin_file(&of_1_0().join("libmachinery_elder.so"), "elder").unwrap();
    cwd.host_yaml("machineries: {elder: {motto: as ever}}\n").unwrap();
    cwd
}

#[test]
fn interface_1_0_plugin_supports_all_its_actions() {
    let cwd = elder();
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    client.subscribe().unwrap();
    let dump = cwd.root().join("dump");
    let path = dump.to_str().unwrap();
    for _ in 0..100 {
        assert_eq!(client.act("restore_start", "m").unwrap(), json!({"success": true}));
        assert_eq!(client.machine("m").unwrap()["state"], "running");
        assert_eq!(client.act("stop", "m").unwrap(), json!({"success": true}));
    }
    assert_eq!(client.act("norestore_start", "n").unwrap(), json!({"success": true}));
    let dumped = client.ask(json!({"action": "dump_memory", "machine": "n", "path": path})).unwrap();
    assert_eq!(
        (dumped["success"].clone(), fs::read_to_string(&dump).unwrap()),
        (json!(true), "n".to_owned())
    );
    assert_eq!(client.wait_for_event("progress", "n").unwrap()["fraction"], 0.5);
    let missing = client.act("screenshot", "n").unwrap();
    assert_eq!(missing["success"], false, "{missing}");
    let refused = client.ask(json!({"action": "screenshot", "machine": "n", "path": path})).unwrap();
    assert!(refused["reason"].as_str().unwrap().contains("does not support screenshot"), "{refused}");
    assert_eq!(client.act("acpi_stop", "n").unwrap(), json!({"success": true}));
    assert_eq!(client.act("prepare", "n").unwrap(), json!({"success": true}));
    let ready = &client.machine("n").unwrap()["ready"];
    assert_eq!((&ready["mode"], &ready["reason"]), (&json!("instant"), &json!("as ready as ever")));
    let metrics = client.ask(json!({"action": "metrics"})).unwrap().to_string();
    assert!(metrics.contains("\"wake\""), "{metrics}");
    // The host prepares machines automatically, also those of interface 1.0.
    assert!(
        host.log().contains("action=\"prepare\"") && !host.log().contains("not prepared"),
        "{}",
        host.log()
    );
    assert!(host.log().contains("as in the old days") && host.log().contains("as ever"), "{}", host.log());
    assert_eq!(host.terminate().unwrap().code(), Some(0), "{}", host.log());
}

#[test]
fn interface_1_0_plugin_stays_usable_when_newer_features_are_requested() {
    let cwd = elder();
    let host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), json!({"success": true}));
    // The configuration is unchanged, so the plugin need not support a reload.
    assert_eq!(client.ask(json!({"action": "reload"})).unwrap()["success"], true);
    cwd.write_yaml("elder", &MACHINES.replace("10.0.0.2", "10.0.0.3")).unwrap();
    let refused = client.ask(json!({"action": "reload"})).unwrap();
    let reason = refused["reason"].as_str().unwrap();
    for word in ["'elder'", "does not support", "Restart the host"] {
        assert!(reason.contains(word), "{reason}");
    }
    assert_eq!(client.machine("n").unwrap()["ip"], "10.0.0.2");
    assert_eq!(client.machine("m").unwrap()["state"], "running");
}

#[test]
fn interface_1_0_plugin_meets_all_requirements() {
    let cwd = elder();
    let file = cwd.root().join("machineries/libmachinery_elder.so");
    let program = artifacts::program().unwrap();
    let spec = BackendSpec::new(&["m", "n"]).host_program(program, conformance::HOST_PROCESS);
    let report = conformance::run(&file, &cwd.setup("elder").unwrap(), &spec);
    assert!(report.passed(), "{report}");
    // Interface 1.0 did not say what a dump contains.
    let noted = report.checks().iter().filter(|check| !check.notes.is_empty());
    let noted: Vec<&str> = noted.map(|check| check.name.as_str()).collect();
    assert_eq!(noted, ["dump_memory"], "{report}");
}

#[test]
fn commands_show_the_interface_version_of_a_plugin() {
    let cwd = elder();
    let plugins = host::run(&cwd, &["plugins", "--json"]).unwrap();
    let plugins: serde_json::Value = serde_json::from_str(&plugins.stdout).unwrap();
    let listed = &plugins["listed"][0];
    assert_eq!((&listed["name"], &listed["interface"]), (&json!("elder"), &json!("1.0")), "{plugins}");
    let check = host::run(&cwd, &["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(0), "{check:?}");
    assert!(check.stdout.contains("2 machines of the old kind"), "{}", check.stdout);
}

#[test]
fn interface_1_0_host_names_both_versions_when_it_refuses_a_newer_plugin() {
    let old = of_1_0().join("elder-host");
    let mut command = Command::new(&old);
    command.arg(artifacts::plugin("double").unwrap());
    let refused = host::run_command(command).unwrap();
    assert_eq!(refused.code, Some(1), "{refused:?}");
    let today = format!("interface {}", machinery::host::interface_version());
    for words in [today.as_str(), "speaks 1.0"] {
        assert!(refused.stdout.contains(words), "{refused:?}");
    }
    let mut command = Command::new(old);
    command.arg(of_1_0().join("libmachinery_elder.so"));
    assert_eq!(host::run_command(command).unwrap().code, Some(0), "it takes those of its own time");
}

#[test]
fn host_runs_no_code_of_a_plugin_when_its_interface_is_incompatible() {
    let cwd = ScratchCwd::new(&[("newer_interface", "")]).unwrap();
    let trace = cwd.root().join("was-loaded");
    let file = artifacts::plugin("newer_interface").unwrap();
    let run = |mut command: Command| {
        let _ = fs::remove_file(&trace);
        let ran = host::run_command({
            command.env("NEWER_INTERFACE_WAS_LOADED", &trace);
            command
        });
        (ran.unwrap(), trace.exists())
    };
    for arguments in ["serve", "check", "plugins"] {
        let mut command = host::command(&cwd).unwrap();
        command.arg(arguments);
        let (refused, was_loaded) = run(command);
        assert_eq!((refused.code, was_loaded), (Some(2), false), "{refused:?}");
        assert!(format!("{refused:?}").contains("interface 2.0"), "{refused:?}");
    }
    // The fixture does write its file when it is loaded.
    let mut command = Command::new("/bin/true");
    command.env("LD_PRELOAD", &file);
    assert!(run(command).1, "the fixture writes no file when it is loaded");
}

/// The plugin is optimised, too.
#[test]
fn plugin_works_when_another_compiler_built_it() {
    let Some(toolchain) = other_toolchain(OLDEST_RUSTC).unwrap() else {
        return println!("not tried: rustup has no second compiler of {OLDEST_RUSTC} or later here");
    };
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let build = SeparateBuild::of(&manifest, "double").with(&toolchain).release();
    let folder = build.build(&["-p", "machinery-fixture-double", "--locked"]).unwrap();
    let cwd = ScratchCwd::double(&[("m", ""), ("bad", "faults: {restore_start: panic}")]).unwrap();
    let first = folder.to_str().unwrap().to_owned();
    let host = RunningHost::start_with(&cwd, |command| {
        command.env("CUCKOO_MACHINERY_PLUGINS", "").arg("--plugin-dir").arg(&first);
    });
    let host = host.unwrap();
    let maps = fs::read_to_string(format!("/proc/{}/maps", host.pid())).unwrap();
    assert!(maps.contains("libmachinery_double.so"), "{maps}");
    let mut client = host.client().unwrap();
    assert_eq!(client.act("restore_start", "m").unwrap(), json!({"success": true}));
    let panicked = client.act("restore_start", "bad").unwrap();
    assert!(panicked["reason"].as_str().unwrap().contains("panicked"), "{panicked}");
    assert_eq!(client.act("stop", "m").unwrap(), json!({"success": true}));
}

/// Released interfaces are installed somewhere; a change here would only hide an incompatibility.
#[test]
fn released_interfaces_are_unchanged() {
    let known = BTreeMap::from([("1.0", "df405efab4616cd99e65cd93e651884f3fc4f6bb6d2c344fa93c8f4b0654736d")]);
    let folders = fs::read_dir(interfaces()).unwrap().flatten().filter(|entry| entry.path().is_dir());
    let found: BTreeMap<String, String> =
        folders.map(|folder| (folder.file_name().into_string().unwrap(), checksum(&folder.path()))).collect();
    let found: BTreeMap<&str, &str> = found.iter().map(|(name, sum)| (name.as_str(), sum.as_str())).collect();
    assert_eq!(found, known, "an interface that was released has been changed");
}

/// Returns the checksum of all files below the folder, and of their names.
fn checksum(folder: &Path) -> String {
    let mut folders = vec![folder.to_owned()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    let mut sum = Sha256::new();
    for file in files {
        sum.update(file.strip_prefix(folder).unwrap().to_str().unwrap());
        sum.update([0]);
        sum.update(fs::read(&file).unwrap());
    }
    sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
