//! `cuckoo-machinery conformance` checks a built plugin without its source, also one that ends the process.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use machinery_testkit::host::{self, CommandOutput};
use machinery_testkit::{artifacts, conformance};
use serde_json::{Value, json};
use tempfile::TempDir;

const CONFIG: &str = "machines:\n  \
    one: {ip: 10.0.0.1, platform: linux, os_version: 12}\n  \
    two: {ip: 10.0.0.2, platform: linux, os_version: 12}\n";

/// Creates a folder with the configuration of the nonconforming plugin.
fn folder(section: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("nonconforming.yaml"), CONFIG).unwrap();
    let host = format!("machineries: {{nonconforming: {{{section}}}}}\n");
    fs::write(folder.path().join("machinery-host.yaml"), host).unwrap();
    fs::create_dir(folder.path().join("tmp")).unwrap();
    folder
}

/// Returns the command in that folder, without a CWD.
fn command(folder: &Path, plugin: &Path) -> Command {
    let mut command = Command::new(artifacts::program().unwrap());
    command.env_remove("CUCKOO_CWD").env_remove("MACHINERY_KEEP").env("HOME", folder);
    command.env("TMPDIR", folder.join("tmp")).arg("conformance").arg(plugin).current_dir(folder);
    command.args(["--config", "nonconforming.yaml", "--host-config", "machinery-host.yaml"]);
    command
}

/// Runs the command in that folder, and expects that it leaves no file.
fn run_with(folder: &Path, plugin: &Path, arguments: &[&str]) -> CommandOutput {
    let mut command = command(folder, plugin);
    command.args(arguments);
    let ran = host::run_command(command).unwrap();
    let left = folder.join("tmp").read_dir().unwrap().count();
    assert_eq!(left, 0, "it leaves something in its scratch folder");
    ran
}

fn run(section: &str, arguments: &[&str]) -> CommandOutput {
    let folder = folder(section);
    run_with(folder.path(), &artifacts::plugin("nonconforming").unwrap(), arguments)
}

#[test]
fn conforming_plugin_passes_all_checks_that_can_run() {
    let ran = run("", &[]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let output: Vec<&str> = ran.stdout.lines().collect();
    for (line, name) in output.iter().zip(conformance::names()) {
        assert!(line.split([' ', ':']).any(|word| word == name) && !line.starts_with("FAIL"), "{line}");
    }
    // Four checks need knowledge of the backend: the begin of a run, a failing start, the end of a machine, and a
    // pause.
    let summary = format!("{} passed, 0 failed, 4 skipped: ", conformance::names().len() - 4);
    let reasons = output.last().unwrap().strip_prefix(&summary).unwrap();
    for name in ["clean_every_time (", "failed_start (", "death (", "live_state ("] {
        assert!(reasons.contains(name), "{ran:?}");
    }
}

#[test]
fn violated_requirement_is_named() {
    let ran = run("violates: screenshot", &[]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let broken: Vec<&str> = ran.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert_eq!(broken.len(), 1, "{ran:?}");
    assert!(broken[0].starts_with("FAIL  screenshot: "), "{broken:?}");
    let ran = run("violates: screenshot", &["--skip", "screenshot"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("skip  screenshot: skipped on the command line"), "{ran:?}");
    let only = ["--only", "restore_start", "--only", "identity", "--machine", "two", "--json"];
    let ran = run("violates: restore_start", &only);
    let reported: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!((ran.code, &reported["success"]), (Some(1), &json!(false)));
    let of = |name: &str| {
        let requirements = reported["requirements"].as_array().unwrap();
        requirements.iter().find(|requirement| requirement["name"] == name).cloned().unwrap_or_default()
    };
    assert_eq!(of("identity"), json!({"name": "identity", "result": "pass", "why": "", "notes": []}));
    assert_eq!(of("restore_start")["result"], "fail");
    assert!(of("restore_start")["why"].as_str().unwrap().contains("two"), "{reported}");
}

#[test]
fn run_folder_in_the_state_folder_is_found_without_knowledge_of_the_backend() {
    let ran = run("violates: run_folder", &["--only", "stop"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(
        ran.stdout.contains("FAIL  stop: after stop, these folders or sockets of a run exist: "),
        "{ran:?}"
    );
    assert!(ran.stdout.contains("/state/one-1\n"), "{ran:?}");
}

const STATE: &str = "\"$MACHINERY_SCRATCH/state\"";

#[test]
fn shell_commands_replace_knowledge_of_the_backend() {
    let [spoilt, paused] = ["spoilt", "$MACHINERY_MACHINE.paused"].map(|name| format!("{STATE}/{name}"));
    let [breaking, mend] = ["touch", "rm"].map(|command| format!("{command} {spoilt}"));
    let [pause, resume] = ["touch", "rm"].map(|command| format!("{command} {paused}"));
    let leftovers = format!("ls {STATE} | grep .run");
    let options = ["--break", &breaking, "--mend", &mend, "--pause", &pause, "--resume", &resume];
    let options =
        [&options[..], &["--leftovers", &leftovers, "--only", "failed_start", "--only", "stop"]].concat();
    let options = [&options[..], &["--only", "live_state"]].concat();
    let ran = run("", &options);
    assert_eq!(
        ran.stdout,
        "pass  stop\npass  failed_start\npass  live_state\n\n3 passed, 0 failed, 0 skipped\n"
    );
    let ran = run("violates: live_state", &options);
    assert!(ran.stdout.contains("FAIL  live_state: one was paused without the plugin"), "{ran:?}");
    let ran = run("violates: stop", &options);
    assert!(ran.stdout.contains("FAIL  stop: after stop, these leftovers exist: one.run"), "{ran:?}");
    let ran = run("", &["--only", "death", "--kill", "exit 3"]);
    assert!(ran.stdout.contains("FAIL  death: killing one: `exit 3` ended with exit status: 3"), "{ran:?}");
    let ran = run("", &["--only", "stop", "--leftovers", "no-such-program"]);
    assert!(ran.stdout.contains("FAIL  stop: finding leftovers: `no-such-program` ended with"), "{ran:?}");
}

#[test]
fn death_is_checked_when_a_command_kills_a_machine() {
    let folder = folder("");
    let mortal = CONFIG.replacen("os_version: 12", "os_version: 12, mortal: true", 1);
    fs::write(folder.path().join("nonconforming.yaml"), mortal).unwrap();
    let plugin = artifacts::plugin("nonconforming").unwrap();
    let kill = format!(": > {STATE}/$MACHINERY_MACHINE.run");
    let ran = run_with(folder.path(), &plugin, &["--only", "death", "--kill", &kill]);
    assert_eq!(ran.stdout, "pass  death\n\n1 passed, 0 failed, 0 skipped\n");
}

#[test]
fn leak_is_searched_in_as_many_runs_as_given() {
    let ran = run("violates: leaks_thread", &["--only", "no_leaks", "--rounds", "12"]);
    assert!(ran.stdout.contains("FAIL  no_leaks: after 12 runs, the host has 12 more threads"), "{ran:?}");
}

#[test]
fn scratch_folder_of_a_failed_check_is_kept_on_request() {
    let folder = folder("violates: stop");
    let mut command = command(folder.path(), &artifacts::plugin("nonconforming").unwrap());
    command.env("MACHINERY_KEEP", "1").args(["--only", "stop", "--only", "identity"]);
    command.args(["--leftovers", &format!("ls {STATE} | grep .run")]);
    let ran = host::run_command(command).unwrap();
    let kept: Vec<&str> = ran.stdout.lines().filter_map(|line| line.trim().strip_prefix("kept ")).collect();
    let in_tmp = folder.path().join("tmp").read_dir().unwrap().map(|entry| entry.unwrap().path());
    assert_eq!(in_tmp.collect::<Vec<_>>(), [Path::new(kept.last().unwrap())], "{ran:?}");
    let run_file = Command::new("find").args([kept.last().unwrap(), "-name", "one.run"]).output().unwrap();
    assert_eq!(run_file.stdout.iter().filter(|byte| **byte == b'\n').count(), 1, "{ran:?}");
}

#[test]
fn other_requirements_are_checked_when_a_plugin_ends_the_process() {
    for (how, words) in [("abort", "signal 6"), ("exit", "exit code 3")] {
        let only =
            ["--only", "identity", "--only", "restore_start", "--only", "check", "--only", "off_after_load"];
        let ran = run(&format!("ends_by: {how}"), &only);
        assert_eq!(ran.code, Some(1), "{ran:?}");
        for line in [
            "pass  identity",
            &format!("FAIL  restore_start: the process ended in it, with {words}"),
            &format!("FAIL  check: the process ended in it, with {words}"),
            "pass  off_after_load",
        ] {
            assert!(ran.stdout.lines().any(|output| output == line), "{line:?} is not in {ran:?}");
        }
    }
}

#[test]
fn file_is_reported_once_when_it_is_no_plugin() {
    let folder = folder("");
    let text = folder.path().join("libmachinery_nonconforming.so");
    fs::write(&text, "text").unwrap();
    let ran = run_with(folder.path(), &text, &[]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert_eq!(ran.stdout.matches("FAIL").count(), 1, "{ran:?}");
    assert!(ran.stdout.contains("shared library"), "{ran:?}");
    fs::set_permissions(&text, fs::Permissions::from_mode(0o666)).unwrap();
    let ran = run_with(folder.path(), &text, &[]);
    assert_eq!((ran.code, ran.stderr.contains("--allow-insecure-plugins")), (Some(2), true), "{ran:?}");
    let ran = run_with(folder.path(), &text, &["--allow-insecure-plugins"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
}

#[test]
fn command_line_is_refused_before_any_check_when_it_is_wrong() {
    let folder = folder("");
    let plugin = artifacts::plugin("nonconforming").unwrap();
    for (file, arguments, words) in [
        (Path::new("none.so"), vec![], "there is no file none.so"),
        (&plugin, vec!["--only", "no_such"], "there is no requirement 'no_such'"),
        (&plugin, vec!["--skip", "no_such"], "conformance --list"),
        (&plugin, vec!["--timeout", "soon"], "--timeout"),
        (&plugin, vec!["--break", "true"], "--mend"),
        (&plugin, vec!["--resume", "true"], "--pause"),
    ] {
        let ran = run_with(folder.path(), file, &arguments);
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert!(ran.stderr.contains(words), "{ran:?}");
    }
    let mut command = Command::new(artifacts::program().unwrap());
    command.args(["conformance", "--list"]);
    let ran = host::run_command(command).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    for name in conformance::names() {
        let line = ran.stdout.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        assert!(line.contains(conformance::meaning(name).unwrap()), "{name}: {ran:?}");
    }
}
