//! The needs of cells on this computer.

use std::path::{Path, PathBuf};

use machinery::{Error, Result};
use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::thread::{CapabilitySet, capabilities};

/// The folders of the system's daemons, which the path of a plain user lacks.
const DAEMONS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Returns the reason why this host can make no cell, if there is one.
pub fn missing() -> Option<String> {
    expect_supported().err().map(|error| error.reason().to_owned())
}

/// Expects that this host can make cells.
///
/// # Errors
/// The host lacks a capability, the program `nft`, `/dev/net/tun`, or writable parameters of the network.
pub fn expect_supported() -> Result<()> {
    let needed = CapabilitySet::NET_ADMIN | CapabilitySet::SYS_ADMIN;
    if !capabilities(None).is_ok_and(|sets| sets.effective.contains(needed)) {
        return Err(Error::environment(
            "an isolated network needs the capabilities CAP_NET_ADMIN and CAP_SYS_ADMIN",
        )
        .advice("Run the host as root, or remove network: isolated from machinery-host.yaml"));
    }
    if !Path::new("/dev/net/tun").exists() {
        return Err(Error::environment("an isolated network needs the device /dev/net/tun")
            .advice("Load the kernel's module tun, or give the device to the container"));
    }
    expect_parameters()?;
    nft().map(drop)
}

/// Expects that the parameters of the network can be set. A container or a unit of systemd may have them read-only.
fn expect_parameters() -> Result<()> {
    let folder = Path::new("/proc/sys/net");
    let is_read_only = statvfs(folder).is_ok_and(|found| found.f_flag.contains(StatVfsMountFlags::RDONLY));
    if !is_read_only {
        return Ok(());
    }
    Err(Error::environment(
        "an isolated network needs the parameters in /proc/sys/net, which are read-only here",
    )
    .advice("Give the service ReadWritePaths=/proc/sys/net, or the container a writable /proc/sys/net"))
}

/// Returns the program that sets rules.
pub(super) fn nft() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = std::env::split_paths(&path).chain(DAEMONS.map(PathBuf::from));
    let found = folders.find_map(|folder| Some(folder.join("nft")).filter(|program| program.is_file()));
    found.ok_or_else(|| {
        Error::environment("an isolated network needs the program nft, which is not in PATH")
            .advice("Install nftables")
    })
}
