//! The Linux guest: a real operating system with an agent, a disk and a network.
//!
//! The guest is Debian's cloud kernel and a static busybox in an initramfs. Both come from Debian's packages,
//! by `apt-get download` and `dpkg-deb`; nothing is installed. Its user space is the shell scripts beside
//! this file. An agent answers on port 8000, and the power button turns the guest off. A run can leave marks
//! in RAM and on the disk, which must not be there after the next restore.
//!
//! On a [`TestNetwork`](crate::lab::TestNetwork) it sends traffic without end, also while its snapshot is
//! made. A restored guest therefore sends from its first moment. Every few milliseconds a datagram with a
//! running number goes to [`COUNTED_PORT`]. It also sends DNS queries, connects to other ports, and sends
//! data to the result server.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cpio::Archive;

use crate::error::{Context, Error};
use crate::{Result, cache, command};

/// Kernel modules in the order of their dependencies. A missing module is built into the kernel.
pub(super) const MODULES: [&str; 11] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
    "button",
    "evdev",
];

/// The agent's answer to `GET /`.
const INDEX: &str = "{\"message\": \"Test guest agent\", \"version\": \"0.1\", \"features\": []}\n";
const HTTPD_CONF: &str = "I:index.json\n.json:application/json\n";
const INIT: &str = include_str!("linux/init.sh");
const MARK: &str = include_str!("linux/mark.sh");
const MARKS: &str = include_str!("linux/marks.sh");
const TALK: &str = include_str!("linux/talk.sh");

/// The line on the serial console that shows that the guest is up and idle.
pub const READY: &str = "guest ready";

/// The host's UDP port to which the guest counts.
pub const COUNTED_PORT: u16 = 514;

/// Returns the number in such a datagram.
pub fn count_in(datagram: &[u8]) -> Option<u32> {
    std::str::from_utf8(datagram).ok()?.split_whitespace().next_back()?.parse().ok()
}

/// A kernel and its initramfs, in the cache. QEMU boots them directly.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    folder: PathBuf,
}

impl Image {
    /// Returns the image in `cache`. Makes it if it does not exist, which needs a network.
    pub(crate) fn in_cache(cache: &Path) -> Result<Self> {
        let content = cache::fingerprint(&[INDEX, HTTPD_CONF, INIT, MARK, MARKS, TALK, &MODULES.join(" ")]);
        let folder = cache::folder(cache, &format!("linux-image-{content}"), build)?;
        Ok(Self { folder })
    }

    /// Returns the image that is in this folder.
    pub(super) fn at(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Returns the kernel, for `-kernel`.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// Returns the initramfs, for `-initrd`.
    pub(crate) fn initramfs(&self) -> PathBuf {
        self.folder.join("initramfs")
    }
}

fn build(folder: &Path) -> Result<()> {
    build_with(folder, initramfs)
}

/// Makes an image. `initramfs` makes its user space of the unpacked packages.
pub(super) fn build_with(folder: &Path, initramfs: impl FnOnce(&Path) -> Result<Vec<u8>>) -> Result<()> {
    let unpacked =
        tempfile::tempdir_in(folder).context(|| format!("making a folder in {}", folder.display()))?;
    for package in [kernel_package()?.as_str(), "busybox-static"] {
        unpack(package, unpacked.path())?;
    }
    let kernel = find(&unpacked.path().join("boot"), |name| name.starts_with("vmlinuz-"))?;
    let kernel = kernel.ok_or_else(|| Error::new("Debian's kernel package holds no boot/vmlinuz-*"))?;
    copy(&kernel, &folder.join("vmlinuz"))?;
    let archive = initramfs(unpacked.path())?;
    let path = folder.join("initramfs");
    fs::write(&path, archive).context(|| format!("writing {}", path.display()))
}

/// Returns the package of the kernel: `linux-image-cloud-amd64` only depends on the newest.
fn kernel_package() -> Result<String> {
    let depends = command::output(Command::new("apt-cache").args(["depends", "linux-image-cloud-amd64"]))?;
    let mut names = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    names.find(|name| name.starts_with("linux-image-")).map(str::to_owned).ok_or_else(|| {
        Error::new(
            "apt knows no linux-image-cloud-amd64, which the Linux guest is made of: run `apt-get update`",
        )
    })
}

fn unpack(package: &str, into: &Path) -> Result<()> {
    let download = into.join("download");
    fs::create_dir_all(&download).context(|| format!("making {}", download.display()))?;
    command::output(Command::new("apt-get").args(["-q", "download", package]).current_dir(&download))?;
    let deb = find(&download, |name| name.starts_with(package))?;
    let deb = deb.ok_or_else(|| Error::new(format!("`apt-get download {package}` left no file")))?;
    command::output(Command::new("dpkg-deb").arg("-x").args([deb.as_path(), into]))?;
    Ok(())
}

fn initramfs(root: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    add_user_space(&mut archive, root)?;
    archive.program("init", INIT.as_bytes());
    Ok(archive.finish())
}

/// Returns the init script.
pub(super) fn init() -> &'static str {
    INIT
}

/// Adds all files of the guest but its init script.
pub(super) fn add_user_space(archive: &mut Archive, root: &Path) -> Result<()> {
    for folder in ["bin", "etc", "modules", "www", "www/cgi-bin"] {
        archive.folder(folder);
    }
    archive.program("bin/talk", TALK.as_bytes());
    archive.program("www/cgi-bin/mark", MARK.as_bytes());
    archive.program("www/cgi-bin/marks", MARKS.as_bytes());
    archive.file("www/index.json", INDEX.as_bytes());
    archive.file("etc/httpd.conf", HTTPD_CONF.as_bytes());
    add_system(archive, root)
}

/// Adds busybox to `bin`, and the kernel modules to `modules`.
pub(super) fn add_system(archive: &mut Archive, root: &Path) -> Result<()> {
    let busybox = ["bin/busybox", "usr/bin/busybox"]
        .map(|path| root.join(path))
        .into_iter()
        .find(|path| path.is_file());
    let busybox = busybox.ok_or_else(|| Error::new("Debian's busybox-static package holds no busybox"))?;
    archive.program("bin/busybox", &content(&busybox)?);
    for (order, module) in MODULES.iter().enumerate() {
        add_module(archive, root, order, module)?;
    }
    Ok(())
}

/// Adds a kernel module, which is loaded in that order.
pub(super) fn add_module(archive: &mut Archive, root: &Path, order: usize, module: &str) -> Result<()> {
    let Some(file) = find(root, |name| is_module(name, module))? else { return Ok(()) };
    archive.file(&format!("modules/{order:02}-{module}.ko"), &content(&file)?);
    Ok(())
}

fn is_module(file: &str, module: &str) -> bool {
    let stem = file.strip_suffix(".xz").unwrap_or(file).strip_suffix(".ko");
    stem.is_some_and(|stem| stem.replace('-', "_") == module)
}

/// Returns the first plain file below `folder` whose name is `wanted`.
fn find(folder: &Path, wanted: impl Fn(&str) -> bool + Copy) -> Result<Option<PathBuf>> {
    let what = || format!("looking through {}", folder.display());
    for entry in fs::read_dir(folder).context(what)? {
        let entry = entry.context(what)?;
        let kind = entry.file_type().context(what)?;
        if kind.is_file() && entry.file_name().to_str().is_some_and(wanted) {
            return Ok(Some(entry.path()));
        }
        let below = if kind.is_dir() { find(&entry.path(), wanted)? } else { None };
        if below.is_some() {
            return Ok(below);
        }
    }
    Ok(None)
}

pub(super) fn content(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).context(|| format!("reading {}", path.display()))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).context(|| format!("copying {} to {}", from.display(), to.display()))?;
    Ok(())
}
