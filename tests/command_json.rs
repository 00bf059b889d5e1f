//! `--json`: each command of the command line has a JSON form, also of its failures and of a wrong usage.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;

use machinery_testkit::host::{self, CommandOutput, RunningHost};
use machinery_testkit::scratch::ScratchCwd;
use serde_json::Value;

/// The arguments and the expected exit code of a command that needs arguments, or that a running host refuses. All
/// others run without arguments, and succeed. A command that ends the host is last.
const SPECIAL: [(&str, &[&str], i32); 29] = [
    ("serve", &[], 2),
    ("clean", &[], 1),
    ("state", &["m"], 0),
    ("restore-start", &["m"], 0),
    ("dump-memory", &["m", "memory.elf"], 0),
    ("screenshot", &["m", "screen.png"], 0),
    ("acpi-stop", &["m"], 0),
    ("norestore-start", &["m"], 0),
    ("stop", &["m"], 0),
    ("disable-machine", &["m", "why"], 0),
    ("enable-machine", &["m"], 0),
    ("unlock", &["m"], 1),
    ("import-vmcloak", &["none"], 1),
    ("import-libvirt", &["--dsn", "none:///"], 1),
    ("import-cape", &["none"], 1),
    ("console", &["m"], 1),
    ("wall", &[], 1),
    ("export-cape", &[], 0),
    ("machine-create", &["m"], 2),
    ("machine-snapshot", &["m"], 2),
    ("machine-remove", &["m", "--yes"], 2),
    ("machine-export", &["m", "m.machine"], 2),
    ("machine-import", &["none"], 1),
    ("conformance", &["--list"], 0),
    ("manual", &["share"], 0),
    ("new-plugin", &["xen"], 0),
    ("prepare", &["m"], 0),
    ("upgrade", &[], 0),
    ("shutdown", &[], 0),
];

/// Returns all commands, with those of commands: `export-cape`. The pages of the manual come from the same definitions.
fn commands(cwd: &ScratchCwd) -> BTreeSet<String> {
    let folder = cwd.root().join("pages");
    let written = host::run(cwd, &["manual", folder.to_str().unwrap()]).unwrap();
    assert_eq!(written.code, Some(0), "{written:?}");
    let pages = fs::read_dir(folder.join("man/man1")).unwrap().map(|page| page.unwrap().file_name());
    let names = pages.map(|page| page.into_string().unwrap());
    let mut names: BTreeSet<String> = names
        .filter_map(|page| page.strip_suffix(".1")?.strip_prefix("cuckoo-machinery-").map(str::to_owned))
        .collect();
    for parent in ["import", "export", "machine"] {
        assert!(names.remove(parent), "{names:?}");
    }
    names
}

/// Runs a command in the CWD's folder.
fn run(cwd: &ScratchCwd, command: &str, arguments: &[&str]) -> CommandOutput {
    let mut program = host::command(cwd).unwrap();
    let words = match command.split_once('-') {
        Some((parent @ ("import" | "export" | "machine"), own)) => vec![parent, own],
        _ => vec![command],
    };
    program.current_dir(cwd.root()).arg("--json").args(words).args(arguments);
    host::run_command(program).unwrap()
}

fn assert_json(what: &str, ran: &CommandOutput, code: i32) {
    assert_eq!(ran.code, Some(code), "{what}: {ran:?}");
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert!(!lines.is_empty(), "{what} prints nothing: {ran:?}");
    for line in lines {
        let value: Value =
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{what}: {error}: {line}"));
        assert!(value.is_object(), "{what}: {line}");
        if code != 0 {
            let reason = value["reason"].as_str().unwrap_or_else(|| panic!("{what}: {line}"));
            assert!(value["success"] == false && !reason.starts_with("error"), "{what}: {line}");
        }
    }
}

#[test]
fn commands_print_json_when_it_is_asked_for() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    cwd.change_yaml("double", "interface: lo\n", "interface: lo\ncapabilities: {prepare: true}\n").unwrap();
    let mut host = RunningHost::start(&cwd).unwrap();
    let mut plain = commands(&cwd);
    assert!(plain.len() > 20, "{plain:?}");
    for (special, ..) in SPECIAL {
        assert!(plain.remove(special), "there is no command {special}");
    }
    for command in plain {
        assert_json(&command, &run(&cwd, &command, &[]), 0);
    }
    for (command, arguments, code) in SPECIAL {
        let ran = run(&cwd, command, arguments);
        assert_json(command, &ran, code);
        if command == "upgrade" {
            host.wait_for_replacement().unwrap();
        }
    }
    host.wait().unwrap();
}

#[test]
fn wrong_usage_is_json_too() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    for arguments in [&["--json", "none"][..], &["stop", "--json"], &["--json", "status", "m"]] {
        assert_json(&format!("{arguments:?}"), &host::run(&cwd, arguments).unwrap(), 2);
    }
    let help = host::run(&cwd, &["--json", "--help"]).unwrap();
    assert!(help.code == Some(0) && help.stdout.contains("Usage:"), "{help:?}");
}

#[test]
fn log_of_serve_is_json_when_that_is_asked_for() {
    let cwd = ScratchCwd::double(&[("m", "")]).unwrap();
    let mut host = RunningHost::start_with(&cwd, |command| {
        command.arg("--json");
    })
    .unwrap();
    host.terminate().unwrap();
    let log = host.log();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|line| line["message"] == "ready"), "{log}");
}
