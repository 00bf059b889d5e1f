//! A machine's save image: its creation ahead of a restore, and restores from it.

use std::time::{Duration, Instant};

use machinery::{Deadline, Error, Result};
use machinery_backend::{Cancellation, PrepareOrigin};
use virt::connect::Connect;
use virt::domain::Domain;

use super::base::{END_EVENT_TIMEOUT, Machine};
use crate::domain;
use crate::foreign::remove_managed_save;
use crate::prepare::Source;
use crate::restore::{self, Start};
use crate::snapshot::{self, Snapshot};

/// The number of cancelled attempts after which no further image is made.
const MAX_CANCELLED_IMAGES: u32 = 3;
/// A restore from an image that timed out and took longer than this is slower than a revert.
const MAX_IMAGE_RESTORE: Duration = Duration::from_secs(60);

impl Machine {
    /// Starts the domain from its snapshot: from a valid save image if there is one, else by a revert.
    pub(super) fn start_restored(
        &self,
        connect: &Connect,
        domain: &Domain,
        cancellation: &Cancellation,
    ) -> Result<()> {
        if !self.keys.image.is_off() && self.keys.image.exists() {
            let snapshot = snapshot::find(domain, self.wanted_snapshot())?;
            if let Some(source) = self.valid_source(domain, &snapshot) {
                let begun = Instant::now();
                match self.restore_from_image(connect, &source, &snapshot) {
                    Ok(()) => return Ok(()),
                    Err(error) if cancellation.is_cancelled() => {
                        if begun.elapsed() > MAX_IMAGE_RESTORE {
                            // The next restore reverts, which may be faster.
                            self.keys.image.remove();
                            self.disable_images("a restore from its image took too long");
                        }
                        return Err(error);
                    }
                    Err(error) => self.image_failed(domain, &error)?,
                }
            }
        }
        let revert = || restore::start_paused(domain, self.wanted_snapshot(), Start::Restored);
        self.steps().timed("revert", revert)
    }

    /// Returns the image's source, if that is the present snapshot and domain.
    fn valid_source(&self, domain: &Domain, snapshot: &Snapshot) -> Option<Source> {
        let source = self.keys.image.source(domain, snapshot);
        let valid = source.ok().filter(|source| self.keys.image.has_origin(source));
        if valid.is_none() {
            tracing::warn!(
                machine = self.name(),
                "its save image is of another snapshot or domain, and not used"
            );
        }
        valid
    }

    fn restore_from_image(&self, connect: &Connect, source: &Source, snapshot: &Snapshot) -> Result<()> {
        self.steps().timed("disk", || source.revert_disks(snapshot))?;
        self.steps().timed("load", || self.keys.image.restore(connect))
    }

    /// Removes an image that failed. This host makes no other one.
    fn image_failed(&self, domain: &Domain, error: &Error) -> Result<()> {
        tracing::warn!(machine = self.name(), %error, "its save image has failed, and is not used any more");
        let before = self.lock().end_count;
        let ended = domain::destroy(domain)?;
        if ended {
            self.wait_for_end(before, Deadline::after(END_EVENT_TIMEOUT));
        }
        self.keys.image.remove();
        self.disable_images(&format!("its save image has failed: {error}"));
        Ok(())
    }

    fn disable_images(&self, why: &str) {
        self.readiness.set_plain(why);
        self.lock().image_disabled = Some(why.to_owned());
    }

    /// Makes an image unless there is a valid one, and reports the machine's readiness; `why` is the reason
    /// why there is no standby.
    pub(super) fn prepare_image(
        &self,
        connect: &Connect,
        origin: PrepareOrigin,
        cancellation: &Cancellation,
        why: &str,
    ) -> Result<()> {
        let domain = domain::domain(connect, self.label())?;
        self.clear_leftover(&domain)?;
        domain::ensure_off(&domain)?;
        let (snapshot, source) = match self.image_source(&domain) {
            Ok(found) => found,
            Err(no_image) => {
                self.keys.image.remove();
                self.report_plain(&format!("{why}; {no_image}"));
                return Ok(());
            }
        };
        if !self.keys.image.has_origin(&source) {
            if let Some(reason) = self.foreign_work_reason(&domain, origin) {
                self.report_plain(&reason);
                return Ok(());
            }
            if let Err(no_space) = self.keys.image.ensure_space(&domain) {
                self.report_plain(&format!("{why}; {no_space}"));
                return Ok(());
            }
            self.make_image(connect, &domain, &snapshot, cancellation)?;
        }
        self.readiness.set_instant(self.keys.image.size());
        self.report_no_standby(why);
        Ok(())
    }

    /// Returns the snapshot and the source of the image to make, or the reason why none is made.
    fn image_source(&self, domain: &Domain) -> std::result::Result<(Snapshot, Source), String> {
        if let Some(why) = &self.lock().image_disabled {
            return Err(why.clone());
        }
        self.keys.image.ensure_useful(domain)?;
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
