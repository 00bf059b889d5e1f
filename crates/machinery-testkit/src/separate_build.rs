//! Builds on their own: crates outside the workspace, and with other compilers.
//!
//! They go to a folder of their own below the build's, so that a second build has little to do.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error};
use crate::{Result, artifacts};

/// A build of a crate by itself.
#[derive(Debug)]
pub struct SeparateBuild {
    manifest: PathBuf,
    /// A name for it, and for its folder.
    name: String,
    toolchain: Option<String>,
    release: bool,
}

impl SeparateBuild {
    /// A build of the crate or workspace with that `Cargo.toml`; `name` is that of its folder.
    pub fn of(manifest: &Path, name: &str) -> Self {
        SeparateBuild {
            manifest: manifest.to_owned(),
            name: name.to_owned(),
            toolchain: None,
            release: false,
        }
    }

    /// With that one of rustup's toolchains.
    #[must_use]
    pub fn with(mut self, toolchain: &str) -> Self {
        self.toolchain = Some(toolchain.to_owned());
        self
    }

    /// Optimised.
    #[must_use]
    pub fn release(mut self) -> Self {
        self.release = true;
        self
    }

    /// Builds what these arguments of `cargo build` name, and gives the folder in which it is then.
    pub fn build(&self, arguments: &[&str]) -> Result<PathBuf> {
        let target = self.target()?;
        let mut command = self.cargo();
        command.arg("build").args(arguments).arg("--manifest-path").arg(&self.manifest);
        command.arg("--target-dir").arg(&target);
        command.args(self.release.then_some("--release"));
        let ran = command.output().context(|| format!("running {command:?}"))?;
        if !ran.status.success() {
            let said = String::from_utf8_lossy(&ran.stderr);
            return Err(Error::new(format!("{command:?} failed with {}:\n{said}", ran.status)));
        }
        Ok(target.join(if self.release { "release" } else { "debug" }))
    }

    fn target(&self) -> Result<PathBuf> {
        let name = match &self.toolchain {
            Some(toolchain) => format!("{}-{toolchain}", self.name),
            None => self.name.clone(),
        };
        Ok(artifacts::folder()?.join("outside").join(name))
    }

    fn cargo(&self) -> Command {
        let Some(toolchain) = &self.toolchain else { return Command::new("cargo") };
        let mut command = Command::new("rustup");
        // Of the compiler that this test was built with.
        command.env_remove("RUSTUP_TOOLCHAIN").env_remove("RUSTC").env_remove("RUSTDOC");
        command.args(["run", toolchain, "cargo"]);
        command
    }
}

/// One of rustup's toolchains that has another compiler than the one that is used here, if there is one,
/// and it is new enough for `at_least`, such as `1.91`.
pub fn other_toolchain(at_least: &str) -> Result<Option<String>> {
    let own = version(&mut Command::new("rustc"))?;
    let Ok(list) = Command::new("rustup").args(["toolchain", "list", "--quiet"]).output() else {
        return Ok(None);
    };
    for toolchain in String::from_utf8_lossy(&list.stdout).lines().map(str::trim) {
        let mut rustc = Command::new("rustup");
        rustc.env_remove("RUSTUP_TOOLCHAIN").args(["run", toolchain, "rustc"]);
        let other = version(&mut rustc)?;
        if other != own && numbers(&other) >= numbers(at_least) {
            return Ok(Some(toolchain.to_owned()));
        }
    }
    Ok(None)
}

fn version(rustc: &mut Command) -> Result<String> {
    let ran = rustc.arg("--version").output().context(|| format!("running {rustc:?}"))?;
    Ok(String::from_utf8_lossy(&ran.stdout).trim().to_owned())
}

/// Major and minor of a version, wherever they stand in the text.
pub(crate) fn numbers(text: &str) -> Option<(u32, u32)> {
    let version =
        text.split_whitespace().find(|word| word.starts_with(|first: char| first.is_ascii_digit()))?;
    let mut parts = version.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(numbers("rustc 1.97.0-nightly (e50aa6fba 2026-05-19)"), Some((1, 97)));
        assert!(numbers("rustc 1.101.0 (x)") > numbers("1.91"));
        assert_eq!(numbers("rustc"), None);
    }
}
