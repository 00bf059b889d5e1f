//! The guest of CAPE's analyses: a minimal Debian with CAPE's own agent, which `$CAPE_SOURCE` has.
//!
//! CAPE's analyser for Linux is a Python program that CAPE sends to the agent. It needs a Python, pyinotify and strace,
//! which `debootstrap` installs; only root can run it. The kernel is that of the [`linux`] guest.
//!
//! Its network is a [`TestNetwork`](crate::lab::TestNetwork) with
//! [a bridge](crate::lab::TestNetwork::add_machines): CAPE's result server knows a machine by its address.

use std::fs;
use std::io::Cursor;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::Archive;
use super::linux::{self, Image};
use crate::error::{Context, Error};
use crate::snapshot::SnapshotFormat;
use crate::{Result, cache, command};

/// The variable with the path of a checkout of CAPEv2.
pub const CAPE_SOURCE: &str = "CAPE_SOURCE";

/// The guest's RAM, in MiB. Its whole file system is in it.
pub(super) const RAM_MIB: u32 = 448;

/// The last Debian whose Python has the module `asyncore`, which pyinotify needs.
const RELEASE: &str = "bookworm";
const PACKAGES: &str = "python3-minimal,libpython3-stdlib,python3-pyinotify,strace,sudo,iproute2,kmod";

/// Folders that a guest without a package manager and a reader does not need.
const UNUSED: [&str; 7] =
    ["boot", "dev", "usr/share/doc", "usr/share/locale", "usr/share/man", "var/cache/apt", "var/lib/apt"];

const INIT: &str = include_str!("cape/init.sh");

/// Returns the image of the guest. Makes it if it does not exist, which needs a network and root.
pub(super) fn image(cache: &Path) -> Result<Image> {
    let source = std::env::var_os(CAPE_SOURCE).filter(|path| !path.is_empty()).map(PathBuf::from);
    let source = source.ok_or_else(|| Error::new(format!("{CAPE_SOURCE} names no checkout of CAPEv2")))?;
    let agent = linux::content(&source.join("agent/agent.py"))?;
    let content = cache::fingerprint(&(&agent, INIT, PACKAGES, RELEASE, UNUSED, linux::MODULES));
    let folder = cache::folder(cache, &format!("cape-image-{content}"), |folder| {
        let system = folder.join("system");
        install(&system)?;
        linux::build_with(folder, |unpacked| initramfs(&system, unpacked, &agent))?;
        fs::remove_dir_all(&system).context(|| format!("removing {}", system.display()))
    })?;
    Ok(Image::at(folder))
}

/// Installs the Debian.
fn install(system: &Path) -> Result<()> {
    let mut debootstrap = Command::new("debootstrap");
    debootstrap.args(["--variant=minbase", &format!("--include={PACKAGES}"), RELEASE]).arg(system);
    command::output(&mut debootstrap)?;
    for folder in UNUSED.map(|folder| system.join(folder)) {
        fs::remove_dir_all(&folder).context(|| format!("removing {}", folder.display()))?;
    }
    Ok(())
}

fn initramfs(system: &Path, unpacked: &Path, agent: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    add(&mut archive, system, system)?;
    for folder in ["dev", "modules"] {
        archive.folder(folder);
    }
    archive.program("init", INIT.as_bytes());
    archive.file("agent.py", agent);
    linux::add_system(&mut archive, unpacked)?;
    let mut packed = Vec::new();
    let packing = SnapshotFormat::Gzip.write(&mut Cursor::new(archive.finish()), &mut packed);
    packing.context(|| "packing the guest's files".to_owned())?;
    Ok(packed)
}

/// Adds the files below a folder of the system. A parent comes before its entries, and links before the files that are
/// reached by them.
fn add(archive: &mut Archive, system: &Path, folder: &Path) -> Result<()> {
    let what = || format!("reading {}", folder.display());
    let mut folders = Vec::new();
    for entry in fs::read_dir(folder).context(what)? {
        let path = entry.context(what)?.path();
        let name = path.strip_prefix(system).unwrap_or(&path).to_string_lossy().into_owned();
        let metadata = fs::symlink_metadata(&path).context(what)?;
        if metadata.is_symlink() {
            archive.link(&name, &fs::read_link(&path).context(what)?.to_string_lossy());
        } else if metadata.is_dir() {
            archive.folder(&name);
            folders.push(path);
        } else if metadata.permissions().mode() & 0o100 != 0 {
            archive.program(&name, &linux::content(&path)?);
        } else if metadata.is_file() {
            archive.file(&name, &linux::content(&path)?);
        }
    }
    folders.iter().try_for_each(|folder| add(archive, system, folder))
}
