//! A machine's save image: its creation ahead of a restore, and starts from it, each on new overlays.

use std::time::{Duration, Instant};

use machinery::{Deadline, Error, Result};
use machinery_backend::{Cancellation, PrepareOrigin};
use virt::connect::Connect;
use virt::domain::Domain;
use virt_sys as sys;

use super::base::{END_EVENT_TIMEOUT, Machine};
use super::prepare::Outcome;
use crate::domain;
use crate::foreign::remove_managed_save;
use crate::prepare::Source;
use crate::restore::{self, Start};
use crate::snapshot::{self, Snapshot};

/// The number of cancelled attempts after which no further image is made.
const MAX_CANCELLED_IMAGES: u32 = 3;
/// The number of images in a row that fail at a restore, after which no further image is made.
const MAX_FAILED_IMAGES: u32 = 3;
/// A restore from an image that timed out and took longer than this is slower than a revert.
const MAX_IMAGE_RESTORE: Duration = Duration::from_secs(60);

/// Returns the reason that the next run has no overlays.
fn own_disk(why: &str) -> String {
    format!("runs write to the domain's own disk: {why}")
}

impl Machine {
    /// Starts the domain from its snapshot: from a valid save image if there is one, else by a revert.
    pub(super) fn start_restored(
        &self,
        connect: &Connect,
        domain: &Domain,
        cancellation: &Cancellation,
    ) -> Result<()> {
        if let Some((source, snapshot)) = self.valid_source(domain) {
            // Without overlays the run would write to the domain's own disk. So this failure is one of the start.
            self.make_overlays(&source, &snapshot)?;
            let begun = Instant::now();
            match self.steps().timed("load", || self.keys.image.restore(connect, &source)) {
                Ok(()) => {
                    self.lock().failed_images = 0;
                    return Ok(());
                }
                Err(error) if cancellation.is_cancelled() => {
                    if begun.elapsed() > MAX_IMAGE_RESTORE {
                        // The next restore reverts, which may be faster.
                        self.discard_image("a restore from its image took too long");
                    }
                    return Err(error);
                }
                Err(error) => self.image_failed(domain, &error)?,
            }
        }
        let revert = || restore::start_paused(domain, self.wanted_snapshot(), Start::Restored);
        self.steps().timed("revert", revert)
    }

    /// Boots the domain with the disks of the snapshot, and with overlays over them if there is a valid save image.
    pub(super) fn start_cold(&self, connect: &Connect, domain: &Domain) -> Result<()> {
        let Some((source, snapshot)) = self.valid_source(domain) else {
            let boot = || restore::start_paused(domain, self.wanted_snapshot(), Start::Cold);
            return self.steps().timed("boot", boot);
        };
        let xml = domain::xml(domain, sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE)?;
        let xml = source.overlaid(&xml, source.owner(connect)?)?;
        self.make_overlays(&source, &snapshot)?;
        if source.has_tpm {
            // libvirt puts the TPM's state of the image into the place from which the domain boots.
            self.steps().timed("tpm", || self.keys.image.restore(connect, &source))?;
            domain::destroy(domain)?;
        }
        self.steps().timed("boot", || restore::boot_paused_as(connect, &xml))
    }

    /// Returns the image's source and its snapshot, if those are the present ones. `None` if there is no valid image.
    fn valid_source(&self, domain: &Domain) -> Option<(Source, Snapshot)> {
        if self.keys.image.is_off() || !self.keys.image.exists() {
            return None;
        }
        let snapshot = snapshot::find(domain, self.wanted_snapshot()).ok();
        let found = snapshot.and_then(|snapshot| {
            let source = self.keys.image.source(domain, &snapshot).ok()?;
            Some((source, snapshot))
        });
        let valid = found.filter(|(source, _)| self.keys.image.has_origin(source));
        if valid.is_none() {
            self.report_own_disk("its save image is of another snapshot or domain, and not used");
        }
        valid
    }

    /// Reports to the host that the run about to start has no overlays.
    fn report_own_disk(&self, why: &str) {
        let why = own_disk(why);
        tracing::warn!(machine = self.name(), "{why}");
        self.note_own_disk(&why);
        self.readiness.report();
    }

    /// Makes the overlays of a run, over disks at the snapshot. The marker has them first, so that no host leaves one
    /// behind.
    fn make_overlays(&self, source: &Source, snapshot: &Snapshot) -> Result<()> {
        self.marker.set_overlays(source.overlays.iter().map(|(_, overlay)| overlay.clone()).collect());
        let made = self.steps().timed("disk", || {
            self.keys.image.revert_disks(source, snapshot)?;
            source.make_overlays(&self.shared.overlays)
        });
        made.map_err(|error| {
            error.default_advice(
                "Its save image is kept. Look at the free space in the folder of the disk; `instant: off` has runs without \
                 overlays",
            )
        })
    }

    /// Removes an image that failed. The next preparation makes another one.
    fn image_failed(&self, domain: &Domain, error: &Error) -> Result<()> {
        let before = self.lock().end_count;
        let ended = domain::destroy(domain)?;
        if ended {
            self.wait_for_end(before, Deadline::after(END_EVENT_TIMEOUT));
        }
        // The revert that follows uses the domain's own disks.
        self.marker.remove_overlays();
        self.discard_image(&format!("its save image has failed: {error}"));
        Ok(())
    }

    /// Removes the image. This host makes no other one after several in a row.
    fn discard_image(&self, why: &str) {
        self.keys.image.remove();
        {
            let mut state = self.lock();
            state.failed_images += 1;
            if state.failed_images >= MAX_FAILED_IMAGES {
                state.image_disabled = Some(format!("{why}, and so did the images before it"));
            }
        }
        self.report_own_disk(why);
    }

    /// Makes an image unless there is a valid one; returns the reason if there is none. The domain is off.
    pub(super) fn prepare_image(
        &self,
        connect: &Connect,
        domain: &Domain,
        origin: PrepareOrigin,
        cancellation: &Cancellation,
    ) -> Result<Outcome> {
        let (snapshot, source) = match self.image_source(domain) {
            Ok(found) => found,
            Err(why) => {
                self.keys.image.remove();
                return Ok(Outcome::Unavailable(own_disk(&why)));
            }
        };
        if !self.keys.image.has_origin(&source) || self.keys.image.has_outdated_owner(connect, &source)? {
            if let Some(reason) = self.foreign_work_reason(domain, origin) {
                return Ok(Outcome::Unavailable(reason));
            }
            let possible =
                source.ensure_given_back(connect).and_then(|()| self.keys.image.ensure_space(domain));
            if let Err(why) = possible {
                return Ok(Outcome::Unavailable(own_disk(&why)));
            }
            self.make_image(connect, domain, &snapshot, cancellation)?;
        }
        self.note_image(self.keys.image.size());
        Ok(Outcome::Ready)
    }

    /// Returns the snapshot and the source of the image to make, or the reason why none is made.
    fn image_source(&self, domain: &Domain) -> std::result::Result<(Snapshot, Source), String> {
        if let Some(why) = &self.lock().image_disabled {
            return Err(why.clone());
        }
        if self.keys.image.is_off() {
            let why = self.keys.image.unavailable_reason();
            return Err(why.unwrap_or_else(|| "instant is off".to_owned()));
        }
        let snapshot = snapshot::find(domain, self.wanted_snapshot()).map_err(|error| error.to_string())?;
        let source = self.keys.image.source(domain, &snapshot)?;
        Ok((snapshot, source))
    }

    /// Makes an image. The domain is on meanwhile, so it is marked like a run.
    fn make_image(
        &self,
        connect: &Connect,
        domain: &Domain,
        snapshot: &Snapshot,
        cancellation: &Cancellation,
    ) -> Result<()> {
        cancellation.ensure_wanted()?;
        let before = self.lock().end_count;
        remove_managed_save(domain, self.name())?;
        self.begin_marker(domain)?;
        let make = || self.keys.image.make(connect, domain, snapshot, cancellation);
        let made = self.steps().timed("save", make);
        match &made {
            Ok(()) => self.after_standby_end(true, before, Deadline::after(END_EVENT_TIMEOUT)),
            Err(error) => self.image_not_made(error, cancellation),
        }
        made
    }

    /// Removes the leftovers of an image that was not made. If the failure has
    /// no cause outside the image, this host makes no other one.
    fn image_not_made(&self, error: &Error, cancellation: &Cancellation) {
        self.keys.image.remove();
        self.preparation_failed();
        let mut state = self.lock();
        if cancellation.is_cancelled() {
            state.cancelled_images += 1;
            if state.cancelled_images >= MAX_CANCELLED_IMAGES {
                let why = "making its save image takes too long: it was cancelled again and again";
                state.image_disabled = Some(why.to_owned());
            }
        } else if !state.connection_lost {
            state.image_disabled = Some(format!("its save image cannot be made: {error}"));
        }
    }
}
