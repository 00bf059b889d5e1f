//! `cargo xtask install` installs the right files, and the installed program finds its plugins.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::scratch::ScratchCwd;
use machinery_testkit::{artifacts, host};

/// Returns all files below the folder, with their modes.
fn files(folder: &Path) -> Vec<(PathBuf, u32)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap().map(Result::unwrap) {
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                folders.push(entry.path());
            } else {
                let path = entry.path().strip_prefix(folder).unwrap().to_owned();
                found.push((path, metadata.permissions().mode() & 0o7777));
            }
        }
    }
    found.sort();
    found
}

fn install(prefix: &Path, more: &[&str]) {
    let built = artifacts::folder().unwrap();
    let mut xtask = Command::new(built.join("xtask"));
    xtask.arg("install").arg("--prefix").arg(prefix).arg("--from").arg(&built).args(more);
    let ran = host::run_command(xtask).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
}

#[test]
fn install_takes_the_plugins_and_no_fixture_when_a_workspace_was_built() {
    // A fixture in the build folder beside the plugins, which must not be installed.
    artifacts::plugin("double").unwrap();
    let scratch = ScratchCwd::double(&[("m", "")]).unwrap();
    let prefix = scratch.root().join("a prefix");
    install(&prefix, &[]);
    // A second installation replaces the files of the first.
    install(&prefix, &[]);
    let expected = [
        ("bin/cuckoo-machinery", 0o755),
        ("lib/cuckoo-machinery/cuckoo-machinery-jail", 0o755),
        ("lib/cuckoo-machinery/libmachinery_kvm.so", 0o644),
        ("lib/cuckoo-machinery/libmachinery_qemu.so", 0o644),
        ("share/cuckoo-machinery/conf/cuckoo.yaml", 0o644),
        ("share/cuckoo-machinery/conf/machineries/kvm.yaml", 0o644),
        ("share/cuckoo-machinery/conf/machineries/qemu.yaml", 0o644),
        ("share/cuckoo-machinery/conf/machinery-host.yaml", 0o644),
    ];
    let is_manual = |path: &Path| path.starts_with("share") && !path.starts_with("share/cuckoo-machinery");
    let (manual, others): (Vec<_>, Vec<_>) =
        files(&prefix).into_iter().partition(|(path, _)| is_manual(path));
    assert_eq!(others, expected.map(|(path, mode)| (path.into(), mode)));
    for path in [
        "share/bash-completion/completions/cuckoo-machinery",
        "share/fish/vendor_completions.d/cuckoo-machinery.fish",
        "share/man/man1/cuckoo-machinery.1",
        "share/man/man1/cuckoo-machinery-restore-start.1",
        "share/man/man5/machinery-host.yaml.5",
        "share/zsh/site-functions/_cuckoo-machinery",
    ] {
        assert!(manual.contains(&(path.into(), 0o644)), "{path}: {manual:?}");
    }
}

#[test]
fn installed_program_finds_only_the_plugins_that_were_chosen() {
    let scratch = ScratchCwd::double(&[("m", "")]).unwrap();
    scratch.list_machineries(&["qemu"]).unwrap();
    let prefix = scratch.root().join("prefix");
    install(&prefix, &["--plugin", "qemu"]);
    let mut plugins = Command::new(prefix.join("bin/cuckoo-machinery"));
    plugins.arg("--cwd").arg(scratch.root()).args(["--json", "plugins"]);
    let ran = host::run_command(plugins).unwrap();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("lib/cuckoo-machinery/libmachinery_qemu.so"), "{ran:?}");
    for other in ["libmachinery_kvm.so", "libmachinery_double.so"] {
        assert!(!ran.stdout.contains(other), "{ran:?}");
    }
}
