//! Commands that run to their end.

use std::process::Command;

use crate::Result;
use crate::error::{Context, Error};

/// Returns the command's standard output; its failure contains its standard error.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().context(|| format!("running {name} (is it installed?)"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(format!("{command:?} failed with {}: {}", output.status, said.trim())))
}
