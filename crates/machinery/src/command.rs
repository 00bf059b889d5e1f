//! Starting other programs.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A command whose process gets the limit of open files that the host was started with. A host raises its own
/// limit; a program that closes every descriptor up to it, such as `qemu-bridge-helper`, would take minutes.
///
/// The host restores the limit in each child that it forks, so a child has to be forked: the standard library
/// starts others by `posix_spawn`, which runs nothing in the child.
#[must_use]
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    // SAFETY: the closure does nothing; that there is one makes the standard library fork.
    unsafe { command.pre_exec(|| Ok(())) };
    command
}
