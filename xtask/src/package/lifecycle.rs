//! The life of the packages on a fresh Debian: installed, used, upgraded during a run, removed.
//!
//! ```text
//! fresh root ─▶ systemd (boot.sh) ─▶ lifecycle.sh: install ─▶ restore ─▶ upgrade ─▶ remove ─▶ purge ─▶ nothing is left
//!                                        └─▶ the wall, in a browser (wall.rs)
//! ```
//!
//! The machine is the testkit's micro guest, as VMCloak would deliver it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use machinery_testkit::guest::{self, Guest, Qemu};
use machinery_testkit::snapshot::SnapshotFormat;

use super::files::{copy, read, write};
use super::release::Release;
use super::{needs, newer, wall};
use crate::fresh::{self, Root};
use crate::run::{CHECKOUT, Result, step, step_as};
use crate::system_packages;

/// The folder of the packages and the scripts in the root.
const PACKAGES: &str = "/root/packages";

/// The folder of the machines in the root.
const MACHINES: &str = "/srv/vms";

/// Checks the packages, and installs, upgrades and removes them on that release of Debian.
pub fn run(made: &[PathBuf], out: &Path, debian: fresh::Release) -> Result<()> {
    needs::ensure_for_tests()?;
    lint(made)?;
    system_packages::ensure()?;
    let release = Release::of_checkout()?;
    let (version, newer) = newer::make(out)?;
    let root = Root::new(debian.name())?;
    for (folder, files) in [("old", made), ("new", newer.as_slice())] {
        let folder = root.inside(PACKAGES).join(folder);
        files.iter().try_for_each(|file| copy(file, &folder.join(file.file_name().unwrap_or_default())))?;
    }
    for script in ["boot.sh", "lifecycle.sh"] {
        let source = Path::new(CHECKOUT).join("xtask/src/package").join(script);
        copy(&source, &root.inside(PACKAGES).join(script))?;
    }
    make_machine(&root)?;
    wall::show_when_asked(&root.inside(PACKAGES), out.join(format!("wall-{}.png", debian.name())))?;
    let script = format!("{PACKAGES}/boot.sh");
    let name = format!("lifecycle.sh {} {version}    (on a fresh Debian {})", release.version, debian.name());
    step_as(&name, &mut root.command(&["sh", &script, &release.version, &version]))?;
    eprintln!("\nThe packages were installed, upgraded with a guest, and removed; nothing was left.");
    Ok(())
}

/// Checks the packages by Debian's rules. Exceptions are in `packaging/debian/*.lintian-overrides`, with their reasons.
fn lint(made: &[PathBuf]) -> Result<()> {
    let packages = made.iter().filter(|path| path.extension() == Some(OsStr::new("deb")));
    let mut lintian = Command::new("lintian");
    lintian.args(["--fail-on", "error,warning", "--tag-display-limit", "0", "--allow-root"]).args(packages);
    step(&mut lintian)
}

/// Makes the machine `m` in the root. Its arguments name its own folder, which has another path there.
fn make_machine(root: &Root) -> Result<()> {
    let qemu = Qemu::find()?;
    let folder = root.inside(MACHINES).join("m");
    let machine =
        guest::master(&qemu, Guest::Micro)?.machine(&folder, "m", "127.0.0.1", SnapshotFormat::Lz4)?;
    let there = format!("{MACHINES}/m");
    let info = read(&machine.machineinfo)?.replace(&machine.dir.to_string_lossy().into_owned(), &there);
    write(&machine.machineinfo, &info)
}
