//! Where the helper program is installed.

use std::io;
use std::path::{Path, PathBuf};

/// The name of the helper program, which is installed beside the host.
pub const PROGRAM: &str = "cuckoo-machinery-jail";

/// Returns the path of the helper program: beside the program of this process, or of one that Cargo has built into `deps`
/// for tests.
///
/// # Errors
/// The path of this process's program is unknown, or there is no helper beside it.
pub fn installed() -> io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().unwrap_or(Path::new("/"));
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let helper = folder.join(PROGRAM);
    if helper.is_file() {
        return Ok(helper);
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no program {}", helper.display())))
}
