//! `promtool`, which checks metrics and rules. It is taken from Debian's package without an installation, which would
//! start a server.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Error;
use crate::{Result, cache, command};

const PACKAGE: &str = "prometheus";

/// Returns the program `promtool`: the installed one, or that of the package.
pub fn promtool() -> Result<PathBuf> {
    let installed = Command::new("promtool").arg("--version").output();
    if installed.is_ok_and(|output| output.status.success()) {
        return Ok(PathBuf::from("promtool"));
    }
    let cache = cache::open(&cache::default()?)?;
    Ok(cache::folder(&cache, PACKAGE, unpack)?.join("usr/bin/promtool"))
}

fn unpack(into: &Path) -> Result<()> {
    let download =
        tempfile::tempdir_in(into).map_err(|error| Error::new(format!("cannot make a folder: {error}")))?;
    command::output(Command::new("apt-get").args(["-q", "download", PACKAGE]).current_dir(&download))?;
    let mut found = std::fs::read_dir(&download).ok().into_iter().flatten().flatten();
    let deb = found.next().ok_or_else(|| Error::new("`apt-get download prometheus` left no file"))?;
    command::output(Command::new("dpkg-deb").arg("-x").arg(deb.path()).arg(into))?;
    Ok(())
}
