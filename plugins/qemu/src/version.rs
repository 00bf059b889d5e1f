//! The version of QEMU's program: read when the plugin is loaded, and again when the program has changed.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Mutex;
use std::time::Duration;

use machinery::{Deadline, Error, Result};
use machinery_backend::process::output;
use machinery_backend::sync::lock;
use machinery_images::FileId;
use serde::{Deserialize, Serialize};

/// A QEMU version. Each feature that depends on the version is a method, with its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Version {
    major: u32,
    minor: u32,
    patch: u32,
}

impl Version {
    const OLDEST: Version = Version::new(2, 11, 0);

    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Version { major, minor, patch }
    }

    /// Runs the program to read its version.
    ///
    /// # Errors
    /// The program cannot be run, reports no version, or is too old.
    pub fn of(program: &Path) -> Result<Version> {
        let output = run(program, ["--version"])?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = Version::parse(&text).ok_or_else(|| {
            let said =
                if text.trim().is_empty() { String::from_utf8_lossy(&output.stderr) } else { text.clone() };
            Error::environment(format!(
                "{} --version does not report a version: {}",
                program.display(),
                said.trim()
            ))
            .advice("Check that it is QEMU's own binary")
        })?;
        if version < Version::OLDEST {
            let reason = format!(
                "{} is QEMU {version}, and {} is the oldest that works",
                program.display(),
                Version::OLDEST
            );
            return Err(Error::environment(reason).advice("Install a newer QEMU, or name another binary"));
        }
        Ok(version)
    }

    /// Parses `QEMU emulator version 7.2.22 (Debian …)`.
    fn parse(text: &str) -> Option<Version> {
        let (_, rest) = text.split_once("version ")?;
        let digits: String = rest.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
        let mut numbers = digits.split('.').map(str::parse);
        let major = numbers.next()?.ok()?;
        let minor = numbers.next()?.ok()?;
        let patch = numbers.next().and_then(Result::ok).unwrap_or(0);
        Some(Version::new(major, minor, patch))
    }

    /// Reports whether `migrate-incoming` reads plain files by `file:`; from then on `fd:` of a plain file
    /// is deprecated. Source: QEMU's docs/about/deprecated.rst and qapi/migration.json.
    pub fn reads_snapshot_files(self) -> bool {
        self >= Version::new(8, 2, 0)
    }

    /// Reports whether `migrate-incoming` takes descriptors by the name `getfd` gave them; before, only
    /// numbers were read. Source: QEMU's migration/fd.c.
    pub fn incoming_by_name(self) -> bool {
        self >= Version::new(4, 1, 0)
    }

    /// Reports whether a machine's RAM can be a file of the plugin, and be left out of the load. Sources: QEMU's
    /// migration/ram.c (`x-ignore-shared`, since 4.0), hw/core/machine.c (`memory-backend`, since 5.0).
    pub fn has_memory_backends(self) -> bool {
        self >= Version::new(5, 0, 0)
    }

    /// Reports whether a RAM file can be mapped privately without being opened for writing. Source: `rom` in
    /// QEMU's qapi/qom.json, since 8.2.
    pub fn maps_readonly_files(self) -> bool {
        self >= Version::new(8, 2, 0)
    }

    /// Reports whether RAM that the guest gives back is also taken out of a privately mapped file. Source:
    /// `ram_block_discard_range` in QEMU's softmmu/physmem.c, changed in 8.2.
    pub fn discards_into_files(self) -> bool {
        self < Version::new(8, 2, 0)
    }

    /// Reports whether `-audio` sets the default backend of sound cards. Source: QEMU's system/vl.c, since 8.2.
    pub fn has_default_audio(self) -> bool {
        self >= Version::new(8, 2, 0)
    }

    /// Reports whether `screendump` writes PNG. Source: qapi/ui.json.
    pub fn screenshots_as_png(self) -> bool {
        self >= Version::new(7, 1, 0)
    }
}

/// The maximum time for a program that reports its version or tests a device.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs the program to its end. A program that hangs is killed after a timeout, because all machines wait for
/// the caller.
///
/// # Errors
/// The program cannot be run, or does not end in time.
pub fn run(program: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Output> {
    let mut command = machinery::command(program);
    command.args(args);
    output(command, Deadline::after(PROGRAM_TIMEOUT))
}

/// QEMU's program and its version.
pub struct Program {
    path: PathBuf,
    known: Mutex<(Version, FileId)>,
}

impl Program {
    /// Creates the program at that path, which now has that version.
    ///
    /// # Errors
    /// The program does not exist.
    pub fn new(path: &Path, version: Version) -> Result<Program> {
        let id = FileId::of(path).map_err(|error| Error::io("look at", path, &error))?;
        Ok(Program { path: path.to_owned(), known: Mutex::new((version, id)) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the current version and the file's identity. The program runs only if the file has changed.
    ///
    /// # Errors
    /// The program does not exist any more, or reports no version.
    pub fn current(&self) -> Result<(Version, FileId)> {
        let id = FileId::of(&self.path).map_err(|error| Error::io("look at", &self.path, &error))?;
        let mut known = lock(&self.known);
        if known.1 != id {
            *known = (Version::of(&self.path)?, id);
            tracing::info!(version = %known.0, "QEMU's program was replaced");
        }
        Ok(known.clone())
    }

    /// Returns the version at the last call of [`current`](Program::current).
    pub fn version(&self) -> Version {
        lock(&self.known).0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn version_is_parsed_as_distributions_write_it() {
        for (text, version) in [
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", Version::new(7, 2, 22)),
            ("QEMU emulator version 2.11.1(Debian 1:2.11+dfsg-1ubuntu7.42)", Version::new(2, 11, 1)),
            ("QEMU emulator version 10.1 (v10.1-rc2)", Version::new(10, 1, 0)),
        ] {
            assert_eq!(Version::parse(text), Some(version), "{text}");
        }
        assert_eq!(Version::parse("hello"), None);
    }

    fn fake(says: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qemu");
        std::fs::write(&path, format!("#!/bin/sh\necho '{says}'\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        (folder, path)
    }

    #[test]
    fn version_is_read_again_when_the_program_was_replaced() {
        let (folder, path) = fake("QEMU emulator version 7.2.22");
        let program = Program::new(&path, Version::of(&path).unwrap()).unwrap();
        let (version, id) = program.current().unwrap();
        assert_eq!((version, &id), (Version::new(7, 2, 22), &program.current().unwrap().1));
        let (_other, new) = fake("QEMU emulator version 10.0.2");
        std::fs::copy(new, &path).unwrap();
        assert_eq!(program.current().unwrap().0, Version::new(10, 0, 2));
        drop(folder);
        assert!(program.current().unwrap_err().to_string().contains("qemu"));
    }

    #[test]
    fn version_is_refused_when_it_is_old_or_missing() {
        let (_folder, old) = fake("QEMU emulator version 2.10.2");
        let text = Version::of(&old).unwrap_err().to_string();
        assert!(text.contains("2.10.2") && text.contains("2.11.0"), "{text}");
        let (_folder, other) = fake("ls (GNU coreutils) 9.1");
        assert!(Version::of(&other).unwrap_err().to_string().contains("coreutils"));
        assert!(Version::of(Path::new("/none/qemu")).unwrap_err().to_string().contains("/none/qemu"));
    }

    #[test]
    fn oldest_version_that_works_is_accepted() {
        let (_folder, oldest) = fake("QEMU emulator version 2.11.0");
        assert_eq!(Version::of(&oldest).unwrap(), Version::OLDEST);
    }

    #[test]
    fn feature_is_used_from_its_version_on() {
        let first = |has: fn(Version) -> bool, major, minor| {
            let before = if minor == 0 { (major - 1, 9) } else { (major, minor - 1) };
            !has(Version::new(before.0, before.1, 99)) && has(Version::new(major, minor, 0))
        };
        assert!(first(Version::incoming_by_name, 4, 1));
        assert!(first(Version::has_memory_backends, 5, 0));
        assert!(first(Version::screenshots_as_png, 7, 1));
        assert!(first(Version::reads_snapshot_files, 8, 2));
        assert!(first(Version::maps_readonly_files, 8, 2));
        assert!(first(Version::has_default_audio, 8, 2));
        assert!(first(|version| !version.discards_into_files(), 8, 2));
    }
}
