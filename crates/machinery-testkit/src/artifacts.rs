//! The built program and plugins.
//!
//! A program runs as `<target>/<profile>/<name>`, beside the plugins; a test runs in the folder `deps` there.
//! Cargo builds no programs of other packages for a test, so they must be built first. The errors say so.

use std::path::PathBuf;

use machinery_conformance::artifacts;

use crate::Result;
use crate::error::{Context, Error};

/// Returns the folder of the build's results.
pub fn folder() -> Result<PathBuf> {
    artifacts::folder().context(|| "looking for the build's folder".to_owned())
}

/// Returns the plugin of that machinery that was built last. Its file has `_` where the name has `-`.
pub fn plugin(name: &str) -> Result<PathBuf> {
    artifacts::plugin(name).context(|| format!("looking for the plugin '{name}'"))
}

/// Returns the path of the program `cuckoo-machinery`.
pub fn program() -> Result<PathBuf> {
    let path = folder()?.join("cuckoo-machinery");
    if path.exists() {
        return Ok(path);
    }
    Err(Error::new(format!("{} is missing: run `cargo build --workspace` first", path.display())))
}
