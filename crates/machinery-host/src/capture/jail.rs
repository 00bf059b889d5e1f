//! Confines tcpdump: it opens no file beside those of the system, and starts no program.
//!
//! tcpdump opens the interface as root and then changes to a [user](super::user) without rights, behind the same helper
//! that confines hypervisors. Without root it gets its right to capture from its file, and no confined process may gain a
//! right in that way, so it runs unconfined then.

use std::path::PathBuf;
use std::process::Command;

use machinery::Result;
use machinery_jail::{Network, Policy};
use rustix::fs::{Access, access};
use rustix::process::geteuid;

use super::settings::{Jail, Settings};
use crate::jail;

/// Files that tcpdump reads: accounts, to change its user, and what the kernel says of interfaces. Source: libpcap's
/// pcap-linux.c.
const READ: [&str; 4] = ["/etc/passwd", "/etc/group", "/sys/class/net", "/sys/devices"];

/// The language of the messages that the host reads.
const LOCALE: (&str, &str) = ("LC_ALL", "C");

/// Returns the command that runs tcpdump.
///
/// # Errors
/// tcpdump cannot be executed; the helper program is missing.
pub fn command(settings: &Settings) -> Result<Command> {
    access(&settings.tcpdump, Access::EXEC_OK).map_err(|error| settings.cannot_start(&error.into()))?;
    if settings.jail == Jail::Off || !geteuid().is_root() {
        let mut command = machinery::command(&settings.tcpdump);
        command.env(LOCALE.0, LOCALE.1);
        return Ok(command);
    }
    let read = READ.map(PathBuf::from).into_iter().filter(|path| path.exists());
    let policy = Policy {
        read: read.collect(),
        network: Network::Any,
        environment: vec![(LOCALE.0.to_owned(), LOCALE.1.to_owned())],
        ..Policy::default()
    };
    jail::command(&settings.tcpdump, &policy, "capture_jail: off")
}
