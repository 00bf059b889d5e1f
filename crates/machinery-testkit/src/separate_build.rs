//! Builds of crates outside the workspace, and by other compilers.
//!
//! Their results are kept in a folder of their own below the build's.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error};
use crate::version::numbers;
use crate::{Result, artifacts};

/// A separate build of a crate.
#[derive(Debug)]
pub struct SeparateBuild {
    manifest: PathBuf,
    /// The name of its folder.
    name: String,
    toolchain: Option<String>,
    release: bool,
}

impl SeparateBuild {
    /// Describes a build of the crate or workspace with that `Cargo.toml`; `name` is the name of its folder.
    pub fn of(manifest: &Path, name: &str) -> Self {
        SeparateBuild {
            manifest: manifest.to_owned(),
            name: name.to_owned(),
            toolchain: None,
            release: false,
        }
    }

    /// Uses that toolchain of rustup.
    #[must_use]
    pub fn with(mut self, toolchain: &str) -> Self {
        self.toolchain = Some(toolchain.to_owned());
        self
    }

    /// Builds with optimisations.
    #[must_use]
    pub fn release(mut self) -> Self {
        self.release = true;
        self
    }

    /// Runs `cargo build` with these arguments, and returns the folder of its results.
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
        // These variables select the compiler of this test.
        command.env_remove("RUSTUP_TOOLCHAIN").env_remove("RUSTC").env_remove("RUSTDOC");
        command.args(["run", toolchain, "cargo"]);
        command
    }
}

/// Returns a toolchain of rustup with another compiler than this one, of the version `at_least` (such as
/// `1.91`) or newer, if there is one.
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
