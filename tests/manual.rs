//! The manual pages and completions that the program writes.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::{artifacts, host};
use tempfile::TempDir;

fn manual() -> TempDir {
    let share = tempfile::tempdir().unwrap();
    let mut program = Command::new(artifacts::program().unwrap());
    program.arg("manual").arg(share.path());
    let ran = host::run_command(program).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    share
}

/// Returns the pages of a section.
fn pages(share: &TempDir, section: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(share.path().join("man").join(section)).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn manual_has_a_page_for_each_command() {
    let share = manual();
    let mut help = Command::new(artifacts::program().unwrap());
    let help = host::run_command({
        help.arg("help");
        help
    })
    .unwrap()
    .stdout;
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let commands: Vec<&str> = commands
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .collect();
    assert!(commands.len() > 20, "{help}");
    for command in commands {
        let page = share.path().join(format!("man/man1/cuckoo-machinery-{command}.1"));
        assert!(page.is_file(), "{}", page.display());
    }
}

#[test]
fn pages_have_no_fault_of_mandoc() {
    let share = manual();
    let pages: Vec<PathBuf> = ["man1", "man5"].iter().flat_map(|section| pages(&share, section)).collect();
    for page in &pages {
        let output = Command::new("mandoc").args(["-T", "lint", "-W", "warning"]).arg(page).output().unwrap();
        let faults = String::from_utf8(output.stdout).unwrap();
        // The date of a build would make each build another one. clap_mangen writes breaks around lists of values.
        let known = ["cannot parse date", "skipping paragraph macro: br"];
        let faults: Vec<&str> =
            faults.lines().filter(|line| !known.iter().any(|known| line.contains(known))).collect();
        assert!(faults.is_empty(), "{}: {faults:#?}", page.display());
    }
    let shown = |page: &str| {
        let page = share.path().join("man").join(page);
        let output = Command::new("mandoc").args(["-T", "ascii"]).arg(page).output().unwrap();
        String::from_utf8(output.stdout).unwrap().replace('\u{8}', "")
    };
    assert!(shown("man5/machinery-host.yaml.5").contains("127.0.0.1:9464"));
    assert!(shown("man1/cuckoo-machinery-stop.1").contains("Power a machine off at once"));
}

#[test]
fn completion_of_bash_completes_commands() {
    let share = manual();
    let file: &Path = &share.path().join("bash-completion/completions/cuckoo-machinery");
    let script = "source \"$1\"; COMP_WORDS=(cuckoo-machinery rest); COMP_CWORD=1; \
                  _cuckoo__machinery cuckoo-machinery rest cuckoo-machinery; echo \"${COMPREPLY[@]}\"; \
                  complete -p cuckoo-machinery | grep -o '_cuckoo__machinery'";
    let output = Command::new("bash").args(["-c", script, "bash"]).arg(file).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), "restore-start\n_cuckoo__machinery");
}
