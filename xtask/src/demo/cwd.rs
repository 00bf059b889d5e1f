//! The demo's Cuckoo CWD.

use std::fs;
use std::path::{Path, PathBuf};

use super::machine::Machine;
use crate::run::{Context, Result};

/// The CWD; removed when it is dropped.
pub struct DemoCwd {
    folder: tempfile::TempDir,
}

impl DemoCwd {
    /// Makes an empty CWD.
    pub fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("cuckoo-demo-").tempdir();
        let scratch = Self { folder: folder.context(|| "cannot make a folder for the demo".to_owned())? };
        scratch.write(".cuckoocwd", "")?;
        Ok(scratch)
    }

    /// Returns its folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes the configuration of `machine`.
    pub fn configure(&self, machine: &Machine) -> Result<()> {
        let cuckoo = CUCKOO.replace("MACHINERY", machine.machinery);
        self.write("conf/cuckoo.yaml", &cuckoo)?;
        self.write(&format!("conf/machineries/{}.yaml", machine.machinery), &machine.yaml)
    }

    /// Fails if an ended host left a socket, or a file of a run beside those of `machine`.
    pub fn check_nothing_left(&self, machine: &Machine) -> Result<()> {
        let mut left = files(&self.path().join("operational/sockets"));
        let is_known = |path: &PathBuf| machine.files.iter().any(|name| path.ends_with(name));
        left.extend(files(&machine.folder).into_iter().filter(|path| !is_known(path)));
        if left.is_empty() { Ok(()) } else { Err(format!("the host ended and left {left:?}").into()) }
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path().join(name);
        let what = || format!("cannot write {}", path.display());
        fs::create_dir_all(path.parent().unwrap_or(&path)).context(what)?;
        fs::write(&path, text).context(what)
    }
}

const CUCKOO: &str = "\
machineries:
  - MACHINERY
resultserver:
  listen_ip: 127.0.0.1
  listen_port: 2042
tcpdump:
  enabled: false
  path: /usr/bin/tcpdump
";

fn files(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default()
}
