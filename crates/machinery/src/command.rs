//! Starts other programs with the original limit of open files.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Returns a command whose process gets the limit of open files that the host was started with. A host raises
/// its own limit. A program that closes every descriptor up to this limit, such as `qemu-bridge-helper`,
/// would need minutes.
///
/// The host restores the limit in each child that it forks, so the child has to be forked. The standard
/// library otherwise uses `posix_spawn`, which runs no code in the child.
#[must_use]
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    // SAFETY: the closure does nothing; its presence makes the standard library fork.
    unsafe { command.pre_exec(|| Ok(())) };
    command
}
