//! The wheel of `integrations/cuckoo3`, which runs Cuckoo3 on the host.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::files::{copy, remove_earlier};
use super::release::Release;
use crate::run::{CHECKOUT, Context, Result, output};
use crate::tracked;

/// The interface of PEP 517 for a build. Debian's setuptools needs no network.
const BUILD: &str = "import setuptools.build_meta, sys; setuptools.build_meta.build_wheel(sys.argv[1])";

/// Makes the wheel in `out`, and returns its path.
///
/// # Errors
/// It cannot be made, or its version is not that of the release.
pub fn make(release: &Release, out: &Path) -> Result<PathBuf> {
    remove_earlier(out, |name| name.ends_with(".whl"))?;
    // A build writes into the folder of the sources.
    let scratch = tempfile::tempdir().context(|| "making a folder for the wheel".to_owned())?;
    let source = Path::new(CHECKOUT).join("integrations/cuckoo3");
    for file in tracked::files(&source)?.iter().filter(|file| !file.starts_with("tests/")) {
        copy(&source.join(file), &scratch.path().join(file))?;
    }
    for licence in ["LICENSE-MIT", "LICENSE-APACHE"] {
        copy(&Path::new(CHECKOUT).join(licence), &scratch.path().join(licence))?;
    }
    let mut build = Command::new("/usr/bin/python3");
    build.args(["-c", BUILD]).arg(out).current_dir(scratch.path());
    output(release.date(&mut build))?;
    let made = out.join(format!("cuckoo_machinery-{}-py3-none-any.whl", release.version));
    if made.is_file() {
        return Ok(made);
    }
    Err(format!("{} was not made: integrations/cuckoo3/pyproject.toml has another version", made.display())
        .into())
}
