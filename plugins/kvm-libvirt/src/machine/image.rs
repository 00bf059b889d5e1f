//! A machine's save image: made when there is nothing else to do, and restored from where it is right.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use machinery::{Deadline, Error, Readiness, Reloadable, RestoreReadiness, Result};
use virt::connect::Connect;
use virt::domain::Domain;

use super::prepare::{PrepareTrigger, ensure_not_cancelled};
use super::{END_EVENT_TIMEOUT, Machine};
use crate::domain;
use crate::foreign::remove_managed_save;
use crate::images::Source;
use crate::restore::{self, Start};
use crate::snapshot::{self, Snapshot};

/// An image that was given up this often, because of time or of something else to do, is not tried again.
const MAX_CANCELLED_IMAGES: u32 = 3;
/// A restore from an image that has used up all its time, and this much, is slower than it should be.
const MAX_IMAGE_RESTORE: Duration = Duration::from_secs(60);

impl Machine {
    /// Starts the domain from its snapshot: from the save image where there is one of it, else by a
    /// revert.
    pub(super) fn restored(&self, connect: &Connect, domain: &Domain, cancelled: &AtomicBool) -> Result<()> {
        if !self.keys.image.is_off() && self.keys.image.exists() {
            let snapshot = snapshot::find(domain, self.keys.info.snapshot.as_deref())?;
            if let Some(source) = self.valid_source(domain, &snapshot) {
                let begun = Instant::now();
                match self.restore_from_image(connect, &source, &snapshot) {
                    Ok(()) => return Ok(()),
                    Err(error) if cancelled.load(Ordering::SeqCst) => {
                        if begun.elapsed() > MAX_IMAGE_RESTORE {
                            // A revert may be quicker, the next time.
                            self.keys.image.remove();
                            self.lock().image_disabled =
                                Some("a restore from its image took too long".to_owned());
                        }
                        return Err(error);
                    }
                    Err(error) => self.image_failed(domain, &error)?,
                }
            }
        }
        self.timed("revert", || {
            restore::start_paused(domain, self.keys.info.snapshot.as_deref(), Start::Restored)
        })
    }

    /// What the image is of, if that is what a restore goes to.
    fn valid_source(&self, domain: &Domain, snapshot: &Snapshot) -> Option<Source> {
        let source = self.keys.image.source(domain, snapshot);
        let right = source.ok().filter(|source| self.keys.image.is_of(source));
        if right.is_none() {
            tracing::warn!(
                machine = self.keys.info.name,
                "its save image is of something else, and not used"
            );
        }
        right
    }

    fn restore_from_image(&self, connect: &Connect, source: &Source, snapshot: &Snapshot) -> Result<()> {
        self.timed("disk", || source.put_back(snapshot))?;
        self.timed("load", || self.keys.image.restore(connect))
    }

    /// One that does not work once is not made again by this host.
    fn image_failed(&self, domain: &Domain, error: &Error) -> Result<()> {
        tracing::warn!(machine = self.keys.info.name, %error, "its save image does not work, and is used no more");
        let before = self.lock().ends;
        let ended = domain::destroy(domain)?;
        if ended {
            self.wait_for_end(before, Deadline::after(END_EVENT_TIMEOUT));
        }
        self.keys.image.remove();
        self.lock().image_disabled = Some(format!("its save image has failed: {error}"));
        Ok(())
    }

    /// Sees to it that there is an image, and tells how ready the machine is; `why` says why it does not
    /// stand by.
    pub(super) fn have_image(
        &self,
        connect: &Connect,
        trigger: PrepareTrigger,
        cancelled: &AtomicBool,
        why: &str,
    ) -> Result<()> {
        let domain = domain::domain(connect, self.label())?;
        self.clear_leftover(&domain)?;
        domain::ensure_off(&domain)?;
        let found = self.image_source(&domain);
        let (snapshot, source) = match found {
            Ok(found) => found,
            Err(image_disabled) => {
                self.keys.image.remove();
                self.report_plain(&format!("{why}; {image_disabled}"));
                return Ok(());
            }
        };
        if !self.keys.image.is_of(&source) {
            if let Some(foreign_work) = self.foreign_work(&domain, trigger) {
                self.report_plain(&foreign_work);
                return Ok(());
            }
            if let Err(no_room) = self.keys.image.make_room(&domain) {
                self.report_plain(&format!("{why}; {no_room}"));
                return Ok(());
            }
            self.make_image(connect, &domain, &snapshot, cancelled)?;
        }
        let ready = RestoreReadiness {
            mode: Readiness::Instant,
            reason: why.to_owned(),
            memory: 0,
            disk: self.keys.image.size(),
        };
        self.host.ready(&self.keys.info.name, &ready);
        Ok(())
    }

    /// What an image is to be of, or why there is none.
    fn image_source(&self, domain: &Domain) -> std::result::Result<(Snapshot, Source), String> {
        if let Some(why) = &self.lock().image_disabled {
            return Err(why.clone());
        }
        self.keys.image.ensure_wanted_for(domain)?;
        let snapshot =
            snapshot::find(domain, self.keys.info.snapshot.as_deref()).map_err(|error| error.to_string())?;
        let source = self.keys.image.source(domain, &snapshot)?;
        Ok((snapshot, source))
    }

    /// Noted like a run, because the domain is on meanwhile.
    fn make_image(
        &self,
        connect: &Connect,
        domain: &Domain,
        snapshot: &Snapshot,
        cancelled: &AtomicBool,
    ) -> Result<()> {
        ensure_not_cancelled(cancelled)?;
        let before = self.lock().ends;
        remove_managed_save(domain, self.name())?;
        self.begin_marker(domain)?;
        let ensure_wanted = || ensure_not_cancelled(cancelled);
        let made = self.timed("save", || self.keys.image.make(connect, domain, snapshot, &ensure_wanted));
        match &made {
            Ok(()) => self.after_own_end(true, before, Deadline::after(END_EVENT_TIMEOUT)),
            Err(error) => self.image_not_made(error, cancelled),
        }
        made
    }

    /// What fails once, by nobody's doing, fails each time, and costs time and room on a disk.
    fn image_not_made(&self, error: &Error, cancelled: &AtomicBool) {
        self.keys.image.remove();
        self.preparation_failed();
        let mut now = self.lock();
        if cancelled.load(Ordering::SeqCst) {
            now.cancelled_images += 1;
            if now.cancelled_images >= MAX_CANCELLED_IMAGES {
                now.image_disabled =
                    Some("making its save image takes too long: it was given up again and again".to_owned());
            }
        } else if !now.lost {
            now.image_disabled = Some(format!("its save image cannot be made: {error}"));
        }
    }
}
