//! The files of a Debian package, without an installation, which would start a server or install much else.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Error;
use crate::{Result, cache, command};

/// Returns the folder with the files of the package, which is downloaded once.
pub fn unpacked(package: &str) -> Result<PathBuf> {
    let cache = cache::open(&cache::default()?)?;
    cache::folder(&cache, package, |into| unpack(package, into))
}

fn unpack(package: &str, into: &Path) -> Result<()> {
    let download =
        tempfile::tempdir_in(into).map_err(|error| Error::new(format!("cannot make a folder: {error}")))?;
    command::output(Command::new("apt-get").args(["-q", "download", package]).current_dir(&download))?;
    let mut found = std::fs::read_dir(&download).ok().into_iter().flatten().flatten();
    let deb = found.next().ok_or_else(|| Error::new(format!("`apt-get download {package}` left no file")))?;
    command::output(Command::new("dpkg-deb").arg("-x").arg(deb.path()).arg(into))?;
    Ok(())
}
