//! Save images: the snapshot's memory in a file of its own, for runs that leave the domain's disks as they are.
//!
//! An internal snapshot keeps the memory inside the disk, and QEMU reads it from there in small pieces. A
//! domain that libvirt has *saved* is in a plain file, which QEMU reads in one go. So a machine is reverted to
//! its snapshot once and saved. From then on it is restored from that file.
//!
//! The image describes the domain with an [overlay](super::overlaid) over each disk. A run from the image writes to
//! overlays that are made anew for each run. The domain's own disk is open for reading only, so the next run starts from
//! the same disk whatever a run has done. libvirt's definition of the domain stays as the operator wrote it.
//!
//! libvirt's own disposable disks (`<transient/>`) do not work for a restored domain: libvirt 9.0 lets it write to the
//! disk itself.
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

use super::overlaid::Owner;
use super::save::{self, Format};
use super::source::Source;
use crate::access::Access;
use crate::domain::{self, max_memory};
use crate::errors::explain;
use crate::snapshot::Snapshot;

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
    /// Each machine where an image is possible.
    #[default]
    Auto,
}

/// The image of one machine. Its files may not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    mode: InstantMode,
    /// The overlay of the first disk: its path, or only its name if it lies beside that disk.
    overlay: PathBuf,
    /// The computer of libvirt, if it is another one.
    host: Option<String>,
    file: PathBuf,
    /// The file with the description of the origin.
    origin_file: PathBuf,
}

impl Image {
    /// Returns the image of that machine, in the folder for save images; `overlay` is that of its first disk.
    pub fn of(machine: &str, mode: InstantMode, folder: &Path, overlay: PathBuf) -> Image {
        let file = |ending: &str| folder.join(format!("{machine}.{ending}"));
        Image {
            mode,
            overlay,
            host: None,
            file: file("machinery-image"),
            origin_file: file("machinery-image-of"),
        }
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

    /// Returns the overlay of the first disk: its path, or only its name if it lies beside that disk.
    pub fn overlay(&self) -> &Path {
        &self.overlay
    }

    /// Returns the folder of the image.
    pub fn folder(&self) -> &Path {
        self.file.parent().unwrap_or(Path::new("/"))
    }

    /// Reports whether the image is never made.
    pub fn is_off(&self) -> bool {
        self.mode == InstantMode::Off
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
        Source::of(domain, snapshot, self.overlay())
    }

    /// Reports whether there is an image, valid or not.
    pub fn exists(&self) -> bool {
        self.origin_file.exists()
    }

    /// Reports whether there is an image of that origin, which only trusted users could have changed.
    pub fn has_origin(&self, source: &Source) -> bool {
        self.described().starts_with(&source.origin) && self.file.exists() && self.is_trusted()
    }

    /// Reports whether a new image would be better: with this one, libvirt gives the disks to QEMU's user, who can read them
    /// by now without that.
    ///
    /// # Errors
    /// libvirt does not answer; a file of a disk is missing.
    pub fn has_outdated_owner(&self, connect: &Connect, source: &Source) -> Result<bool> {
        Ok(self.owner(source) == Owner::Qemu && source.access_of_qemu(connect)? == Some(Access::Reads))
    }

    /// Returns the owner of the disks during a run from the image.
    pub fn owner(&self, source: &Source) -> Owner {
        source.owner_in(&self.described())
    }

    fn format(&self, source: &Source) -> Format {
        source.format_in(&self.described())
    }

    fn described(&self) -> String {
        fs::read_to_string(&self.origin_file).unwrap_or_default()
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
        let before = self.source(domain, snapshot).map_err(Error::failed)?;
        // libvirt gives the disks of a domain that is on to QEMU's user.
        let owner = before.owner(connect)?;
        let written = before.disks.written();
        snapshot.revert_paused()?;
        cancellation.ensure_wanted()?;
        // A revert also restores the domain's description of that time.
        let source = self.source(domain, snapshot).map_err(Error::failed)?;
        if source.disks != before.disks {
            return Err(Error::failed("the snapshot has other disks than the domain had before the revert"));
        }
        if !source.disks.written().iter().zip(&written).all(|(now, then)| now != then) {
            let what = "libvirt has other files under the paths of the domain's disks than this host";
            return Err(Error::environment(what).advice("Set instant: off"));
        }
        // Looked up again, because a reverted domain object does not know its new id.
        let name = domain.name().map_err(|error| explain("return the domain's name", &error))?;
        let paused = domain::domain(connect, &name)?;
        let xml = domain::xml(&paused, sys::VIR_DOMAIN_XML_MIGRATABLE | sys::VIR_DOMAIN_XML_SECURE)?;
        let xml = source.overlaid(&xml, owner)?;
        // From here on there may be an unfinished image, which `remove` deletes.
        self.write_origin(UNFINISHED)?;
        let format = self.save(&paused, file, &xml, source.format, cancellation)?;
        self.write_origin(&source.state(owner, format)?)
    }

    /// Saves the paused domain, and returns the format. The version of the domain's own QEMU is known to libvirt alone: it
    /// refuses a sparse file if that QEMU is too old.
    fn save(
        &self,
        paused: &Domain,
        file: &str,
        xml: &str,
        best: Format,
        cancellation: &Cancellation,
    ) -> Result<Format> {
        match save::save(paused, file, xml, best) {
            Err(error) if best == Format::Sparse && paused.is_active().unwrap_or(false) => {
                cancellation.ensure_wanted()?;
                tracing::warn!(file, %error, "no sparse save image can be made, so another one is");
                files::remove(&self.file)?;
                save::save(paused, file, xml, Format::Raw)?;
                Ok(Format::Raw)
            }
            saved => saved.map(|()| best),
        }
    }

    /// Reverts the domain's disks to the snapshot, if somebody has written to them. The domain is off.
    ///
    /// # Errors
    /// qemu-img fails.
    pub fn revert_disks(&self, source: &Source, snapshot: &Snapshot) -> Result<()> {
        let (owner, format) = (self.owner(source), self.format(source));
        let known = self.described();
        if source.state(owner, format).is_ok_and(|state| state == known) {
            return Ok(());
        }
        // From here on their state is unknown, until they are reverted.
        self.write_origin(&source.state_of_unknown_disks(owner, format))?;
        source.disks.revert_to(&snapshot.identity.name)?;
        self.write_origin(&source.state(owner, format)?)
    }

    fn write_origin(&self, text: &str) -> Result<()> {
        fs::write(&self.origin_file, text)
            .map_err(|error| Error::io("write the description of a save image to", &self.origin_file, &error))
    }

    /// Starts the domain, which is off, from the image of that source, and leaves it paused. The overlays must be made
    /// first.
    ///
    /// # Errors
    /// The domain cannot be started. It may be in any state then.
    pub fn restore(&self, connect: &Connect, source: &Source) -> Result<()> {
        save::restore_paused(connect, self.path_text()?, self.format(source))
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
