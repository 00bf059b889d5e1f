//! Save images: the snapshot's memory in a file of its own, from which a restore is faster.
//!
//! An internal snapshot keeps the memory inside the disk, and QEMU reads it from there in small pieces. A
//! domain that libvirt has *saved* is in a plain file, which QEMU reads in one go. So a machine is reverted to
//! its snapshot once and saved. From then on it is restored from that file, after `qemu-img` has reverted the
//! disk.
//!
//! Measured at the host's socket with libvirt 9.0 and QEMU 7.2 on two busy cores, alternating, medians of 14:
//!
//! - A Linux guest with 600 MiB of noise in 1 GiB takes 0.8 s instead of 2.1 s. The best times are 0.5 s and
//!   1.1 s; the image takes a third of the processor time. `qemu-img` takes 0.03 s of that.
//! - The micro guest takes 0.26 s either way, which is the start of QEMU. Small guests gain nothing, so
//!   `auto` makes no image for them.
//!
//! The domain keeps its own disk, without an overlay over it. An overlay would save the work of `qemu-img`.
//! But a snapshot that an operator takes of a running machine would be lost with the overlay, and QEMU's user
//! would need access to its folder. libvirt's own disposable disks (`<transient/>`) do not work for a
//! restored domain: libvirt 9.0 lets it write to the disk itself.
//!
//! An image is valid as long as snapshot and domain are unchanged. Beside each image is a text that describes
//! its origin: the snapshot, the disks, the other files of the domain, and the domain's description. If the text
//! differs from the present state, the image is not used and made again. No other host uses the folder of the images
//! meanwhile: [`ImageFolders`](super::ImageFolders).

use std::fs;
use std::path::{Path, PathBuf};

use machinery::trust::expect_trusted;
use machinery::{Error, Result, format_bytes};
use machinery_backend::{Cancellation, files};
use serde::Deserialize;
use virt::connect::Connect;
use virt::domain::Domain;
use virt_sys as sys;

use super::disks::Disks;
use super::save;
use crate::description::Description;
use crate::domain::{self, max_memory};
use crate::errors::explain;
use crate::files::Identity;
use crate::snapshot::Snapshot;

/// A guest with less memory than this, in bytes, gains nothing from an image.
const MIN_IMAGE_MEMORY: u64 = 512 << 20;

/// The description of an image that is being made.
const UNFINISHED: &str = "unfinished\n";

/// The machines that have save images: the key `instant`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InstantMode {
    /// No machine.
    Off,
    /// Each machine where an image is possible.
    On,
    /// Each machine where an image is possible and makes restores faster.
    #[default]
    Auto,
}

/// The image of one machine. Its files may not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    mode: InstantMode,
    /// The computer of libvirt, if it is another one.
    host: Option<String>,
    file: PathBuf,
    /// The file with the description of the origin.
    origin_file: PathBuf,
}

/// The origin of an image: the domain at its snapshot.
pub struct Source {
    disks: Disks,
    /// The description of the origin. An image is valid if its own is equal.
    origin: String,
}

impl Source {
    /// Reverts the domain's disks to the snapshot.
    ///
    /// # Errors
    /// qemu-img fails.
    pub fn revert_disks(&self, snapshot: &Snapshot) -> Result<()> {
        self.disks.revert_to(&snapshot.identity.name)
    }
}

impl Image {
    /// Returns the image of that machine, in the folder for save images.
    pub fn of(machine: &str, mode: InstantMode, folder: &Path) -> Image {
        let file = |ending: &str| folder.join(format!("{machine}.{ending}"));
        Image { mode, host: None, file: file("machinery-image"), origin_file: file("machinery-image-of") }
    }

    /// Returns the image with libvirt's computer set; no save image is made for another computer.
    #[must_use]
    pub fn of_host(self, host: Option<&str>) -> Image {
        Image { host: host.map(str::to_owned), ..self }
    }

    /// Explains why no save image is made although the configuration allows it, for people.
    pub fn unavailable_reason(&self) -> Option<String> {
        let host = self.host.as_ref()?;
        Some(format!("save images are made of a libvirt on this computer only, and this one is on {host}"))
    }

    /// Reports whether both images have the same file.
    pub fn has_same_file(&self, other: &Image) -> bool {
        self.file == other.file
    }

    /// Returns the folder of the image.
    pub fn folder(&self) -> &Path {
        self.file.parent().unwrap_or(Path::new("/"))
    }

    /// Reports whether the image is never made.
    pub fn is_off(&self) -> bool {
        self.mode == InstantMode::Off
    }

    /// Expects that the configuration wants an image of that domain.
    ///
    /// # Errors
    /// It does not; the text says why, for people.
    pub fn ensure_useful(&self, domain: &Domain) -> Result<(), String> {
        let largest = max_memory(domain).map_err(|error| error.to_string())?;
        match self.mode {
            InstantMode::Off => Err("instant is off".to_owned()),
            InstantMode::Auto if largest < MIN_IMAGE_MEMORY => {
                Err("a save image would gain nothing with so little memory".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// Removes an outdated image, and expects enough space for another one. An image is at most as large as
    /// the memory, and must leave as much space free.
    ///
    /// # Errors
    /// There is too little space; the text says how much, for people.
    pub fn ensure_space(&self, domain: &Domain) -> Result<(), String> {
        self.remove();
        let largest = max_memory(domain).map_err(|error| error.to_string())?;
        let folder = self.folder();
        match files::free_space(folder) {
            Ok(space) if space >= largest.saturating_mul(2) => Ok(()),
            Ok(space) => Err(format!(
                "there is not enough space for a save image: {} are free in {}; it takes up to {}, and as much must stay free",
                format_bytes(space),
                folder.display(),
                format_bytes(largest)
            )),
            Err(error) => Err(format!("no save image can be made in {}: {error}", folder.display())),
        }
    }

    /// Returns the origin of an image of that snapshot.
    ///
    /// # Errors
    /// No image can be made; the text says why, for people.
    pub fn source(&self, domain: &Domain, snapshot: &Snapshot) -> Result<Source, String> {
        if snapshot.description.external || !snapshot.has_memory() {
            return Err("save images are made of internal snapshots with memory only".to_owned());
        }
        if snapshot.identity.name.parse::<u64>().is_ok() {
            // qemu-img looks for a snapshot of that number first.
            return Err("the snapshot's name is a number, which qemu-img cannot use as a name".to_owned());
        }
        let xml = domain
            .xml_desc(sys::VIR_DOMAIN_XML_INACTIVE)
            .map_err(|error| explain("describe the domain", &error).to_string())?;
        let description = Description::read(&xml).map_err(|error| error.to_string())?;
        let disks = Disks::of(&description)?;
        disks.ensure_writable()?;
        let (name, created) = (&snapshot.identity.name, &snapshot.identity.created);
        let files = Identity::of(&description).to_text().map_err(|error| error.to_string())?;
        let origin = format!("{name}\n{created}\n{}{files}{xml}", disks.described(name)?);
        Ok(Source { disks, origin })
    }

    /// Reports whether there is an image, valid or not.
    pub fn exists(&self) -> bool {
        self.origin_file.exists()
    }

    /// Reports whether there is an image of that origin, which only trusted users could have changed.
    pub fn has_origin(&self, source: &Source) -> bool {
        let has_origin = fs::read_to_string(&self.origin_file).is_ok_and(|origin| origin == source.origin);
        has_origin && self.file.exists() && self.is_trusted()
    }

    fn is_trusted(&self) -> bool {
        let judged = [&self.file, &self.origin_file].into_iter().map(|path| expect_trusted(path));
        let untrusted =
            judged.filter_map(Result::err).inspect(|error| tracing::warn!(%error, "save image not used"));
        untrusted.count() == 0
    }

    /// Returns the size of the image, in bytes.
    pub fn size(&self) -> u64 {
        fs::metadata(&self.file).map_or(0, |file| file.len())
    }

    /// Makes the image of a domain that is off. The domain is off again afterwards.
    ///
    /// # Errors
    /// The image cannot be made, or the preparation is cancelled. The domain may be in any state then.
    pub fn make(
        &self,
        connect: &Connect,
        domain: &Domain,
        snapshot: &Snapshot,
        cancellation: &Cancellation,
    ) -> Result<()> {
        self.remove();
        let file = self.path_text()?;
        // A file without a description is not an own image.
        if self.file.exists() {
            let what = format!("{file} exists, and is not a save image of this host");
            return Err(Error::environment(what).advice("Move it away, or set another instant_dir"));
        }
        let before = self.source(domain, snapshot).map_err(Error::failed)?.disks;
        let written = before.written();
        snapshot.revert_paused()?;
        cancellation.ensure_wanted()?;
        // A revert also restores the domain's description of that time.
        let source = self.source(domain, snapshot).map_err(Error::failed)?;
        if source.disks != before {
            return Err(Error::failed("the snapshot has other disks than the domain had before the revert"));
        }
        if !before.written().iter().zip(&written).all(|(now, then)| now != then) {
            let what = "libvirt has other files under the paths of the domain's disks than this host";
            return Err(Error::environment(what).advice("Set instant: off"));
        }
        // Looked up again, because a reverted domain object does not know its new id.
        let label = domain.name().map_err(|error| explain("return the domain's name", &error))?;
        // From here on there may be an unfinished image, which `remove` deletes.
        self.write_origin(UNFINISHED)?;
        save::save(&domain::domain(connect, &label)?, file)?;
        self.write_origin(&source.origin)
    }

    fn write_origin(&self, text: &str) -> Result<()> {
        fs::write(&self.origin_file, text)
            .map_err(|error| Error::io("write the description of a save image to", &self.origin_file, &error))
    }

    /// Starts the domain, which is off, from the image, and leaves it paused. The disks must be reverted first.
    ///
    /// # Errors
    /// The domain cannot be started. It may be in any state then.
    pub fn restore(&self, connect: &Connect) -> Result<()> {
        connect
            .restore_domain_flags(self.path_text()?, None, sys::VIR_DOMAIN_SAVE_PAUSED)
            .map_err(|error| explain("restore the domain from its save image", &error))
    }

    /// Removes the image, if there is one. A file without a description is somebody else's.
    pub fn remove(&self) {
        if !self.exists() {
            return;
        }
        for error in [&self.file, &self.origin_file].into_iter().filter_map(|path| files::remove(path).err())
        {
            tracing::warn!(%error, "a save image remains");
        }
    }

    fn path_text(&self) -> Result<&str> {
        self.file.to_str().ok_or_else(|| {
            Error::environment(format!("libvirt takes no path that is not UTF-8: {}", self.file.display()))
        })
    }
}
