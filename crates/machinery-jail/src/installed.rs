//! Where the helper program is installed.

use std::io;
use std::path::{Path, PathBuf};

/// The name of the helper program.
pub const PROGRAM: &str = "cuckoo-machinery-jail";

/// The folder of the plugins and the helper program, in the prefix of an installation.
const INSTALLED: &str = "lib/cuckoo-machinery";

/// Returns the path of the helper program: beside the plugins of an installation, or beside the program of this process in
/// a build's folder, also for a test that Cargo has built into `deps`.
///
/// # Errors
/// The path of this process's program is unknown, or there is no helper.
pub fn installed() -> io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let places = places(own.parent().unwrap_or(Path::new("/")));
    let missing = || format!("there is no program {}, and no {}", places[0].display(), places[1].display());
    let found = places.iter().find(|place| place.is_file()).cloned();
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, missing()))
}

/// Returns the paths at which the helper of a program in `folder` may be. The installation comes first: an earlier version
/// has installed the helper beside the program, where it may remain.
fn places(folder: &Path) -> [PathBuf; 2] {
    let build = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let prefix = folder.parent().unwrap_or(folder);
    [prefix.join(INSTALLED), build.to_owned()].map(|folder| folder.join(PROGRAM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn helper_is_searched_beside_plugins_and_then_beside_the_program() {
        let helper = |folder: &str| Path::new(folder).join(PROGRAM);
        assert_eq!(places(Path::new("/usr/bin")), [helper("/usr/lib/cuckoo-machinery"), helper("/usr/bin")]);
        assert_eq!(places(Path::new("/target/debug/deps"))[1], helper("/target/debug"));
    }
}
