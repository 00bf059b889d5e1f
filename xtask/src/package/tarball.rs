//! The tarball for other distributions: the tree for `/usr/local`, with a README.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Release, copy, read, remove_earlier, tree, write};
use crate::run::{CHECKOUT, Context, Result, step};

/// Makes the tarball in `out`, and returns its path.
pub fn make(release: &Release, built: &Path, out: &Path) -> Result<PathBuf> {
    remove_earlier(out, |name| name.ends_with(".tar.xz"))?;
    let scratch = tempfile::tempdir_in(out).context(|| "making a folder for the tarball".to_owned())?;
    let name = format!("cuckoo-machinery-{}-linux-{}", release.version, std::env::consts::ARCH);
    let folder = scratch.path().join(&name);
    tree::fill(&folder, "/usr/local/", built)?;
    let checkout = Path::new(CHECKOUT);
    let readme = read(&checkout.join("packaging/README.txt"))?;
    write(&folder.join("README.txt"), &readme.replace("VERSION", &release.version))?;
    let licences = ["LICENSE-MIT", "LICENSE-APACHE"].map(|file| (file.to_owned(), file.to_owned()));
    let cape = [("integrations/cape/LICENSE".to_owned(), "cape/LICENSE".to_owned())];
    for (from, to) in licences.into_iter().map(|(from, to)| (from, format!("doc/{to}"))).chain(cape) {
        copy(&checkout.join(from), &folder.join("share/cuckoo-machinery").join(to))?;
    }
    let made = out.join(format!("{name}.tar.xz"));
    let mut tar = Command::new("tar");
    tar.arg("--create").arg("--xz").arg("--file").arg(&made).arg("--directory").arg(scratch.path());
    tar.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu"]);
    tar.arg(format!("--mtime=@{}", release.epoch)).arg(&name);
    step(&mut tar)?;
    fs::metadata(&made).context(|| format!("cannot find {}", made.display()))?;
    Ok(made)
}
