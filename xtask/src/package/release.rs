//! The release that is packaged.

use std::path::Path;
use std::process::Command;

use crate::install::Plugin;
use crate::run::{CHECKOUT, Result, output};

/// The plugins in packages.
pub const PLUGINS: [Plugin; 2] = [Plugin::Qemu, Plugin::Kvm];

/// The version and the date of all packages.
pub struct Release {
    /// The version, as in `Cargo.toml`.
    pub version: String,
    /// The time of the commit, in seconds since 1970.
    pub epoch: String,
}

impl Release {
    /// Returns the release of this checkout.
    pub fn of_checkout() -> Result<Release> {
        let time = output(Command::new("git").args(["-C", CHECKOUT, "log", "-1", "--format=%ct"]))?;
        Ok(Release { version: env!("CARGO_PKG_VERSION").to_owned(), epoch: time.trim().to_owned() })
    }

    /// Expects that the program in the folder of a build has this version: a test of an upgrade builds another one there.
    pub fn expect_built(&self, built: &Path) -> Result<()> {
        let version = output(Command::new(built.join("cuckoo-machinery")).arg("--version"))?;
        match version.trim().rsplit_once(' ') {
            Some((_, version)) if version == self.version => Ok(()),
            _ => Err(format!("{} has {}, and not {}", built.display(), version.trim(), self.version).into()),
        }
    }

    /// Gives a command the date of the release.
    pub fn date<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("SOURCE_DATE_EPOCH", &self.epoch)
    }
}
