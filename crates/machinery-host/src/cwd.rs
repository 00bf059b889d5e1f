//! Cuckoo's working directory, the CWD, and the paths in it.
//!
//! A file `.cuckoocwd` marks the directory. Source: Cuckoo3's `common/storage.py`.

use std::env;
use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use machinery::trust::expect_trusted;
use machinery::{Error, Result};
use rustix::process::geteuid;

/// An existing CWD.
#[derive(Debug, Clone)]
pub struct Cwd {
    root: PathBuf,
}

impl Cwd {
    /// Opens the CWD that was given, else `$CUCKOO_CWD`, else `~/.cuckoocwd`.
    ///
    /// # Errors
    /// The folder does not exist or is no CWD.
    pub fn find(given: Option<&Path>) -> Result<Self> {
        let (root, source) = match (given, env::var_os("CUCKOO_CWD"), env::home_dir()) {
            (Some(root), _, _) => (root.to_owned(), "given with --cwd"),
            (None, Some(root), _) if !root.is_empty() => (root.into(), "given in $CUCKOO_CWD"),
            (None, _, Some(home)) => (home.join(".cuckoocwd"), "the default"),
            (None, _, None) => {
                return Err(Error::configuration("there is no home directory to look for Cuckoo's CWD in")
                    .advice("Give it with --cwd or in $CUCKOO_CWD"));
            }
        };
        Cwd::open(&root).map_err(|error| error.action(format!("using the Cuckoo CWD {source}")))
    }

    fn open(root: &Path) -> Result<Self> {
        let advice =
            "Give the right folder with --cwd or in $CUCKOO_CWD, or create a CWD with `cuckoo createcwd`";
        let root = root.canonicalize().map_err(|error| {
            Error::configuration(format!("cannot open {}: {error}", root.display())).advice(advice)
        })?;
        if !root.join(".cuckoocwd").exists() {
            let reason = format!("{} is not a Cuckoo CWD: it has no file .cuckoocwd", root.display());
            return Err(Error::configuration(reason).advice(advice));
        }
        if root.to_str().is_none() {
            let reason = format!("{} is not valid UTF-8", root.display());
            return Err(Error::configuration(reason).advice("Rename the folder"));
        }
        Ok(Cwd { root })
    }

    /// Returns the absolute path of the CWD.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the path of Cuckoo's own configuration.
    pub fn cuckoo_yaml(&self) -> PathBuf {
        self.root.join("conf/cuckoo.yaml")
    }

    /// Returns the path of a machinery's configuration.
    pub fn machinery_yaml(&self, machinery: &str) -> PathBuf {
        self.root.join("conf/machineries").join(format!("{machinery}.yaml"))
    }

    /// Returns the path of the host's own configuration, an optional file.
    pub fn host_yaml(&self) -> PathBuf {
        self.root.join("conf/machinery-host.yaml")
    }

    /// Returns the folder of the plugins of this CWD.
    pub fn plugins(&self) -> PathBuf {
        self.root.join("machineries")
    }

    /// Returns the folder of Cuckoo's sockets.
    pub fn sockets(&self) -> PathBuf {
        self.root.join("operational/sockets")
    }

    /// Returns the path of the socket on which Cuckoo's clients expect the machinery manager.
    pub fn manager_socket(&self) -> PathBuf {
        self.sockets().join("machinerymanager.sock")
    }

    /// Returns the folder of the sockets of machines' consoles.
    pub fn console_sockets(&self) -> PathBuf {
        self.sockets().join("console")
    }

    /// Returns the folder of the host's state.
    pub fn state(&self) -> PathBuf {
        self.root.join("operational/generated/machinery-host")
    }

    /// Returns the folder of Cuckoo's analyses.
    pub fn storage(&self) -> PathBuf {
        self.root.join("storage")
    }

    /// Returns the host's folder for unfinished files of clients.
    pub fn staging(&self) -> PathBuf {
        self.state().join("unfinished")
    }

    /// Returns the folder in which machines are made, unless their operator names another one.
    pub fn machines(&self) -> PathBuf {
        self.root.join("machines")
    }

    /// Returns the folder of the records of unfinished machines.
    pub fn unfinished_machines(&self) -> PathBuf {
        self.state().join("machines")
    }

    /// Returns the default path of the wall's token.
    pub fn wall_token(&self) -> PathBuf {
        self.state().join("wall.token")
    }

    /// Returns the folder of a machinery's state.
    pub fn machinery_state(&self, machinery: &str) -> PathBuf {
        self.state().join(machinery).join("state")
    }

    /// Returns the folder for files that a machinery can make again.
    pub fn machinery_cache(&self, machinery: &str) -> PathBuf {
        self.state().join(machinery).join("cache")
    }
}

/// Makes a folder and its missing parents, with access for the user only.
///
/// # Errors
/// A folder cannot be made.
pub fn make_folder(path: &Path) -> Result<()> {
    make(path, 0o700)
}

/// Makes a folder and its missing parents. Others can reach the files that they know and may read, as a machine's own user
/// does, and see no list of them.
///
/// # Errors
/// A folder cannot be made.
pub fn make_reachable_folder(path: &Path) -> Result<()> {
    make(path, 0o711)
}

/// Makes the folder of the host's state.
///
/// # Errors
/// The folder cannot be made; as [`expect_own_state`].
pub fn make_state_folder(cwd: &Cwd) -> Result<()> {
    // Before and after: it may be made in a place that others can change.
    expect_own_state(cwd)?;
    make_reachable_folder(&cwd.state())?;
    expect_own_state(cwd)
}

/// Expects that no other user can replace the folder of the host's state, or the files in it, if the host is root. The host
/// believes what it finds there: which processes are its own, and which files it has made.
///
/// # Errors
/// Another user could replace it.
pub fn expect_own_state(cwd: &Cwd) -> Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let shared = ["operational", "operational/generated"].map(|name| cwd.root().join(name));
    let state = cwd.state();
    let trusted = match state.exists() {
        true => state_files(&state).iter().try_for_each(|path| expect_trusted(path).map(drop)),
        false => shared.iter().try_for_each(|folder| expect_kept(folder)),
    };
    trusted.map_err(|error| {
        let folders = shared.map(|folder| folder.display().to_string()).join(" ");
        error.advice(format!(
            "Cuckoo's user can share them: `chown root {folders}` and `chmod 1777 {folders}`. All files in {} have to \
             belong to root: `chown -R root` it, or remove it",
            state.display()
        ))
    })
}

/// Returns the folder of the state, what is in it, and the state files of the machineries.
fn state_files(state: &Path) -> Vec<PathBuf> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    let of_host = entries(state);
    let of_machineries = of_host.iter().flat_map(|folder| entries(&folder.join("state")));
    // A folder may be a run's, with the files of its process.
    let of_machineries: Vec<PathBuf> = of_machineries.filter(|path| !path.is_dir()).collect();
    [vec![state.to_owned()], of_host, of_machineries].concat()
}

/// Expects that nobody but root can rename or remove what root makes in a folder, if the folder exists.
fn expect_kept(folder: &Path) -> Result<()> {
    const STICKY: u32 = 0o1000;
    const WRITABLE_BY_OTHERS: u32 = 0o022;
    let Ok(found) = folder.metadata() else { return Ok(()) };
    let (uid, mode) = (found.uid(), found.mode());
    if uid == 0 && (mode & WRITABLE_BY_OTHERS == 0 || mode & STICKY != 0) {
        return Ok(());
    }
    let reason = format!("other users could replace what the host makes in {}", folder.display());
    Err(Error::configuration(reason))
}

fn make(path: &Path, mode: u32) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(|error| Error::io("make the folder", path, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cwd_is_found_by_its_marker_file() {
        let folder = tempfile::tempdir().unwrap();
        let error = Cwd::find(Some(folder.path())).unwrap_err().to_string();
        assert!(error.contains("--cwd") && error.contains(".cuckoocwd"), "{error}");
        std::fs::write(folder.path().join(".cuckoocwd"), "").unwrap();
        let cwd = Cwd::find(Some(folder.path())).unwrap();
        assert!(cwd.manager_socket().ends_with("operational/sockets/machinerymanager.sock"));
        assert!(Cwd::find(Some(Path::new("/none/such"))).unwrap_err().to_string().contains("/none/such"));
    }
}
