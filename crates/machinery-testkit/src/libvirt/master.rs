//! Masters: guests with a snapshot, made once.
//!
//! The snapshot is inside the disk. Its description has the domain's name, folder and UUID, which are
//! replaced for each domain.

use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Libvirtd;
use super::domain::{DISK, Identity, SERIAL, xml};
use crate::error::{Context, Error};
use crate::guest::recipe::Recipe;
use crate::guest::serial::{SerialWatch, counts};
use crate::guest::{Guest, GuestProbe, Qemu, linux};
use crate::network::loopback_address;
use crate::{Result, cache, command};

/// The name of a domain's snapshot.
pub const SNAPSHOT: &str = "clean";

/// The maximum time of a boot, on a busy machine.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);

/// The count at which the micro guest's snapshot is made. A cold boot starts at 1.
const SNAPSHOT_COUNT: u32 = 64;

/// Increment it to invalidate masters of an older testkit.
const GENERATION: u32 = 1;

const DESCRIPTION: &str = "snapshot.xml";
const COUNT: &str = "count";

/// A guest with a snapshot.
#[derive(Debug, Clone)]
pub struct Master {
    qemu: Qemu,
    recipe: Recipe,
    folder: PathBuf,
}

impl Master {
    pub(super) fn in_cache(cache: &Path, qemu: &Qemu, guest: Guest) -> Result<Self> {
        if let Guest::TrafficSource | Guest::Analysis { .. } = guest {
            return Err(Error::new(format!("{guest:?} cannot be a domain: a domain has no test network")));
        }
        let cache = cache::open(cache)?;
        let recipe = Recipe::of(guest, &cache)?;
        let virsh = command::output(std::process::Command::new("virsh").arg("--version"))?;
        let content = cache::fingerprint(&(GENERATION, xml(qemu, &recipe, &placeholders())));
        let name = format!("{}-libvirt-{}-{content}", recipe.name(qemu)?, virsh.trim());
        let folder = cache::folder(&cache, &name, |folder| build(qemu, &recipe, folder))?;
        Ok(Master { qemu: qemu.clone(), recipe, folder })
    }

    /// Returns the first count of the micro guest after a restore.
    pub fn restored_count(&self) -> Result<u32> {
        let path = self.folder.join(COUNT);
        let what = || format!("reading {}", path.display());
        fs::read_to_string(&path).context(what)?.parse().context(what)
    }

    /// Defines a domain of the guest, with its snapshot as the current one. Its files are in the folder of
    /// `probe`, and its agent answers at the address of `probe`.
    pub fn define(&self, libvirtd: &Libvirtd, label: &str, probe: &GuestProbe) -> Result<PathBuf> {
        let dir = probe.serial.parent().unwrap_or(Path::new("/"));
        let disk = dir.join(DISK);
        fs::copy(self.folder.join(DISK), &disk).context(|| format!("copying {}", disk.display()))?;
        let identity = Identity {
            name: label.to_owned(),
            uuid: uuid(),
            dir: dir.display().to_string(),
            agent: probe.ip.clone(),
        };
        libvirtd.virsh_with_file(&["define"], &xml(&self.qemu, &self.recipe, &identity), &[])?;
        let path = self.folder.join(DESCRIPTION);
        let description = fs::read_to_string(&path).context(|| format!("reading {}", path.display()))?;
        let description = replaced(&description, &placeholders(), &identity);
        libvirtd.virsh_with_file(&["snapshot-create", label], &description, &["--redefine", "--current"])?;
        Ok(disk)
    }
}

/// Returns the master of `guest` from `$CUCKOO_TESTKIT_CACHE`, or the user's cache folder. Makes it if it
/// does not exist.
pub fn master(qemu: &Qemu, guest: Guest) -> Result<Master> {
    Master::in_cache(&cache::default()?, qemu, guest)
}

/// Boots the guest in `folder`, and takes its snapshot.
fn build(qemu: &Qemu, recipe: &Recipe, folder: &Path) -> Result<()> {
    recipe.make_disk(qemu, &folder.join(DISK))?;
    // A cache's path may be too long for libvirtd's sockets.
    let work = tempfile::tempdir().context(|| "making a folder for libvirtd".to_owned())?;
    let libvirtd = Libvirtd::start(work.path())?;
    let identity = Identity {
        name: "master".to_owned(),
        uuid: uuid(),
        dir: folder.display().to_string(),
        agent: loopback_address().to_string(),
    };
    libvirtd.virsh_with_file(&["define"], &xml(qemu, recipe, &identity), &[])?;
    let serial = folder.join(SERIAL);
    let watch = SerialWatch::new(&serial)?;
    libvirtd.virsh(&["start", &identity.name])?;
    let ready = |said: &str| match recipe {
        Recipe::Micro | Recipe::Vmcloak => counts(said).find(|count| *count >= SNAPSHOT_COUNT).map(drop),
        Recipe::Linux { .. } | Recipe::Analysis { .. } => said.contains(linux::READY).then_some(()),
    };
    watch.wait_for(BOOT_TIMEOUT, None, ready)?;
    libvirtd.virsh(&["snapshot-create-as", &identity.name, SNAPSHOT])?;
    libvirtd.virsh(&["destroy", &identity.name])?;
    if let Recipe::Micro | Recipe::Vmcloak = recipe {
        let count = first_count(&libvirtd, &identity, &serial)?;
        write(&folder.join(COUNT), &count.to_string())?;
    }
    let description = libvirtd.virsh(&["snapshot-dumpxml", "--security-info", &identity.name, SNAPSHOT])?;
    write(&folder.join(DESCRIPTION), &replaced(&description, &identity, &placeholders()))?;
    fs::remove_file(&serial).context(|| format!("removing {}", serial.display()))
}

/// Returns the first count after a restore, which is always the same.
fn first_count(libvirtd: &Libvirtd, identity: &Identity, serial: &Path) -> Result<u32> {
    let watch = SerialWatch::new(serial)?;
    libvirtd.virsh(&["snapshot-revert", &identity.name, SNAPSHOT])?;
    let count = watch.wait_for(BOOT_TIMEOUT, None, |said| counts(said).next())?;
    libvirtd.virsh(&["destroy", &identity.name])?;
    Ok(count)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).context(|| format!("writing {}", path.display()))
}

fn placeholders() -> Identity {
    Identity {
        name: "@NAME@".to_owned(),
        uuid: "@UUID@".to_owned(),
        dir: "@DIR@".to_owned(),
        agent: "@AGENT@".to_owned(),
    }
}

/// Replaces the identity in a description.
fn replaced(description: &str, old: &Identity, new: &Identity) -> String {
    let name = |identity: &Identity| format!("<name>{}</name>", identity.name);
    let pairs = [(&old.uuid, &new.uuid), (&old.dir, &new.dir), (&old.agent, &new.agent)];
    let named = description.replace(&name(old), &name(new));
    pairs.into_iter().fold(named, |text, (old, new)| text.replace(old, new))
}

/// Returns a random UUID.
fn uuid() -> String {
    let random = || RandomState::new().build_hasher().finish();
    let (a, b) = (random(), random());
    format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        a >> 32,
        a >> 16 & 0xffff,
        a & 0xfff,
        b >> 48 & 0xfff,
        b & 0xffff_ffff_ffff
    )
}
