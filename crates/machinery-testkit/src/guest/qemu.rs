//! The QEMU that the tests use.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Error;
use crate::{Result, command, version};

/// The programs of one QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qemu {
    /// `qemu-system-x86_64`.
    pub system: PathBuf,
    /// `qemu-img`.
    pub img: PathBuf,
}

impl Qemu {
    /// Finds the QEMU for tests: in `$CUCKOO_TEST_QEMU_DIR` (its `bin` or `usr/bin`), or in `$PATH`.
    pub fn find() -> Result<Self> {
        match env::var_os("CUCKOO_TEST_QEMU_DIR").filter(|folder| !folder.is_empty()) {
            Some(dir) => Self::in_folders(&["bin", "usr/bin"].map(|bin| Path::new(&dir).join(bin))),
            None => Self::in_folders(
                &env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect::<Vec<_>>(),
            ),
        }
    }

    fn in_folders(folders: &[PathBuf]) -> Result<Self> {
        let program = |name: &str| {
            let paths = folders.iter().map(|folder| folder.join(name));
            paths.into_iter().find(|path| path.is_file()).ok_or_else(|| {
                let places = env::join_paths(folders).unwrap_or_default();
                Error::new(format!(
                    "there is no {name} in {places:?}: install qemu-system-x86 and qemu-utils, or set CUCKOO_TEST_QEMU_DIR"
                ))
            })
        };
        Ok(Self { system: program("qemu-system-x86_64")?, img: program("qemu-img")? })
    }

    /// Returns the first line of the output of `--version`.
    pub fn version(&self) -> Result<String> {
        let said = command::output(Command::new(&self.system).arg("--version"))?;
        Ok(said.lines().next().unwrap_or_default().to_owned())
    }

    /// Reports whether QEMU needs a backend for a sound card, which `-audio none` gives it. Source: QEMU's
    /// system/vl.c.
    pub(super) fn needs_audio_backend(&self) -> Result<bool> {
        Ok(version::numbers(&self.version()?) >= Some((8, 2)))
    }

    /// Makes `overlay`, an overlay of `disk`.
    pub fn overlay(&self, disk: &Path, overlay: &Path) -> Result<()> {
        let mut create = Command::new(&self.img);
        create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).args([disk, overlay]);
        command::output(&mut create).map(drop)
    }
}
