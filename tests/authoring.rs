//! The way of a plugin's author: the crate that `new-plugin` writes, built outside of the repository, and the
//! guide, whose quotes must match the code.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::artifacts;
use machinery_testkit::conformance;
use machinery_testkit::host::{self, RunningHost};
use machinery_testkit::scratch::ScratchCwd;
use serde_json::{Value, json};

/// A name with a hyphen, which Cargo replaces in library names.
const NAME: &str = "my-xen";
const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// Returns an author's command, without environment variables of this test.
fn command(program: impl AsRef<std::ffi::OsStr>, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    for name in ["CUCKOO_CWD", "CUCKOO_MACHINERY_PLUGINS", "CARGO_TARGET_DIR", "CARGO_BUILD_TARGET"] {
        command.env_remove(name);
    }
    command.args(arguments);
    command
}

/// Runs cargo offline in the author's crate.
fn cargo(folder: &Path, arguments: &[&str]) -> String {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = command(cargo, &["--offline"]).args(arguments).current_dir(folder).output().unwrap();
    let texts = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "cargo {arguments:?}:\n{}{}", texts[0], texts[1]);
    texts.concat()
}

/// Runs `new-plugin` with these options, and returns the folder and the name of the library.
fn new_plugin(dir: &Path, options: &[&str]) -> (PathBuf, String) {
    let mut command = command(artifacts::program().unwrap(), &["--json", "new-plugin", NAME]);
    // The command needs neither a CWD nor a home folder.
    command.env_remove("HOME").arg("--dir").arg(dir).args(["--interface", REPOSITORY]).args(options);
    let made = host::run_command(command).unwrap();
    assert_eq!(made.code, Some(0), "{made:?}");
    let made: Value = serde_json::from_str(&made.stdout).unwrap();
    (made["folder"].as_str().unwrap().into(), made["library"].as_str().unwrap().to_owned())
}

/// Asserts that the host drives a machine of the installed plugin.
fn is_driven(plugin: &Path, yaml: &str) {
    let cwd = ScratchCwd::new(&[(NAME, yaml)]).unwrap();
    let file = Path::new("machineries").join(plugin.file_name().unwrap());
    cwd.write(file, fs::read(plugin).unwrap()).unwrap();
    let check = host::run(&cwd, &["-v", "check"]).unwrap();
    assert_eq!(check.code, Some(0), "{check:?}");

    let mut host = RunningHost::start(&cwd).unwrap();
    let mut client = host.client().unwrap();
    let machine = format!("{NAME}_1");
    for (action, state) in [("restore_start", "running"), ("stop", "poweroff")] {
        assert_eq!(client.act(action, &machine).unwrap(), json!({"success": true}), "{}", host.log());
        assert_eq!(client.machine(&machine).unwrap()["state"], state);
    }
    // A running machine prevents neither a reload nor a clean exit.
    assert_eq!(client.act("restore_start", &machine).unwrap(), json!({"success": true}));
    cwd.change_yaml(NAME, &format!("{NAME}_2:"), "another:").unwrap();
    let reload = host::run(&cwd, &["reload"]).unwrap();
    assert_eq!(reload.code, Some(0), "{reload:?}");
    assert_eq!(client.machine("another").unwrap()["state"], "poweroff");
    assert_eq!(client.machine(&machine).unwrap()["state"], "running");
    assert!(host.terminate().unwrap().success());
    let log = host.log();
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
    let runs = cwd.root().join(format!("operational/generated/machinery-host/{NAME}/state"));
    assert_eq!(runs.read_dir().unwrap().count(), 0, "{log}");
}

/// Builds the crate in its folder, tests it, and drives it in a host. `yaml` completes the configuration.
fn is_sound(folder: &Path, library: &str, result: &str, yaml: impl Fn(&Path, String) -> String) {
    // Offline, only these versions are available.
    fs::copy(Path::new(REPOSITORY).join("Cargo.lock"), folder.join("Cargo.lock")).unwrap();
    let tested = cargo(folder, &["test"]);
    for requirement in conformance::names() {
        let is_its_own = |line: &&str| {
            line.strip_prefix("test ").is_some_and(|line| line.starts_with(&format!("{requirement} ")))
        };
        let line = tested.lines().find(is_its_own).unwrap_or_default();
        assert!(line.ends_with("... ok") || line.contains("... ignored ("), "{requirement}: {tested}");
    }
    assert!(!tested.contains("warning"), "{tested}");
    // No failure hides in a skipped requirement.
    assert!(tested.contains(result), "{tested}");
    // The name is also a part of another name.
    let tested = cargo(folder, &["test", "restore_start"]);
    assert!(tested.contains("\n1 passed, 0 failed, 0 skipped\n"), "{tested}");
    cargo(folder, &["clippy", "--all-targets", "--", "-D", "warnings"]);

    let text = fs::read_to_string(folder.join(format!("{NAME}.yaml"))).unwrap();
    for (profile, arguments) in [("debug", &["build"][..]), ("release", &["build", "--release"])] {
        cargo(folder, arguments);
        let built = folder.join("target").join(profile);
        is_driven(&built.join(library), &yaml(&built, text.clone()));
    }
}

#[test]
fn new_plugin_builds_and_meets_all_requirements() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, library) = new_plugin(dir.path(), &[]);
    is_sound(&folder, &library, "26 passed, 0 failed, 6 skipped: prepare (", |_, yaml| yaml);
}

#[test]
fn new_plugin_of_processes_builds_and_meets_all_requirements() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, library) = new_plugin(dir.path(), &["--process"]);
    fs::write(dir.path().join("snapshot"), "1000").unwrap();
    is_sound(&folder, &library, "\n30 passed, 0 failed, 2 skipped: console (", |built, yaml| {
        let installed = format!("/srv/{NAME}");
        let program = yaml.replace(
            &format!("{installed}/{NAME}-guest"),
            &built.join(format!("{NAME}-guest")).display().to_string(),
        );
        program.replace(&installed, &dir.path().display().to_string())
    });
}

#[test]
fn new_plugin_is_refused_when_its_name_or_folder_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let mut command = command(artifacts::program().unwrap(), &["new-plugin"]);
        command.args(arguments).arg("--dir").arg(dir.path());
        host::run_command(command).unwrap()
    };
    assert_eq!(run(&[NAME]).code, Some(0));
    for (arguments, words) in [
        (&[NAME][..], "is there already"),
        (&["Xen"], "lowercase"),
        (&["qemu"], "of that name"),
        (&["xen", "--interface", "/none/such"], "no checkout"),
    ] {
        let refused = run(arguments);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains(words), "{refused:?}");
    }
    assert_eq!(dir.path().read_dir().unwrap().count(), 1);
}

const GUIDE: &str = include_str!("../docs/plugins.md");

/// Returns the guide's blocks that begin with "```rust" and a file below `plugins`: the file and the quote.
fn quotes() -> Vec<(&'static str, &'static str)> {
    let blocks = GUIDE.split("```").skip(1).step_by(2);
    let quoted = blocks.filter_map(|block| block.strip_prefix("rust ")?.split_once('\n'));
    quoted.collect()
}

#[test]
fn guide_quotes_match_the_example_plugins() {
    let quotes = quotes();
    assert!(quotes.len() >= 5, "the guide quotes little: {quotes:?}");
    for (file, quote) in quotes {
        let path = Path::new(REPOSITORY).join("plugins").join(file);
        let code = fs::read_to_string(&path).unwrap();
        let code = unindented(&code);
        // A mark shows where the guide omits code.
        for part in unindented(quote).split("// …\n") {
            assert!(code.contains(part), "{file} does not have, as the guide says:\n{part}");
        }
    }
}

/// Removes indentation: the guide may quote a body without its surroundings.
fn unindented(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", line.trim_start())).collect()
}

#[test]
fn guide_lists_all_requirements() {
    let (_, table) = GUIDE.split_once("## Every requirement").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    for requirement in conformance::names() {
        assert!(
            table.contains(&format!("`{requirement}`")),
            "the table of requirements has no `{requirement}`"
        );
    }
}
