//! Where the build has put the program and the plugins.
//!
//! A program runs as `<target>/<profile>/<name>`, and what it looks for lies beside it; a test runs
//! in the folder `deps` there. Cargo builds no programs of other packages for a test, and of its own
//! libraries only what the test can link to, so the rest has to be built first, and the error says so.

use std::path::PathBuf;

use machinery_conformance::artifacts;

use crate::Result;
use crate::error::{Context, Error};

/// The folder of everything that was built.
pub fn folder() -> Result<PathBuf> {
    artifacts::folder().context(|| "looking for the build's folder".to_owned())
}

/// The plugin of that machinery, the one that was built last. Its file has `_` where the name has
/// `-`, as cargo has it.
pub fn plugin(name: &str) -> Result<PathBuf> {
    artifacts::plugin(name).context(|| format!("looking for the plugin '{name}'"))
}

/// The program `cuckoo-machinery`.
pub fn program() -> Result<PathBuf> {
    let path = folder()?.join("cuckoo-machinery");
    if path.exists() {
        return Ok(path);
    }
    Err(Error::new(format!("{} is missing: run `cargo build --workspace` first", path.display())))
}
