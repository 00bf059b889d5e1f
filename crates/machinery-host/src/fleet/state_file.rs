//! The availability of all machines, on disk, so that it outlives the host.
//!
//! The file `machines.json` is always whole: the host writes a new file, syncs it, and renames it over the old
//! one. Whenever the host ends, the file has the old state or the new one. A change is confirmed only when it
//! is on disk. Changes that arrive during a write share the next write.
//!
//! The file keeps the entries of machines that are not configured now: their machinery may return.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};

use machinery::{Error, Result};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use super::availability::Availability;
use super::{Fleet, Roster};

/// The format of the file.
const FORMAT: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct StateFile {
    format: u32,
    machines: BTreeMap<String, Availability>,
}

/// Writes the availability of the fleet to the file.
pub struct StateStore {
    path: PathBuf,
    fleet: Arc<Fleet>,
    /// The entries of machines that are not configured.
    others: std::sync::Mutex<BTreeMap<String, Availability>>,
    /// Counts calls of [`save`](StateStore::save).
    changes: AtomicU64,
    /// The number of those calls whose changes are on disk.
    written: Mutex<u64>,
    /// True if the last write failed: the file may be old.
    stale: AtomicBool,
}

impl StateStore {
    /// Opens the file in that folder, and gives the machines the availability that it records.
    ///
    /// # Errors
    /// The file exists, but cannot be read or parsed.
    pub fn open(folder: &Path, fleet: Arc<Fleet>) -> Result<Arc<Self>> {
        let path = folder.join("machines.json");
        let mut others = read(&path)?;
        restore_availability(&mut others, &fleet.roster());
        let (changes, written, stale) = (AtomicU64::new(0), Mutex::new(0), AtomicBool::new(false));
        let others = std::sync::Mutex::new(others);
        Ok(Arc::new(StateStore { path, fleet, others, changes, written, stale }))
    }

    /// Returns the folder for the marks of runs. No machinery has a folder of that name.
    pub fn run_marks(&self) -> PathBuf {
        self.path.with_extension("runs")
    }

    /// Replaces the roster of the fleet. The entries of removed machines are kept, and given to machines of the
    /// same name that are added later.
    pub fn replace_roster(&self, roster: Roster) {
        let mut others = self.others();
        for machine in self.fleet.roster().machines() {
            let availability = machine.status().availability;
            if !roster.has(machine) && !availability.is_plain() {
                others.insert(machine.name().to_owned(), availability);
            }
        }
        restore_availability(&mut others, &roster);
        self.fleet.set(roster);
    }

    /// Takes and releases the lock of the entries.
    pub fn pass_locks(&self) {
        drop(self.others());
    }

    fn others(&self) -> MutexGuard<'_, BTreeMap<String, Availability>> {
        // The map is whole after each statement, so poison means nothing.
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all earlier changes are on disk.
    ///
    /// # Errors
    /// The file cannot be written. The next call writes these changes too.
    pub async fn save(self: &Arc<Self>) -> Result<()> {
        let state = Arc::clone(self);
        let mine = state.changes.fetch_add(1, Ordering::SeqCst) + 1;
        // A task of its own, so that two writes never overlap, even if the first caller has been dropped.
        let saving = tokio::spawn(async move {
            let mut written = state.written.lock().await;
            if *written >= mine {
                return Ok(());
            }
            let up_to = state.changes.load(Ordering::SeqCst);
            let (path, text) = (state.path.clone(), state.text());
            let write = tokio::task::spawn_blocking(move || replace(&path, text?.as_bytes()));
            write.await.unwrap_or_else(|error| Err(io::Error::other(error)))?;
            *written = up_to;
            Ok::<(), io::Error>(())
        });
        let saved = saving.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        self.stale.store(saved.is_err(), Ordering::SeqCst);
        saved.map_err(|error| {
            Error::io("save the locks of machines to", &self.path, &error)
                .default_advice("Make the folder writable, and repeat the request")
        })
    }

    /// Writes the file again if the last write failed.
    pub async fn flush_pending(self: &Arc<Self>) {
        if self.stale.load(Ordering::SeqCst)
            && let Err(error) = self.save().await
        {
            tracing::error!(%error, "the availability of machines on disk is still old");
        }
    }

    /// Returns the capture files of all locks, also those of machines that are not configured.
    pub fn captures(&self) -> Vec<PathBuf> {
        let roster = self.fleet.roster();
        let locks = roster.machines().iter().filter_map(|machine| machine.task_lock());
        let others = self.others();
        let others = others.values().filter_map(|availability| availability.lock.clone());
        locks.chain(others).filter_map(|lock| lock.pcap_path).collect()
    }

    fn text(&self) -> io::Result<String> {
        let others = self.others();
        let mut machines = others.clone();
        for machine in self.fleet.roster().machines() {
            let availability = machine.status().availability;
            if !availability.is_plain() {
                machines.insert(machine.name().to_owned(), availability);
            }
        }
        Ok(serde_json::to_string_pretty(&StateFile { format: FORMAT, machines })?)
    }
}

/// Moves the recorded availability from `others` to the machines of the same name.
fn restore_availability(others: &mut BTreeMap<String, Availability>, roster: &Roster) {
    for machine in roster.machines() {
        if let Some(availability) = others.remove(machine.name()) {
            machine.restore_availability(availability);
        }
    }
}

fn read(path: &Path) -> Result<BTreeMap<String, Availability>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(Error::io("read the locks of machines from", path, &error)),
    };
    let wrong = |why: String| {
        Error::environment(format!("{} makes no sense: {why}", path.display()))
            .advice("Put it right, or move it away: then no machine is locked, reserved or disabled any more")
    };
    let page: StateFile = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    if page.format != FORMAT {
        return Err(wrong(format!("it has the format {}, and this host knows {FORMAT}", page.format)));
    }
    Ok(page.machines)
}

/// Replaces the file by one with this content, all or nothing.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let new = path.with_extension("json.new");
    let mut file = File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    // The folder has the name, so it must be on disk too.
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::super::availability::TaskLock;
    use super::super::fake_plugin::FakePlugin;
    use super::*;
    use crate::events::Events;

    #[tokio::test]
    async fn save_keeps_entries_of_machines_that_are_not_configured() {
        let folder = tempfile::tempdir().unwrap();
        let lock = TaskLock { task_id: "t".into(), pcap_path: Some("/p".into()), ..TaskLock::default() };
        let availability = Availability { lock: Some(lock), ..Availability::default() };
        let machines = BTreeMap::from([("away".to_owned(), availability)]);
        let path = folder.path().join("machines.json");
        replace(
            &path,
            serde_json::to_string(&StateFile { format: FORMAT, machines: machines.clone() })
                .unwrap()
                .as_bytes(),
        )
        .unwrap();
        let state = StateStore::open(folder.path(), Arc::default()).unwrap();
        state.save().await.unwrap();
        assert_eq!(read(&path).unwrap(), machines);
    }

    #[test]
    fn open_refuses_file_that_cannot_be_parsed() {
        let folder = tempfile::tempdir().unwrap();
        for text in ["", "{", "{\"format\": 2, \"machines\": {}}"] {
            fs::write(folder.path().join("machines.json"), text).unwrap();
            let error = StateStore::open(folder.path(), Arc::default()).err().unwrap().to_string();
            assert!(error.contains("machines.json") && error.contains("move it away"), "{error}");
        }
    }

    #[tokio::test]
    async fn save_fails_while_folder_is_missing_and_works_later() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing");
        let state = StateStore::open(&missing, Arc::default()).unwrap();
        assert!(state.save().await.unwrap_err().to_string().contains("missing/machines.json"));
        fs::create_dir(&missing).unwrap();
        state.save().await.unwrap();
    }

    #[tokio::test]
    async fn flush_is_repeated_until_the_file_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing");
        let state = StateStore::open(&missing, Arc::default()).unwrap();
        let path = missing.join("machines.json");
        state.flush_pending().await;
        assert!(!state.stale.load(Ordering::SeqCst), "no write has failed");
        state.save().await.unwrap_err();
        state.flush_pending().await;
        assert!(state.stale.load(Ordering::SeqCst), "the flush has failed");
        fs::create_dir(&missing).unwrap();
        state.flush_pending().await;
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
        state.flush_pending().await;
        assert!(!path.exists(), "the file on disk was current");
    }

    #[test]
    fn open_fails_when_the_file_is_there_but_cannot_be_read() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("machines.json")).unwrap();
        let error = StateStore::open(folder.path(), Arc::default()).err().unwrap().to_string();
        assert!(error.contains("machines.json"), "{error}");
    }

    #[tokio::test]
    async fn captures_include_those_of_machines_that_are_not_configured() {
        let folder = tempfile::tempdir().unwrap();
        let text =
            r#"{"format": 1, "machines": {"away": {"lock": {"task_id": "t", "pcap_path": "/p"}}, "b": {}}}"#;
        fs::write(folder.path().join("machines.json"), text).unwrap();
        let state = StateStore::open(folder.path(), Arc::default()).unwrap();
        assert_eq!(state.captures(), [Path::new("/p")]);
    }

    #[tokio::test]
    async fn lock_of_a_removed_machine_is_kept_until_the_machine_is_back() {
        let (folder, plugin) = (tempfile::tempdir().unwrap(), FakePlugin::default());
        let [locked, plain] = ["locked", "plain"].map(|name| plugin.machine(name, &Events::default()));
        let lock = TaskLock { task_id: "1".into(), ..TaskLock::default() };
        locked.lock(&lock).unwrap();
        let fleet = Arc::<Fleet>::default();
        fleet.set(Roster::new(Vec::new(), vec![Arc::clone(&locked), Arc::clone(&plain)]));
        let state = StateStore::open(folder.path(), Arc::clone(&fleet)).unwrap();
        let saved = || read(&folder.path().join("machines.json")).unwrap().into_keys().collect::<Vec<_>>();
        state.save().await.unwrap();
        assert_eq!(saved(), ["locked"]);
        state.replace_roster(Roster::new(Vec::new(), vec![Arc::clone(&locked)]));
        assert!(state.others().is_empty(), "only a removed machine that is not as new has an entry");
        state.replace_roster(Roster::default());
        assert!(fleet.find("locked").is_none());
        state.save().await.unwrap();
        assert_eq!(saved(), ["locked"]);
        let back = plugin.machine("locked", &Events::default());
        state.replace_roster(Roster::new(Vec::new(), vec![Arc::clone(&back)]));
        assert_eq!(back.task_lock(), Some(lock));
        assert!(state.others().is_empty());
    }

    #[test]
    fn lock_is_passed_only_when_it_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateStore::open(folder.path(), Arc::default()).unwrap();
        std::thread::scope(|scope| {
            let (held, (passed, receiver)) = (state.others(), std::sync::mpsc::channel());
            let state = &state;
            scope.spawn(move || {
                state.pass_locks();
                passed.send(()).unwrap();
            });
            assert!(receiver.recv_timeout(std::time::Duration::from_millis(100)).is_err());
            drop(held);
            receiver.recv().unwrap();
        });
    }
}
