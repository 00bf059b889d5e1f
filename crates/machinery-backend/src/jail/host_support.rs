//! The support for jails on this computer.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use machinery::trust::expect_trusted;
use machinery::{Error, Result};
use machinery_jail::Support;

/// The support for jails on this computer.
#[derive(Debug, Clone)]
pub struct HostSupport {
    pub kernel: Support,
    /// The helper program, or the reason why it cannot be used.
    pub helper: Result<PathBuf>,
}

impl HostSupport {
    /// Returns the support of this computer, which is found once.
    pub fn find() -> &'static HostSupport {
        static FOUND: OnceLock<HostSupport> = OnceLock::new();
        FOUND.get_or_init(|| HostSupport { kernel: Support::of_this_host(), helper: helper() })
    }
}

/// Returns the helper program, which nobody but root and the host's user may have changed.
fn helper() -> Result<PathBuf> {
    let helper = machinery_jail::installed().map_err(|error| {
        Error::environment(format!("{error}, which confines QEMU"))
            .advice("Install it beside the plugins, or set jail: off in machinery-host.yaml")
    })?;
    expect_trusted(&helper)?;
    Ok(helper)
}

/// Returns the path of a program that may be given by its name, as the shell finds it. The jail has another `PATH`.
pub fn found_in_path(program: &Path) -> PathBuf {
    if program.components().count() > 1 {
        return program.to_owned();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).map(|folder| folder.join(program));
    places.find(|place| place.is_file()).unwrap_or_else(|| program.to_owned())
}
