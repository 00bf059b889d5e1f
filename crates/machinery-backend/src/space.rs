//! The free space of the file systems that runs write to.
//!
//! A guest writes to its overlay as much as its disks hold, and a full file system makes every other run fail. Below the
//! reserve, no run starts, and the run that has written most on that file system is ended. Another one follows for each
//! further sixteenth of the reserve that is used up, so that a file system which something else has filled costs one
//! run, and not all of them.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Duration;

use machinery::{Error, FreeSpaceReserve, Result, format_bytes};
use rustix::fs::statvfs;

use crate::sync::lock;

/// The pause between two looks at the free space, while runs write.
const INTERVAL: Duration = Duration::from_secs(1);
/// The part of the reserve that has to be used up before another run is ended.
const STEP: u64 = 16;

/// A run that writes to files.
pub trait DiskWriter: Send + Sync {
    /// Returns the files that the run writes to; none once it has ended.
    fn files(&self) -> Vec<PathBuf>;

    /// Ends the run without waiting for that. The machine's end reports the reason.
    fn end_for(&self, reason: String);
}

/// The free space of the file systems that the runs of a machinery write to.
#[derive(Default)]
pub struct DiskSpace {
    reserve: Mutex<FreeSpaceReserve>,
    writers: Mutex<Writers>,
}

#[derive(Default)]
struct Writers {
    runs: Vec<Weak<dyn DiskWriter>>,
    /// True while a thread watches them. An idle host has none.
    watched: bool,
}

/// The free space of a file system, and its reserve, in bytes.
struct Space {
    free: u64,
    reserve: u64,
}

impl Space {
    fn is_short(&self) -> bool {
        self.free < self.reserve
    }

    fn describe(&self, path: &Path) -> String {
        let (free, reserve) = (format_bytes(self.free), format_bytes(self.reserve));
        format!(
            "only {free} are free on the file system of {}, and {reserve} have to stay free (free_space_reserve)",
            path.display()
        )
    }
}

impl DiskSpace {
    /// Watches with that reserve.
    pub fn new(reserve: FreeSpaceReserve) -> Arc<DiskSpace> {
        let space = DiskSpace::default();
        space.set_reserve(reserve);
        Arc::new(space)
    }

    /// Sets the reserve.
    pub fn set_reserve(&self, reserve: FreeSpaceReserve) {
        *lock(&self.reserve) = reserve;
    }

    /// Checks that more than the reserve is free on the file system of an existing file or folder.
    ///
    /// # Errors
    /// Less is free. It is no failure of the machine.
    pub fn check(&self, path: &Path) -> Result<()> {
        match self.space(path) {
            Ok(space) if space.is_short() => Err(Error::not_now(space.describe(path))
                .advice("Free some space there, or lower free_space_reserve in machinery-host.yaml")),
            // A caller that uses a missing path reports that better.
            _ => Ok(()),
        }
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        let system = statvfs(path)?;
        let bytes = |blocks: u64| blocks.saturating_mul(system.f_frsize);
        let reserve = lock(&self.reserve).on(bytes(system.f_blocks));
        Ok(Space { free: bytes(system.f_bavail), reserve })
    }

    /// Watches the files of a run until it has ended.
    pub fn watch(self: &Arc<Self>, run: Weak<dyn DiskWriter>) {
        let mut writers = lock(&self.writers);
        writers.runs.push(run);
        if writers.watched {
            return;
        }
        let space = Arc::downgrade(self);
        let watching = thread::Builder::new().name("disk-space".to_owned()).spawn(move || watch(&space));
        match watching {
            Ok(_) => writers.watched = true,
            Err(error) => tracing::warn!(%error, "cannot start a thread to watch the free disk space"),
        }
    }

    /// Returns the runs that still write; none ends the watch.
    fn writing(&self) -> Vec<(Arc<dyn DiskWriter>, Vec<PathBuf>)> {
        let mut writers = lock(&self.writers);
        let runs: Vec<_> = writers
            .runs
            .iter()
            .filter_map(Weak::upgrade)
            .map(|run| {
                let files = run.files();
                (run, files)
            })
            .filter(|(_, files)| !files.is_empty())
            .collect();
        writers.runs = runs.iter().map(|(run, _)| Arc::downgrade(run)).collect();
        writers.watched = !runs.is_empty();
        runs
    }

    /// Looks at each file system once. `levels` has the free space below which its next run is ended.
    fn look(&self, runs: &[(Arc<dyn DiskWriter>, Vec<PathBuf>)], levels: &mut HashMap<u64, u64>) {
        for (device, largest) in largest_writers(runs) {
            let Ok(space) = self.space(&largest.file) else { continue };
            if !space.is_short() {
                levels.remove(&device);
            } else if space.free < levels.get(&device).copied().unwrap_or(u64::MAX) {
                levels.insert(device, space.free.saturating_sub(space.reserve / STEP));
                let (why, written) = (space.describe(&largest.file), format_bytes(largest.bytes));
                largest.run.end_for(format!("{why}, and this run has written most of all, {written}"));
            }
        }
    }
}

/// The run that has written most on a file system.
struct Largest<'a> {
    run: &'a Arc<dyn DiskWriter>,
    /// One of its files there.
    file: PathBuf,
    bytes: u64,
}

/// Returns the run that has written most, for each file system.
fn largest_writers(runs: &[(Arc<dyn DiskWriter>, Vec<PathBuf>)]) -> HashMap<u64, Largest<'_>> {
    let mut largest: HashMap<u64, Largest<'_>> = HashMap::new();
    for (run, files) in runs {
        let mut own: HashMap<u64, Largest<'_>> = HashMap::new();
        for file in files {
            // A file may be gone already.
            let Ok(meta) = fs::metadata(file) else { continue };
            let on_device = || Largest { run, file: file.clone(), bytes: 0 };
            // Source: st_blocks in inode(7) counts 512 bytes each.
            own.entry(meta.dev()).or_insert_with(on_device).bytes += meta.blocks() * 512;
        }
        for (device, writer) in own {
            if largest.get(&device).is_none_or(|other| other.bytes < writer.bytes) {
                largest.insert(device, writer);
            }
        }
    }
    largest
}

/// Watches until no run writes any more.
fn watch(space: &Weak<DiskSpace>) {
    let mut levels = HashMap::new();
    while let Some(space) = space.upgrade() {
        let runs = space.writing();
        if runs.is_empty() {
            return;
        }
        space.look(&runs, &mut levels);
        drop((runs, space));
        thread::sleep(INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Run {
        files: Vec<PathBuf>,
        ended: Mutex<Option<String>>,
    }

    impl DiskWriter for Run {
        fn files(&self) -> Vec<PathBuf> {
            if lock(&self.ended).is_none() { self.files.clone() } else { Vec::new() }
        }

        fn end_for(&self, reason: String) {
            *lock(&self.ended) = Some(reason);
        }
    }

    fn reserve(text: &str) -> FreeSpaceReserve {
        serde_json::from_value(serde_json::json!(text)).unwrap()
    }

    /// Makes a run with an overlay of that many KiB.
    fn run(folder: &Path, name: &str, kib: usize) -> Arc<Run> {
        let file = folder.join(name);
        fs::write(&file, vec![1; kib << 10]).unwrap();
        Arc::new(Run { files: vec![file, folder.join("gone")], ..Run::default() })
    }

    #[test]
    fn start_is_refused_when_less_than_the_reserve_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let space = DiskSpace::new(reserve("1000000 TiB"));
        let error = space.check(folder.path()).unwrap_err();
        assert_eq!(error.kind(), machinery::ErrorKind::NotNow);
        let text = error.to_string();
        assert!(text.contains("1000000 TiB have to stay free (free_space_reserve)"), "{text}");
        space.check(Path::new("/none")).unwrap();
        space.set_reserve(reserve("0"));
        space.check(folder.path()).unwrap();
    }

    #[test]
    fn largest_run_alone_is_ended_when_the_space_is_short_and_shrinks_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let space = DiskSpace::new(reserve("1000000 TiB"));
        let runs = [run(folder.path(), "a", 8), run(folder.path(), "b", 64), run(folder.path(), "c", 16)];
        for run in &runs {
            lock(&space.writers).runs.push(Arc::downgrade(run) as Weak<dyn DiskWriter>);
        }
        let mut levels = HashMap::new();
        for _ in 0..3 {
            space.look(&space.writing(), &mut levels);
        }
        let ended: Vec<bool> = runs.iter().map(|run| lock(&run.ended).is_some()).collect();
        assert_eq!(ended, [false, true, false]);
        let reason = lock(&runs[1].ended).clone().unwrap();
        assert!(reason.contains("this run has written most"), "{reason}");
        assert_eq!(space.writing().len(), 2);
        // It goes on once there was space in between.
        levels.clear();
        space.look(&space.writing(), &mut levels);
        assert!(lock(&runs[2].ended).is_some());
        space.set_reserve(reserve("0"));
        space.look(&space.writing(), &mut levels);
        assert!(lock(&runs[0].ended).is_none() && levels.is_empty());
    }

    #[test]
    fn watch_ends_the_run_and_then_itself() {
        let folder = tempfile::tempdir().unwrap();
        let space = DiskSpace::new(reserve("1000000 TiB"));
        let writer = run(folder.path(), "a", 8);
        lock(&space.writers).runs.push(Arc::downgrade(&writer) as Weak<dyn DiskWriter>);
        watch(&Arc::downgrade(&space));
        assert!(lock(&writer.ended).is_some() && !lock(&space.writers).watched);
    }
}
