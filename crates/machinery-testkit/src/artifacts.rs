//! Where the build has put the program and the plugins.
//!
//! A program runs as `<target>/<profile>/<name>`, and what it looks for lies beside it; a test runs
//! in the folder `deps` there. Cargo builds no shared libraries and no programs of other packages for a test, so that has to
//! be done first, and the error says so.

use std::env;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::error::{Context, Error};

/// The folder of everything that was built.
pub fn folder() -> Result<PathBuf> {
    let own = env::current_exe().context(|| "looking for the build's folder".to_owned())?;
    let folder = match own.parent() {
        Some(folder) if folder.ends_with("deps") => folder.parent(),
        folder => folder,
    };
    let folder = folder.map(Path::to_owned);
    folder.ok_or_else(|| Error::new(format!("{} is not in a build's folder", own.display())))
}

/// The program `cuckoo-machinery`.
pub fn program() -> Result<PathBuf> {
    built("cuckoo-machinery")
}

/// The plugin of that machinery. Its file has `_` where the name has `-`, as cargo has it.
pub fn plugin(name: &str) -> Result<PathBuf> {
    built(&format!("libmachinery_{}.so", name.replace('-', "_")))
}

fn built(file: &str) -> Result<PathBuf> {
    let path = folder()?.join(file);
    if path.exists() {
        return Ok(path);
    }
    Err(Error::new(format!("{} is missing: run `cargo build --workspace` first", path.display())))
}
