//! Running a tool to its end.

use std::process::Command;

use crate::Result;
use crate::error::{Context, Error};

/// What `command` wrote to its standard output; its failure tells what it wrote to its error output.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().context(|| format!("running {name} (is it installed?)"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(format!("{command:?} failed with {}: {}", output.status, said.trim())))
}
