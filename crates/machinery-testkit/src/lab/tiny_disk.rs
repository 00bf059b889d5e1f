//! A very small file system, for tests of a full disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Context;
use crate::scratch::ScratchCwd;
use crate::{Result, host};

/// A very small file system, for tests of a full disk.
#[derive(Debug)]
pub struct TinyDisk {
    path: PathBuf,
}

impl TinyDisk {
    /// Mounts one in the CWD; `None` for a user who may not mount.
    pub fn mount(cwd: &ScratchCwd, kib: u32) -> Result<Option<Self>> {
        Self::mount_at(cwd, "tiny", kib)
    }

    /// Mounts one on that folder of the CWD; `None` for a user who may not mount.
    pub fn mount_at(cwd: &ScratchCwd, folder: &str, kib: u32) -> Result<Option<Self>> {
        let path = cwd.root().join(folder);
        fs::create_dir_all(&path).context(|| format!("making {}", path.display()))?;
        let size = format!("size={kib}k,mode=755");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&path);
        let mounted = host::run_command(mount)?;
        Ok((mounted.code == Some(0)).then_some(TinyDisk { path }))
    }

    /// Returns its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TinyDisk {
    fn drop(&mut self) {
        // A lazy unmount: a process that is ending may still have an open file.
        let mut umount = Command::new("umount");
        umount.arg("--lazy").arg(&self.path);
        let unmounted = host::run_command(umount);
        if !std::thread::panicking() {
            assert_eq!(unmounted.map(|ran| ran.code), Ok(Some(0)), "{} stays", self.path.display());
        }
    }
}
