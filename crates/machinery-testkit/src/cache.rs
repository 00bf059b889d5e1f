//! Folders that take long to make. They are made once, and shared by all test runs.
//!
//! A folder is built under a temporary name, under a file lock, and renamed when it is complete. Concurrent
//! test runs wait for the lock. The next build removes leftovers of a killed one.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::{env, io};

use rustix::process::geteuid;

use crate::Result;
use crate::error::{Context, Error};

/// The folder of root's guests, whose own folder is closed to the users that a jail gives to machines.
const SYSTEM_CACHE: &str = "/var/cache";

/// Returns `$CUCKOO_TESTKIT_CACHE`, or `cuckoo-machinery-testkit` in the cache folder of the system for root, and of the
/// user otherwise.
pub fn default() -> Result<PathBuf> {
    let user = || {
        let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let own = || match geteuid().is_root() {
            true => Some(PathBuf::from(SYSTEM_CACHE)),
            false => Some(Path::new(&env::var_os("HOME")?).join(".cache")),
        };
        let cache = cache.or_else(own);
        Some(cache?.join("cuckoo-machinery-testkit"))
    };
    let chosen = env::var_os("CUCKOO_TESTKIT_CACHE").map(PathBuf::from).or_else(user);
    chosen.ok_or_else(|| Error::new("there is no place for test guests: set CUCKOO_TESTKIT_CACHE or HOME"))
}

/// Makes the folder `cache` if it does not exist, and returns its real path.
pub fn open(cache: &Path) -> Result<PathBuf> {
    let what = || format!("opening the cache {}", cache.display());
    fs::create_dir_all(cache).context(what)?;
    cache.canonicalize().context(what)
}

/// Returns a short name for `content`, which differs for other content.
pub fn fingerprint<T: Hash + ?Sized>(content: &T) -> String {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Returns the folder `name` in `cache`; `build` fills it if it does not exist.
pub fn folder(cache: &Path, name: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let folder = cache.join(name);
    if folder.is_dir() {
        return Ok(folder);
    }
    let _lock = lock(cache, name)?;
    if folder.is_dir() {
        return Ok(folder);
    }
    let unfinished = unfinished(name);
    remove_leftovers(cache, &unfinished)?;
    let building = tempfile::Builder::new().prefix(&unfinished).tempdir_in(cache);
    let building = building.context(|| format!("making a folder in {}", cache.display()))?;
    build(building.path())?;
    fs::set_permissions(building.path(), fs::Permissions::from_mode(0o755))
        .context(|| format!("opening {name}"))?;
    publish(building, &folder)?;
    Ok(folder)
}

/// Returns the file `name` in `folder`; `write` writes it if it does not exist.
pub fn file(folder: &Path, name: &str, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<PathBuf> {
    let file = folder.join(name);
    if file.is_file() {
        return Ok(file);
    }
    let _lock = lock(folder, name)?;
    if file.is_file() {
        return Ok(file);
    }
    let unfinished = unfinished(name);
    remove_leftovers(folder, &unfinished)?;
    let what = || format!("making {}", file.display());
    let readable = fs::Permissions::from_mode(0o644);
    let writing = tempfile::Builder::new().prefix(&unfinished).permissions(readable).tempfile_in(folder);
    let mut writing = writing.context(what)?;
    write(writing.as_file_mut()).context(what)?;
    writing.persist(&file).context(what)?;
    Ok(file)
}

/// Returns the beginning of a temporary name, which that of no other entry begins with.
fn unfinished(name: &str) -> String {
    format!(".{name}.unfinished-")
}

fn publish(building: tempfile::TempDir, folder: &Path) -> Result<()> {
    fs::rename(building.path(), folder).context(|| format!("publishing {}", folder.display()))?;
    // The folder no longer has its temporary name.
    let _ = building.keep();
    Ok(())
}

/// Waits for the lock of `name` in `folder`, which is held until the file is dropped.
fn lock(folder: &Path, name: &str) -> Result<File> {
    let path = folder.join(format!(".{name}.lock"));
    let what = || format!("locking {}", path.display());
    fs::create_dir_all(folder).context(what)?;
    let file = File::options().create(true).append(true).open(&path).context(what)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).context(what)?;
    Ok(file)
}

/// Removes leftovers of killed builds. The caller holds the lock, so no build is running.
fn remove_leftovers(folder: &Path, prefix: &str) -> Result<()> {
    let what = || format!("clearing {}", folder.display());
    for entry in fs::read_dir(folder).context(what)? {
        let path = entry.context(what)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match name.starts_with(prefix) {
            true if path.is_dir() => fs::remove_dir_all(&path).context(what)?,
            true => fs::remove_file(&path).context(what)?,
            false => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_is_built_once_and_published_when_complete() {
        let cache = tempfile::tempdir().unwrap();
        fs::create_dir(cache.path().join(".thing.unfinished-killed")).unwrap();
        assert!(folder(cache.path(), "thing", |_| Err(Error::new("no"))).is_err());
        assert!(!cache.path().join("thing").exists());
        for _ in 0..2 {
            let built = folder(cache.path(), "thing", |at| {
                fs::write(at.join("a"), "b").context(String::new)?;
                assert!(!cache.path().join(".thing.unfinished-killed").exists());
                Ok(())
            });
            assert_eq!(fs::read_to_string(built.unwrap().join("a")).unwrap(), "b");
        }
    }

    #[test]
    fn build_of_another_folder_goes_on_when_its_name_begins_in_the_same_way() {
        let cache = tempfile::tempdir().unwrap();
        let longer = folder(cache.path(), "thing-of-steel", |at| {
            folder(cache.path(), "thing", |_| Ok(()))?;
            fs::write(at.join("a"), "b").context(String::new)
        });
        assert!(longer.unwrap().join("a").exists());
    }

    #[test]
    fn folder_is_built_once_when_builders_run_concurrently() {
        let cache = tempfile::tempdir().unwrap();
        let builds = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    folder(cache.path(), "thing", |_| {
                        builds.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        Ok(())
                    })
                });
            }
        });
        assert_eq!(builds.into_inner(), 1);
    }
}
