//! `qemu-img`, in a jail and with a time limit for each call.
//!
//! A run may have written to the image, so the image may attack the program that reads it. The program may open the
//! files of its call, and nothing else.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use machinery::{Deadline, Error, Result};
use serde_json::Value;

use crate::jail::{Jail, JailMode, Policy, User};
use crate::process;

/// The program `qemu-img`.
#[derive(Debug, Clone)]
pub struct QemuImg {
    program: PathBuf,
    jail: JailMode,
    /// The user of the program; `None` is this process's own.
    user: Option<User>,
}

/// The files that a call may open.
#[derive(Debug, Clone, Default)]
pub struct ImageFiles {
    /// Files that are only read: an image with its chain.
    pub read: Vec<PathBuf>,
    /// Files that are written. They have to exist.
    pub written: Vec<PathBuf>,
}

impl QemuImg {
    /// Uses the program at that path, or of that name.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        QemuImg { program: program.into(), jail: JailMode::Auto, user: None }
    }

    /// Uses the program with another jail.
    #[must_use]
    pub fn with_jail(mut self, jail: JailMode) -> Self {
        self.jail = jail;
        self
    }

    /// Runs the program as the owner of that file, if this process is root. In its jail, root has no right to files of
    /// others.
    ///
    /// # Errors
    /// The file is missing.
    pub fn as_owner_of(mut self, file: &Path) -> Result<Self> {
        let about = fs::metadata(file).map_err(|error| Error::io("look at", file, &error))?;
        self.user =
            (about.uid() != 0).then(|| User { uid: about.uid(), gid: about.gid(), groups: Vec::new() });
        Ok(self)
    }

    /// Returns the path or the name of the program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Runs the program, which may open these files. `what` names the purpose, such as
    /// `make an overlay of /d/disk.qcow2`.
    ///
    /// # Errors
    /// The program cannot be run, does not end in time, or reports a failure. It is killed at the deadline.
    pub fn run(
        &self,
        what: &str,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
        files: ImageFiles,
        deadline: Deadline,
    ) -> Result<Vec<u8>> {
        let policy = Policy { read: files.read, write: files.written, ..Policy::default() };
        let jail = Jail::of_a_tool(self.jail).with_user(self.user.clone());
        let mut command = jail.confine(policy)?.command(&self.program, Vec::new())?;
        command.args(args);
        let output = process::output(command, deadline)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let reason = format!("{} cannot {what}", self.program.display());
        Err(Error::failed(reason).detail(String::from_utf8_lossy(&output.stderr).trim()))
    }

    /// Returns the description of an image, as `qemu-img info` prints it. It does not open the image for writing, so
    /// the image may be in use.
    ///
    /// # Errors
    /// As [`run`](QemuImg::run); the output is no JSON.
    pub fn info(&self, image: &Path, deadline: Deadline) -> Result<Value> {
        let args = ["info", "--output=json", "--force-share"].map(OsStr::new);
        let what = format!("describe {}", image.display());
        let files = ImageFiles { read: vec![image.to_owned()], ..ImageFiles::default() };
        let output = self.run(&what, args.into_iter().chain([image.as_os_str()]), files, deadline)?;
        serde_json::from_slice(&output).map_err(|error| {
            Error::failed(format!("{} cannot {what}: its output is no JSON: {error}", self.program.display()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn info_has_the_programs_message_when_the_image_is_missing() {
        let deadline = Deadline::after(Duration::from_secs(60));
        let error = QemuImg::new("qemu-img").info(Path::new("/none/disk"), deadline).unwrap_err().to_string();
        assert!(error.starts_with("qemu-img cannot describe /none/disk"), "{error}");
        assert!(error.contains("No such file"), "{error}");
    }
}
