//! The disk space of the templates: a limit for all of them, and reservations of those being built.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use machinery::format_bytes;
use machinery_backend::files::free_space;
use machinery_backend::sync::lock;
use rustix::fs::statvfs;

use super::layout::size_on_disk;

/// The minimum disk space that stays free, in bytes: runs need space too.
const MIN_FREE: u64 = 512 << 20;
/// The part of the disk that stays free as well, if the operator has set no limit.
const FREE_PART: u64 = 10;
/// A disk with less free space, in bytes, is full.
const FULL: u64 = 1 << 20;

/// The disk space of all templates in a folder.
pub struct TemplateSpace {
    dir: PathBuf,
    /// The operator's limit for all templates together, in bytes.
    limit: Mutex<Option<u64>>,
    /// The space that templates may still need while they are built, in bytes.
    reserved: Arc<Mutex<u64>>,
}

/// A reservation for a template that is being built; dropping it ends the reservation.
pub struct SpaceReservation {
    reserved: Arc<Mutex<u64>>,
    bytes: u64,
}

impl Drop for SpaceReservation {
    fn drop(&mut self) {
        *lock(&self.reserved) -= self.bytes;
    }
}

impl TemplateSpace {
    pub fn new(dir: &Path) -> TemplateSpace {
        TemplateSpace { dir: dir.to_owned(), limit: Mutex::new(None), reserved: Arc::default() }
    }

    /// Sets the limit for all templates together, in bytes.
    pub fn set_limit(&self, limit: Option<u64>) {
        *lock(&self.limit) = limit;
    }

    /// Reserves space for a template of about that size, besides the reservations of others.
    ///
    /// # Errors
    /// There is not enough space; the text has the figures.
    pub fn reserve(&self, needed: u64) -> Result<SpaceReservation, String> {
        let mut reserved = lock(&self.reserved);
        match self.shortage(needed, *reserved) {
            Some(why) => Err(why),
            None => {
                *reserved += needed;
                Ok(SpaceReservation { reserved: Arc::clone(&self.reserved), bytes: needed })
            }
        }
    }

    /// Describes the lack of space for a template; `None` if there is enough.
    fn shortage(&self, needed: u64, reserved: u64) -> Option<String> {
        let limit = *lock(&self.limit);
        let taken = self.used().saturating_add(reserved);
        if let Some(limit) = limit
            && taken.saturating_add(needed) > limit
        {
            return Some(format!(
                "its template needs up to {}, and {} of the {} for templates are taken (instant_space_limit)",
                format_bytes(needed),
                format_bytes(taken),
                format_bytes(limit)
            ));
        }
        let (free, min_free) = (self.free().saturating_sub(reserved), self.min_free(limit));
        (needed.saturating_add(min_free) > free).then(|| {
            format!(
                "its template needs up to {}, and only {} are free in {}, of which {} have to stay free. Free some, or \
                 set instant_dir and instant_space_limit",
                format_bytes(needed),
                format_bytes(free),
                self.dir.display(),
                format_bytes(min_free)
            )
        })
    }

    fn min_free(&self, limit: Option<u64>) -> u64 {
        let size = statvfs(&self.dir).map_or(0, |disk| disk.f_blocks.saturating_mul(disk.f_frsize));
        if limit.is_some() { MIN_FREE } else { MIN_FREE.max(size / FREE_PART) }
    }

    fn free(&self) -> u64 {
        free_space(&self.dir).unwrap_or(0)
    }

    /// Describes a full disk; `None` if there is space. A QEMU that cannot write its RAM only reports that
    /// it was killed.
    pub fn full_reason(&self) -> Option<String> {
        (self.free() < FULL).then(|| format!("the disk of {} is full", self.dir.display()))
    }

    /// Returns the disk space of all templates, in bytes.
    fn used(&self) -> u64 {
        let entries = self.dir.read_dir().into_iter().flatten().flatten();
        entries.map(|entry| size_on_disk(&entry.path())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservation_is_refused_when_others_have_reserved_the_space() {
        let folder = tempfile::tempdir().unwrap();
        let space = TemplateSpace::new(folder.path());
        space.set_limit(Some(1 << 30));
        let refused = |needed| space.reserve(needed).err();
        let reservation = space.reserve(800 << 20).unwrap();
        assert!(refused(800 << 20).unwrap().contains("of the 1 GiB for templates"));
        drop(reservation);
        assert!(refused(800 << 20).is_none());
        space.set_limit(None);
        assert!(refused(1 << 60).unwrap().contains("are free in"));
    }
}
