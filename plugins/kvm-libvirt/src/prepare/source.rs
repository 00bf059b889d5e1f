//! The origin of a save image: the snapshot, the domain and its disks, and the overlays of its runs.

use std::path::Path;

use machinery::Result;
use machinery_backend::OverlayTemplates;
use rustix::process::geteuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt_sys as sys;

use super::disks::{Disks, make_overlays};
use super::overlaid::{Overlaid, Owner, overlaid};
use super::save::Format;
use crate::access::{Access, User, user_of_qemu};
use crate::description::Description;
use crate::domain;
use crate::errors::explain;
use crate::files::Identity;
use crate::snapshot::Snapshot;

/// The line of an image in QEMU's stream, because the domain's QEMU makes no other one.
const RAW: &str = "saved raw\n";
/// The line of an image whose disks keep their owner.
const KEPT: &str = "owner kept\n";

/// The origin of an image: the domain at its snapshot.
pub struct Source {
    pub(super) disks: Disks,
    /// True if the domain has a TPM, whose state is in the image.
    pub has_tpm: bool,
    /// The disks, each with its overlay.
    pub overlays: Vec<Overlaid>,
    /// The best format of that libvirt. The domain's own QEMU may be older.
    pub(super) format: Format,
    /// The description of the origin. An image is valid if its own is equal. In the file, the format if it is not the best
    /// one, the owner and the identity of the disks follow.
    pub(super) origin: String,
}

impl Source {
    /// Returns the origin of an image of that snapshot; `overlay` is that of the first disk.
    ///
    /// # Errors
    /// No image can be made; the text says why, for people.
    pub fn of(domain: &Domain, snapshot: &Snapshot, overlay: &Path) -> Result<Source, String> {
        if snapshot.description.external || !snapshot.has_memory() {
            return Err("save images are made of internal snapshots with memory only".to_owned());
        }
        if let Some(overlay) = &snapshot.description.overlay {
            let overlay = overlay.display();
            return Err(format!(
                "the snapshot was taken of a run with the disk {overlay}, which the domain lacks"
            ));
        }
        if snapshot.identity.name.parse::<u64>().is_ok() {
            // qemu-img looks for a snapshot of that number first.
            return Err("the snapshot's name is a number, which qemu-img cannot use as a name".to_owned());
        }
        let xml = domain::xml(domain, sys::VIR_DOMAIN_XML_INACTIVE).map_err(|error| error.to_string())?;
        let description = Description::read(&xml).map_err(|error| error.to_string())?;
        let disks = Disks::of(&description)?;
        disks.ensure_writable()?;
        let overlays = disks.overlays(overlay)?;
        if let Some((_, own)) = overlays.iter().find(|(_, overlay)| description.files.contains(overlay)) {
            return Err(format!(
                "the domain has the file {} itself, which is the name of an overlay",
                own.display()
            ));
        }
        let (name, created) = (&snapshot.identity.name, &snapshot.identity.created);
        let files = Identity::of(&description).to_text().map_err(|error| error.to_string())?;
        let connect =
            domain.connect().map_err(|error| explain("return the connection", &error).to_string())?;
        let format = Format::best(&connect).map_err(|error| error.to_string())?;
        let described = disks.described(name)?;
        let origin = format!("{name}\n{created}\n{format:?}\n{described}{overlays:?}\n{files}{xml}");
        Ok(Source { disks, has_tpm: description.has_tpm, overlays, format, origin })
    }

    /// Returns the description with the overlays.
    ///
    /// # Errors
    /// The description has other disks.
    pub fn overlaid(&self, xml: &str, owner: Owner) -> Result<String> {
        overlaid(xml, &self.overlays, owner)
    }

    /// Returns the access of QEMU's user to the disks and their bases, while the domain is off.
    ///
    /// # Errors
    /// A file of a disk is missing.
    pub fn access(&self, user: User) -> Result<Access> {
        Ok(Access::of(user, self.disks.files()?))
    }

    /// Returns the access of the user that libvirt names. `None` if it names none.
    pub(super) fn access_of_qemu(&self, connect: &Connect) -> Result<Option<Access>> {
        let capabilities = connect.capabilities().map_err(|error| explain("describe itself", &error))?;
        user_of_qemu(&capabilities).map(|user| self.access(user)).transpose()
    }

    /// Returns the owner of the disks during a run: the present one, if QEMU's user can read them.
    ///
    /// # Errors
    /// libvirt does not answer; a file of a disk is missing.
    pub fn owner(&self, connect: &Connect) -> Result<Owner> {
        Ok(match self.access_of_qemu(connect)? {
            Some(Access::Reads | Access::Writes(_)) => Owner::Kept,
            Some(Access::None(_)) | None => Owner::Qemu,
        })
    }

    /// Expects that QEMU's user can read the disks. Otherwise libvirt gives them to that user for good, and only root can
    /// give them back.
    ///
    /// # Errors
    /// It cannot, and this process is not root; libvirt does not answer. The text is for people.
    pub fn ensure_given_back(&self, connect: &Connect) -> Result<(), String> {
        match self.access_of_qemu(connect).map_err(|error| error.to_string())? {
            Some(Access::None(file)) if !geteuid().is_root() => Err(format!(
                "QEMU's user may not read {}, so libvirt would give the disks to that user for good; let it read that file \
                 (chmod o+r)",
                file.display()
            )),
            _ => Ok(()),
        }
    }

    /// Returns the content of the file that describes the origin: the disks are at the snapshot.
    pub(super) fn state(&self, owner: Owner, format: Format) -> Result<String> {
        Ok(self.state_of_unknown_disks(owner, format) + &self.disks.identity()?)
    }

    /// Returns the content while the disks may not be at the snapshot.
    pub(super) fn state_of_unknown_disks(&self, owner: Owner, format: Format) -> String {
        let format = if format == self.format { "" } else { RAW };
        let owner = if owner == Owner::Kept { KEPT } else { "" };
        format!("{}{format}{owner}", self.origin)
    }

    /// Returns the format that such a content records.
    pub(super) fn format_in(&self, content: &str) -> Format {
        let is_raw = content.strip_prefix(&self.origin).is_some_and(|state| state.starts_with(RAW));
        if is_raw { Format::Raw } else { self.format }
    }

    /// Returns the owner of the disks that such a content records.
    pub(super) fn owner_in(&self, content: &str) -> Owner {
        let state = content.strip_prefix(&self.origin).unwrap_or_default();
        let is_kept = state.strip_prefix(RAW).unwrap_or(state).starts_with(KEPT);
        if is_kept { Owner::Kept } else { Owner::Qemu }
    }

    /// Makes the overlays of a run.
    ///
    /// # Errors
    /// An overlay cannot be made. Then there is none.
    pub fn make_overlays(&self, templates: &OverlayTemplates) -> Result<()> {
        make_overlays(templates, &self.overlays)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::description::Description;

    #[test]
    fn content_records_owner_and_format_whether_the_disks_are_at_the_snapshot_or_not() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("disk");
        std::fs::write(&disk, "x").unwrap();
        let xml = format!(
            "<domain><devices><disk type='file' device='disk'><driver type='qcow2'/><source file='{}'/></disk>\
             </devices></domain>",
            disk.display()
        );
        let disks = Disks::of(&Description::read(&xml).unwrap()).unwrap();
        let source = Source {
            disks,
            has_tpm: false,
            overlays: Vec::new(),
            format: Format::Sparse,
            origin: "origin\n".to_owned(),
        };
        for owner in [Owner::Kept, Owner::Qemu] {
            for format in [Format::Sparse, Format::Raw] {
                let unknown = source.state_of_unknown_disks(owner, format);
                for content in [source.state(owner, format).unwrap(), unknown] {
                    assert!(content.starts_with(&source.origin));
                    assert_eq!(
                        (source.owner_in(&content), source.format_in(&content)),
                        (owner, format),
                        "{content}"
                    );
                }
            }
        }
        assert_eq!((source.owner_in(""), source.format_in("")), (Owner::Qemu, Format::Sparse));
    }
}
