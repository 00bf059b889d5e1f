//! An installed Debian: a disk with a root file system, and the kernel that is installed there.
//!
//! `debootstrap` installs a minimal Debian with a kernel and busybox. Its init is the script beside this file: a static
//! address, and a web server on the agent's port and on port 80. Only root can make it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error};
use crate::{Result, cache, command};

const PACKAGES: &str = "linux-image-cloud-amd64,busybox-static";
const INIT: &str = include_str!("debian/init.sh");
/// The web server's answer to `GET /`.
const INDEX: &str = "{\"message\": \"Debian guest\"}\n";

/// The size of the root file system, most of which stays empty.
const SIZE: &str = "1G";
/// Folders that the guest does not need.
const UNUSED: [&str; 4] = ["usr/share/doc", "usr/share/locale", "usr/share/man", "var/cache/apt"];

/// The release and the mirror if the computer's own is not Debian.
const DEFAULT: (&str, &str) = ("bookworm", "http://deb.debian.org/debian");

/// The kernel's arguments, with the guest's address and that of its gateway.
pub const APPEND: &str = "root=/dev/vda rw console=ttyS0 quiet panic=-1 init=/init-guest";
/// The address that is set in the guest.
pub const ADDRESS: &str = "192.168.30.11";
/// The port of a web server beside the agent.
pub const WEB_PORT: u16 = 80;

/// The files of the Debian, in the cache.
#[derive(Debug, Clone)]
pub struct Debian {
    folder: PathBuf,
}

impl Debian {
    /// Returns the installed Debian. Makes it if it does not exist, which needs root and a network.
    pub fn installed() -> Result<Debian> {
        let cache = cache::open(&cache::default()?)?;
        let (release, mirror) = archive();
        let content = cache::fingerprint(&(PACKAGES, INIT, INDEX, SIZE, UNUSED, &release));
        let folder = cache::folder(&cache, &format!("debian-{content}"), |folder| {
            let system = folder.join("system");
            install(&system, &release, &mirror)?;
            for (part, name) in [("vmlinuz-", "vmlinuz"), ("initrd.img-", "initrd.img")] {
                let from = boot_file(&system, part)?;
                fs::copy(&from, folder.join(name)).context(|| format!("copying {}", from.display()))?;
            }
            make_disk(folder, &system)?;
            fs::remove_dir_all(&system).context(|| format!("removing {}", system.display()))
        })?;
        Ok(Debian { folder })
    }

    /// Returns the installed disk, which all tests share: it must not be changed.
    pub fn disk(&self) -> PathBuf {
        self.folder.join("disk.qcow2")
    }

    /// Returns the installed kernel and its initramfs.
    pub fn boot_files(&self) -> [PathBuf; 2] {
        ["vmlinuz", "initrd.img"].map(|name| self.folder.join(name))
    }
}

/// Returns the release and the mirror that this computer's apt uses.
fn archive() -> (String, String) {
    let mut apt = Command::new("apt-get");
    apt.args(["indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)", "Created-By: Packages"]);
    let targets = command::output(&mut apt).unwrap_or_default();
    let of_debian = targets.lines().find_map(|line| {
        let mut words = line.split(' ').filter(|word| !word.is_empty());
        let (origin, release, mirror) = (words.next()?, words.next()?, words.next()?);
        // Updates have names such as `bookworm-updates`.
        (origin == "Debian" && !release.contains('-')).then(|| (release.to_owned(), mirror.to_owned()))
    });
    of_debian.unwrap_or_else(|| (DEFAULT.0.to_owned(), DEFAULT.1.to_owned()))
}

fn install(system: &Path, release: &str, mirror: &str) -> Result<()> {
    let mut debootstrap = Command::new("debootstrap");
    debootstrap.args(["--variant=minbase", &format!("--include={PACKAGES}"), release]);
    command::output(debootstrap.arg(system).arg(mirror))?;
    for folder in UNUSED.map(|folder| system.join(folder)) {
        fs::remove_dir_all(&folder).context(|| format!("removing {}", folder.display()))?;
    }
    let write = |name: &str, text: &str, mode: u32| {
        let path = system.join(name);
        let written = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&path, text));
        let written = written.and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)));
        written.context(|| format!("writing {}", path.display()))
    };
    write("init-guest", INIT, 0o755)?;
    write("www/index.html", INDEX, 0o644)
}

fn boot_file(system: &Path, part: &str) -> Result<PathBuf> {
    let folder = system.join("boot");
    let entries = fs::read_dir(&folder).context(|| format!("reading {}", folder.display()))?;
    let mut names = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(part));
    names.next().map(|entry| entry.path()).ok_or_else(|| Error::new(format!("no {part} is installed")))
}

/// Makes the disk without a mount.
fn make_disk(folder: &Path, system: &Path) -> Result<()> {
    let (raw, disk) = (folder.join("disk.raw"), folder.join("disk.qcow2"));
    // The path of a user lacks the administrator's programs.
    let mut mkfs = Command::new("/sbin/mkfs.ext4");
    command::output(mkfs.args(["-q", "-d"]).arg(system).arg(&raw).arg(SIZE))?;
    let options = "lazy_refcounts=on,cluster_size=2M";
    let mut convert = Command::new("qemu-img");
    command::output(convert.args(["convert", "-O", "qcow2", "-o", options]).args([&raw, &disk]))?;
    fs::remove_file(&raw).context(|| format!("removing {}", raw.display()))
}
