//! Confines a program of the host: tcpdump, and `qemu-img`. The plugins confine hypervisors with the same helper.

use std::path::Path;
use std::process::Command;

use machinery::trust::expect_trusted;
use machinery::{Error, Result};
use machinery_jail::Policy;

/// Returns the command that runs the program with these rights, and no others. `off` is the setting that runs it without
/// a jail.
///
/// # Errors
/// The helper program is missing, or other users can change it.
pub fn command(program: &Path, policy: &Policy, off: &str) -> Result<Command> {
    let helper = machinery_jail::installed().map_err(|error| {
        let name = program.file_name().unwrap_or_default().display();
        Error::environment(format!("{error}, which confines {name}"))
            .advice(format!("Install it beside the plugins, or set {off} in machinery-host.yaml"))
    })?;
    expect_trusted(&helper)?;
    let policy = serde_json::to_string(policy);
    let policy = policy.map_err(|error| Error::failed(format!("cannot write a policy: {error}")))?;
    let mut command = machinery::command(&helper);
    command.arg(policy).arg(program);
    Ok(command)
}
