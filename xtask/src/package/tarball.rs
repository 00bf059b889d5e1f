//! The tarball for other distributions: the tree for `/usr/local`, with a README and the licences beside it.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::files::{copy, read, remove_earlier, scratch_in, write};
use super::release::Release;
use crate::run::{CHECKOUT, Result, step};

/// The licences of the checkout, and their names in the tarball.
const LICENCES: [(&str, &str); 3] = [
    ("LICENSE-APACHE", "LICENSE-APACHE"),
    ("LICENSE-MIT", "LICENSE-MIT"),
    ("integrations/cape/LICENSE", "LICENSE-GPL-of-cape"),
];

/// Makes the tarball of the tree in `out`, and returns its path.
pub fn make(release: &Release, tree: &Path, out: &Path) -> Result<PathBuf> {
    remove_earlier(out, |name| name.ends_with(".tar.gz"))?;
    let scratch = scratch_in(out)?;
    let checkout = Path::new(CHECKOUT);
    let readme = read(&checkout.join("packaging/README.txt"))?;
    write(&scratch.path().join("README.txt"), &readme.replace("VERSION", &release.version))?;
    for (from, to) in LICENCES {
        copy(&checkout.join(from), &scratch.path().join(to))?;
    }
    let name = format!("cuckoo-machinery-{}-linux-{}", release.version, std::env::consts::ARCH);
    let made = out.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    tar.arg("--create").arg("--gzip").arg("--file").arg(&made);
    tar.args([
        "--sort=name",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "--format=gnu",
        "--mode=u=rwX,go=rX",
    ]);
    tar.arg(format!("--mtime=@{}", release.epoch)).arg(format!("--transform=s,^,{name}/,"));
    tar.args(["--directory"]).arg(scratch.path()).args(["README.txt"]).args(LICENCES.map(|(_, name)| name));
    tar.args(["--directory"]).arg(tree).args(["bin", "lib", "share"]);
    step(&mut tar)?;
    Ok(made)
}
