//! `cargo xtask package` makes packages with the right files, and nothing of the build beside them.

// Clippy's own exemption for tests leaves out their helpers.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::artifacts;

/// Makes the packages of this build, and returns their paths by the beginnings of their names.
fn package(out: &Path) -> BTreeMap<String, PathBuf> {
    let built = artifacts::folder().unwrap();
    let mut xtask = Command::new(built.join("xtask"));
    xtask.arg("package").arg("--from").arg(&built).arg("--out").arg(out);
    // A loaded computer takes minutes, so the limit is the test runner's.
    output(&mut xtask);
    let files = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    let version = format!("_{}", env!("CARGO_PKG_VERSION"));
    files.map(|path| (name(&path).split(&version).next().unwrap().to_owned(), path)).collect()
}

fn output(command: &mut Command) -> String {
    let ran = command.output().unwrap();
    assert!(ran.status.success(), "{command:?}: {ran:?}");
    String::from_utf8(ran.stdout).unwrap()
}

fn field(package: &Path, name: &str) -> String {
    output(Command::new("dpkg-deb").arg("--field").arg(package).arg(name)).trim().to_owned()
}

/// Returns the lines of the package's table of contents: modes, owners and paths.
fn contents(package: &Path) -> String {
    output(Command::new("dpkg-deb").arg("--contents").arg(package))
}

#[test]
fn packages_have_their_files_and_dependencies_and_no_fixture() {
    // A fixture in the build folder beside the plugins, which must not be packaged.
    artifacts::plugin("double").unwrap();
    let out = tempfile::tempdir().unwrap();
    let made = package(out.path());
    let version = env!("CARGO_PKG_VERSION");
    let tarball = format!("cuckoo-machinery-{version}-linux-{}.tar.gz", std::env::consts::ARCH);
    let wheel = format!("cuckoo_machinery-{version}-py3-none-any.whl");
    let names = ["cuckoo-machinery", &tarball, "cuckoo-machinery-dev", "cuckoo-machinery-kvm", &wheel];
    assert_eq!(made.keys().map(String::as_str).collect::<Vec<_>>(), names);

    let main = &made["cuckoo-machinery"];
    assert_eq!(field(main, "Version"), format!("{version}-1"));
    let listed = contents(main);
    for (mode, path) in [
        ("-rwxr-xr-x root/root", "usr/bin/cuckoo-machinery"),
        ("-rwxr-xr-x root/root", "usr/lib/cuckoo-machinery/cuckoo-machinery-jail"),
        ("-rw-r--r-- root/root", "usr/lib/cuckoo-machinery/libmachinery_qemu.so"),
        ("-rw-r--r-- root/root", "lib/systemd/system/cuckoo-machinery.service"),
        ("-rw-r--r-- root/root", "lib/systemd/system/cuckoo-machinery-cleanup.service"),
        ("-rw-r--r-- root/root", "usr/lib/sysusers.d/cuckoo-machinery.conf"),
        ("-rw-r--r-- root/root", "usr/share/cuckoo-machinery/conf/machinery-host.yaml"),
        ("-rw-r--r-- root/root", "usr/share/man/man5/machinery-host.yaml.5.gz"),
        ("-rw-r--r-- root/root", "usr/share/zsh/vendor-completions/_cuckoo-machinery"),
        ("-rw-r--r-- root/root", "usr/share/doc/cuckoo-machinery/docs/packages.md"),
        ("-rw-r--r-- root/root", "usr/share/doc/cuckoo-machinery/copyright"),
    ] {
        let is_it = |line: &str| line.starts_with(mode) && line.ends_with(&format!(" ./{path}"));
        assert!(listed.lines().any(is_it), "{path}: {listed}");
    }
    for other in ["libmachinery_kvm.so", "libmachinery_double.so", "source/"] {
        assert!(!listed.contains(other), "{other}: {listed}");
    }

    let unpacked = out.path().join("unpacked");
    output(Command::new("dpkg-deb").arg("--extract").arg(main).arg(&unpacked));
    let unit = fs::read_to_string(unpacked.join("lib/systemd/system/cuckoo-machinery.service")).unwrap();
    assert!(
        unit.contains("\nExecStart=/usr/bin/cuckoo-machinery serve\n") && !unit.contains("/usr/local"),
        "{unit}"
    );

    let kvm = &made["cuckoo-machinery-kvm"];
    assert!(field(kvm, "Depends").contains("libvirt0 (>= "), "{}", field(kvm, "Depends"));
    assert!(contents(kvm).contains(" ./usr/lib/cuckoo-machinery/libmachinery_kvm.so\n"));
    let dev = contents(&made["cuckoo-machinery-dev"]);
    for path in ["crates/machinery/Cargo.toml", "plugins/example/src/lib.rs", "vendor/serde/Cargo.toml"] {
        assert!(dev.contains(&format!(" ./usr/share/cuckoo-machinery/source/{path}\n")), "{path}");
    }
    let import = "import sys; sys.path.insert(0, sys.argv[1]); import cuckoo_machinery.connection";
    output(Command::new("python3").args(["-c", import]).arg(&made[&wheel]));
    let listed = output(Command::new("tar").arg("--list").arg("--file").arg(&made[&tarball]));
    let name = tarball.trim_end_matches(".tar.gz");
    for path in ["README.txt", "bin/cuckoo-machinery", "lib/cuckoo-machinery/libmachinery_kvm.so"] {
        assert!(listed.contains(&format!("{name}/{path}\n")), "{listed}");
    }
}
