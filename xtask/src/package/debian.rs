//! The packages for Debian, which debhelper makes of the tree.
//!
//! ```text
//! <out>/work/debian/           packaging/debian, and a changelog with the version and the date
//! <out>/work/debian/tmp/usr/   the tree
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::files::{copy, make_folder, remove_earlier, write};
use super::release::Release;
use super::tree;
use crate::run::{CHECKOUT, Context, Result, output, step};

const MAINTAINER: &str = "cuckoo-machinery developers <cuckoo-machinery@users.noreply.github.com>";

/// Makes the packages of the tree in `out`, and returns their paths. The tree is moved.
pub fn make(release: &Release, tree: &Path, out: &Path) -> Result<Vec<PathBuf>> {
    let what = || format!("making packages in {}", out.display());
    let work = out.join("work");
    if work.exists() {
        fs::remove_dir_all(&work).context(what)?;
    }
    remove_earlier(out, |name| name.ends_with(".deb"))?;
    let debian = work.join("debian");
    make_folder(&debian)?;
    let source = Path::new(CHECKOUT).join("packaging/debian");
    for entry in fs::read_dir(&source).context(what)? {
        let path = entry.context(what)?.path();
        copy(&path, &debian.join(path.file_name().unwrap_or_default()))?;
    }
    write(&debian.join("changelog"), &changelog(release)?)?;
    copy(&Path::new(CHECKOUT).join("CHANGELOG.md"), &work.join("CHANGELOG.md"))?;
    make_folder(&debian.join("tmp"))?;
    fs::rename(tree, debian.join("tmp/usr")).context(what)?;
    tree::write_units(&debian.join("tmp/usr"), "/usr/")?;
    // Some crates of the registry have files of 1973. debhelper changes only later dates.
    let touch = ["-exec", "touch", "--no-dereference", &format!("--date=@{}", release.epoch), "{}", "+"];
    step(Command::new("find").arg(&debian).args(touch))?;
    let mut rules = Command::new("debian/rules");
    rules.arg("binary").current_dir(&work).env("OUT", out);
    // Options of this user's own builds, such as DEB_BUILD_OPTIONS, do not belong into packages.
    rules.env_remove("DEB_BUILD_OPTIONS").env_remove("DH_OPTIONS");
    step(release.date(&mut rules))?;
    fs::remove_dir_all(&work).context(what)?;
    let entries = fs::read_dir(out).context(what)?.flatten().map(|entry| entry.path());
    let mut made: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|kind| kind == "deb")).collect();
    made.sort();
    Ok(made)
}

/// Returns Debian's changelog of the release.
fn changelog(release: &Release) -> Result<String> {
    let Release { version, epoch } = release;
    let date =
        output(Command::new("date").args(["-u", "-R", "-d", &format!("@{epoch}")]).env("LC_ALL", "C"))?;
    Ok(format!(
        "cuckoo-machinery ({version}-1) unstable; urgency=medium\n\n  * Release of version {version}: see \
         changelog.gz in this folder.\n\n -- {MAINTAINER}  {}\n",
        date.trim()
    ))
}
