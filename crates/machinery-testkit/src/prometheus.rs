//! `promtool`, which checks metrics and rules.

use std::path::PathBuf;
use std::process::Command;

use crate::{Result, package};

/// Returns the program `promtool`: the installed one, or that of the package.
pub fn promtool() -> Result<PathBuf> {
    let installed = Command::new("promtool").arg("--version").output();
    if installed.is_ok_and(|output| output.status.success()) {
        return Ok(PathBuf::from("promtool"));
    }
    Ok(package::unpacked("prometheus")?.join("usr/bin/promtool"))
}
