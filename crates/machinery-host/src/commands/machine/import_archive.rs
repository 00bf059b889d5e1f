//! `machine import`: adds the machine of an exported file.
//!
//! ```text
//! read the whole file: sums, names ─▶ extract into an unfinished folder ─▶ restored once ─▶ entry
//! ```

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use machinery::config::find_interface;
use machinery::{Error, Result};

use super::arguments::forward;
use super::context::Context;
use super::create::folder_of;
use super::info::{DISK, INFO, Info};
use super::make::prove;
use super::options::Ready;
use super::publish::{Made, expect_free, publish};
use super::unfinished::Unfinished;
use super::{archive, interrupt};

/// The machine to import.
#[derive(Debug, Clone, Args)]
pub struct ImportArchive {
    /// File of `machine export`
    pub file: PathBuf,
    /// Another name for the machine
    #[arg(long)]
    pub name: Option<String>,
    /// Another address of the machine: the guest keeps the one that it has inside
    #[arg(long, value_name = "ADDRESS")]
    pub ip: Option<IpAddr>,
    /// Another bridge
    #[arg(long, value_name = "BRIDGE")]
    pub bridge: Option<String>,
    /// Folder in which the machine's folder is made [default: machines in the CWD]
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// Restore the machine without waiting for its agent
    #[arg(long)]
    pub no_agent: bool,
}

/// Imports the machine.
///
/// # Errors
/// The file is damaged or is no exported machine, a value is wrong, or the machine cannot be restored. Nothing of the
/// machine remains then.
pub fn import(context: &Context<'_>, import: &ImportArchive) -> Result<Made> {
    let info = import.adapted(archive::verify(&import.file, context.step)?)?;
    let machine = &info.machine;
    let name = machine.name.clone();
    expect_free(context, &name, &machine.ip, Some(&machine.mac))?;
    find_interface(&machine.bridge).map_err(|error| error.machine(&name).advice("Give another --bridge"))?;
    let folder = folder_of(context, import.folder.as_deref(), &name)?;
    interrupt::clear_when_interrupted(&name, context.globals.clone())?;
    let mut unfinished = Unfinished::begin(context.cwd, &name, &folder)?;
    let made = (|| {
        archive::extract(&import.file, &folder, context.step)?;
        expect_whole(&folder.join(DISK))?;
        std::fs::remove_file(folder.join(INFO))
            .map_err(|error| Error::io("replace", &folder.join(INFO), &error))?;
        info.write(&folder)?;
        let ready = Ready {
            ready_after: import.no_agent.then_some(0),
            ready_key: false,
            timeout: 0,
            screenshot: None,
        };
        let readiness = prove(context, &info, &ready, &mut unfinished, &folder)?;
        publish(context, &name, &folder, readiness)
    })();
    unfinished.conclude(context, &folder, made)
}

impl ImportArchive {
    /// Returns the description with the values of this host.
    fn adapted(&self, mut info: Info) -> Result<Info> {
        let machine = &mut info.machine;
        machine.base = None;
        if let Some(name) = &self.name {
            machine.name.clone_from(name);
        }
        let port = machine.agent_port;
        if let Some(ip) = self.ip.map(|ip| ip.to_string()) {
            let (old, new) =
                (format!("hostfwd=tcp:{}:{port}-", machine.ip), format!("hostfwd=tcp:{ip}:{port}-"));
            if let Some(netdev) = machine.start_args.iter_mut().find(|arg| arg.contains(&old)) {
                // Only this host may reach the agent by it.
                self.ip.map(|ip| forward(ip, port)).transpose()?;
                *netdev = netdev.replace(&old, &new);
            }
            machine.ip = ip;
        }
        if let Some(bridge) = &self.bridge {
            let (old, new) = (format!("br={}", machine.bridge), format!("br={bridge}"));
            for arg in machine.start_args.iter_mut().filter(|arg| arg.starts_with("bridge,")) {
                *arg = arg.replace(&old, &new);
            }
            machine.bridge.clone_from(bridge);
        }
        Ok(info)
    }
}

/// Expects that a disk depends on no other file. Source: QEMU's docs/interop/qcow2.txt.
fn expect_whole(disk: &Path) -> Result<()> {
    /// The bit of an external data file among the incompatible features.
    const DATA_FILE: u64 = 1 << 2;
    let mut header = [0; 80];
    let read = File::open(disk).and_then(|mut file| file.read_exact(&mut header));
    read.map_err(|error| Error::io("read", disk, &error))?;
    let number = |at: usize| header[at..at + 8].iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    let is_qcow2_3 = header.starts_with(b"QFI\xfb\0\0\0\x03");
    if is_qcow2_3 && number(8) == 0 && number(72) & DATA_FILE == 0 {
        return Ok(());
    }
    Err(Error::configuration("the disk in the archive is no qcow2, or depends on another file")
        .advice("Export the machine again"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn disk_is_refused_when_it_depends_on_another_file() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        let mut whole = vec![0; 104];
        whole[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        let is_whole = |content: &[u8]| {
            fs::write(&disk, content).unwrap();
            expect_whole(&disk).is_ok()
        };
        assert!(is_whole(&whole));
        for (at, byte) in [(15, 1), (79, 4), (7, 2), (0, b'x')] {
            let mut other = whole.clone();
            other[at] = byte;
            assert!(!is_whole(&other), "{at}");
        }
        assert!(!is_whole(&whole[..40]));
    }
}
