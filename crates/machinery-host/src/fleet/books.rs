//! The standing of all machines, on disk, so that it outlives the host.
//!
//! One file, `machines.json`, always whole: it is written beside, brought to disk, and renamed over
//! the old one, so whatever ends the host, and when, leaves the old state or the new one. A change
//! is answered only when it is on disk; those that come while the file is being written go into the
//! next writing together.
//!
//! What is on record of machines that are not configured now is kept: their machinery may only be
//! left out today.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};

use machinery::{Error, Result};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use super::standing::Standing;
use super::{Fleet, Roll};

/// The only format there has been.
const FORMAT: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Page {
    format: u32,
    machines: BTreeMap<String, Standing>,
}

/// Keeps the file as the fleet is.
pub struct Books {
    path: PathBuf,
    fleet: Arc<Fleet>,
    /// Of machines that are not configured.
    others: std::sync::Mutex<BTreeMap<String, Standing>>,
    /// Counts calls of [`save`](Books::save).
    changes: AtomicU64,
    /// How many of them are on disk.
    written: Mutex<u64>,
    /// Whether the last writing failed, so that what is on disk may be old.
    behind: AtomicBool,
}

impl Books {
    /// Opens the books in that folder, and gives the machines the standing they had.
    ///
    /// # Errors
    /// The file is there, but cannot be read or makes no sense.
    pub fn open(folder: &Path, fleet: Arc<Fleet>) -> Result<Arc<Self>> {
        let path = folder.join("machines.json");
        let mut others = read(&path)?;
        recall(&mut others, &fleet.roll());
        let (changes, written, behind) = (AtomicU64::new(0), Mutex::new(0), AtomicBool::new(false));
        let others = std::sync::Mutex::new(others);
        Ok(Arc::new(Books { path, fleet, others, changes, written, behind }))
    }

    /// Puts others in the place of those in the fleet. What is known of machines that are not in it any
    /// more is kept, and given back to those that come anew.
    pub fn set_fleet(&self, roll: Roll) {
        let mut others = self.others();
        for machine in self.fleet.roll().machines() {
            let standing = machine.status().standing;
            if !roll.is_member(machine) && !standing.is_plain() {
                others.insert(machine.name().to_owned(), standing);
            }
        }
        recall(&mut others, &roll);
        self.fleet.set(roll);
    }

    fn others(&self) -> MutexGuard<'_, BTreeMap<String, Standing>> {
        // Whole after each statement, so poison means nothing.
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when all changes that were made before are on disk.
    ///
    /// # Errors
    /// They cannot be written. They are tried again with the next.
    pub async fn save(self: &Arc<Self>) -> Result<()> {
        let books = Arc::clone(self);
        let mine = books.changes.fetch_add(1, Ordering::SeqCst) + 1;
        // A task of its own: two writings never overlap, even if the first one's asker is gone.
        let saving = tokio::spawn(async move {
            let mut written = books.written.lock().await;
            if *written >= mine {
                return Ok(());
            }
            let up_to = books.changes.load(Ordering::SeqCst);
            let (path, text) = (books.path.clone(), books.text());
            let writing = tokio::task::spawn_blocking(move || write(&path, text?.as_bytes()));
            writing.await.unwrap_or_else(|error| Err(io::Error::other(error)))?;
            *written = up_to;
            Ok::<(), io::Error>(())
        });
        let saved = saving.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        self.behind.store(saved.is_err(), Ordering::SeqCst);
        saved.map_err(|error| {
            Error::io("note who has which machine in", &self.path, &error)
                .default_advice("Make it possible to write there, and ask again")
        })
    }

    /// Makes good for a writing that failed, if the last one did.
    pub async fn catch_up(self: &Arc<Self>) {
        if self.behind.load(Ordering::SeqCst)
            && let Err(error) = self.save().await
        {
            tracing::error!(%error, "what is on disk is still old");
        }
    }

    /// The captures that were on record when the host was started, also of machines that are not
    /// configured.
    pub fn captures(&self) -> Vec<PathBuf> {
        let roll = self.fleet.roll();
        let holds = roll.machines().iter().filter_map(|machine| machine.hold());
        let others = self.others();
        let others = others.values().filter_map(|standing| standing.lock.clone());
        holds.chain(others).filter_map(|hold| hold.pcap_path).collect()
    }

    fn text(&self) -> io::Result<String> {
        let others = self.others();
        let mut machines = others.clone();
        for machine in self.fleet.roll().machines() {
            let standing = machine.status().standing;
            if !standing.is_plain() {
                machines.insert(machine.name().to_owned(), standing);
            }
        }
        Ok(serde_json::to_string_pretty(&Page { format: FORMAT, machines })?)
    }
}

/// Gives the machines the standing that is on record for them.
fn recall(others: &mut BTreeMap<String, Standing>, roll: &Roll) {
    for machine in roll.machines() {
        if let Some(standing) = others.remove(machine.name()) {
            machine.recall(standing);
        }
    }
}

fn read(path: &Path) -> Result<BTreeMap<String, Standing>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(Error::io("read who has which machine from", path, &error)),
    };
    let wrong = |why: String| {
        Error::environment(format!("{} makes no sense: {why}", path.display()))
            .advice("Put it right, or move it away: then no machine is locked, reserved or disabled any more")
    };
    let page: Page = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    if page.format != FORMAT {
        return Err(wrong(format!("it has the format {}, and this host knows {FORMAT}", page.format)));
    }
    Ok(page.machines)
}

/// Puts a new file in the place of the old one, all or nothing.
fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let new = path.with_extension("json.new");
    let mut file = File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    // The name is in the folder, so the folder has to be on disk too.
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::super::standing::Hold;
    use super::*;

    #[tokio::test]
    async fn what_is_on_record_of_machines_that_are_away_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let hold = Hold { task_id: "t".into(), pcap_path: Some("/p".into()), memory_dump_path: None };
        let standing = Standing { lock: Some(hold), ..Standing::default() };
        let machines = BTreeMap::from([("away".to_owned(), standing)]);
        let path = folder.path().join("machines.json");
        write(
            &path,
            serde_json::to_string(&Page { format: FORMAT, machines: machines.clone() }).unwrap().as_bytes(),
        )
        .unwrap();
        let books = Books::open(folder.path(), Arc::default()).unwrap();
        books.save().await.unwrap();
        assert_eq!(read(&path).unwrap(), machines);
    }

    #[test]
    fn a_file_that_makes_no_sense_is_not_overlooked() {
        let folder = tempfile::tempdir().unwrap();
        for text in ["", "{", "{\"format\": 2, \"machines\": {}}"] {
            fs::write(folder.path().join("machines.json"), text).unwrap();
            let error = Books::open(folder.path(), Arc::default()).err().unwrap().to_string();
            assert!(error.contains("machines.json") && error.contains("move it away"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_full_or_missing_folder_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let gone = folder.path().join("gone");
        let books = Books::open(&gone, Arc::default()).unwrap();
        assert!(books.save().await.unwrap_err().to_string().contains("gone/machines.json"));
        fs::create_dir(&gone).unwrap();
        books.save().await.unwrap();
    }
}
