//! The replacement of this host by its own program, which a package may have renewed.
//!
//! ```text
//! request ─▶ the program is trusted ─▶ its `check` finds no problem ─▶ asked: the host ends, and executes it
//!                    └──────────────────────────┴─ otherwise: refused, and the host serves on
//! ```
//!
//! The check runs before anything ends: a program that cannot start would leave all guests without a host.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machinery::trust::expect_trusted;
use machinery::{Error, Result};
use tokio::process::Command;
use tokio::sync::{Mutex, Notify};
use tokio::time::timeout;

use crate::cwd::Cwd;
use crate::plugin::search::PluginSearch;

/// The time that the check may take: it asks each plugin, and those ask their hypervisors.
const CHECK_TIMEOUT: Duration = Duration::from_secs(120);

/// The program that replaces this host.
pub struct Replacement {
    program: PathBuf,
    /// The arguments of its check.
    check: Vec<OsString>,
    /// Held by a check under way.
    checking: Mutex<()>,
    asked: Notify,
}

impl Replacement {
    /// Returns the replacement by that program, which serves the CWD with the same plugins.
    pub fn new(program: &Path, cwd: &Cwd, search: &PluginSearch) -> Self {
        let mut check = vec![OsString::from("--cwd"), cwd.root().into()];
        for folder in &search.folders {
            check.extend([OsString::from("--plugin-dir"), folder.into()]);
        }
        check.extend(search.allow_insecure.then(|| "--allow-insecure-plugins".into()));
        check.push("check".into());
        let (program, checking, asked) = (program.to_owned(), Mutex::default(), Notify::new());
        Replacement { program, check, checking, asked }
    }

    /// Asks for the replacement.
    ///
    /// # Errors
    /// Others could have changed the program, or its check finds a problem.
    pub async fn request(&self) -> Result<()> {
        let _one =
            self.checking.try_lock().map_err(|_| Error::not_now("another upgrade is being checked"))?;
        expect_fit(&self.program, &self.check).await?;
        self.asked.notify_one();
        Ok(())
    }

    /// Waits for a [`request`](Replacement::request) that was not refused.
    pub async fn asked(&self) {
        self.asked.notified().await;
    }
}

async fn expect_fit(program: &Path, check: &[OsString]) -> Result<()> {
    let unfit = |error: Error| error.advice("The host serves on; repeat the upgrade once that is mended");
    expect_trusted(program).map_err(unfit)?;
    let mut command = machinery::command(program);
    command.args(check);
    // A check that lasts too long is killed and reaped.
    let output = Command::from(command).kill_on_drop(true).output();
    let too_long = |_| Error::timeout(format!("its check has not ended within {CHECK_TIMEOUT:?}"));
    let checked = timeout(CHECK_TIMEOUT, output).await.map_err(|elapsed| unfit(too_long(elapsed)))?;
    let checked = checked.map_err(|error| unfit(Error::io("run", program, &error)))?;
    if checked.status.success() {
        return Ok(());
    }
    let output = [checked.stdout, checked.stderr].concat();
    let reason = format!("{} finds problems in its check", program.display());
    Err(unfit(Error::configuration(reason).detail(String::from_utf8_lossy(&output).trim())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    async fn requested(script: &str, mode: u32) -> (Result<()>, bool) {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().canonicalize().unwrap().join("program");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
        fs::write(folder.path().join(".cuckoocwd"), "").unwrap();
        let cwd = Cwd::find(Some(folder.path())).unwrap();
        let search = PluginSearch { folders: vec!["/plugins".into()], allow_insecure: true };
        let replacement = Replacement::new(&program, &cwd, &search);
        let result = replacement.request().await;
        let asked = tokio::time::timeout(Duration::ZERO, replacement.asked()).await.is_ok();
        (result, asked)
    }

    #[tokio::test]
    async fn replacement_is_asked_for_when_the_check_finds_no_problem() {
        let script = r#"[ "$1 $3 $4 $5 $6" = "--cwd --plugin-dir /plugins --allow-insecure-plugins check" ]"#;
        let (result, asked) = requested(script, 0o755).await;
        result.unwrap();
        assert!(asked);
    }

    #[tokio::test]
    async fn replacement_is_refused_when_the_program_is_unfit() {
        let cases =
            [("echo no disk; exit 2", 0o755, "no disk"), ("exit 0", 0o757, "chmod o-w"), ("", 0o644, "run")];
        for (script, mode, why) in cases {
            let (result, asked) = requested(script, mode).await;
            let error = result.unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("serves on"), "{error}");
            assert!(!asked);
        }
    }
}
