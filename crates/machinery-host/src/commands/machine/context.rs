//! Everything that the commands share.

use std::ffi::OsString;

use machinery::config::ConfigFile;
use machinery::{Report, Result};

use crate::config::Config;
use crate::cwd::Cwd;
use crate::plugin::search::PluginSearch;

/// The machinery of machines that QEMU runs without libvirt.
pub const MACHINERY: &str = "qemu";
/// The machinery of machines that are domains of libvirt.
pub const KVM: &str = "kvm";

/// Asks the plugin of a machinery to check a configuration.
pub type CheckOf<'a> = &'a dyn Fn(&str, ConfigFile) -> Result<Report>;

/// Everything that the commands share.
#[derive(Clone)]
pub struct Context<'a> {
    pub cwd: &'a Cwd,
    pub config: &'a Config,
    /// The machinery of the machine.
    pub machinery: &'static str,
    pub search: &'a PluginSearch,
    pub check: CheckOf<'a>,
    /// Shows the present step.
    pub step: &'a (dyn Fn(&str) + Sync),
    /// The arguments of this process that select CWD and plugins.
    pub globals: Vec<OsString>,
}

impl Context<'_> {
    /// Has the plugin of the machine's machinery check a configuration.
    ///
    /// # Errors
    /// The plugin fails.
    pub fn check(&self, file: ConfigFile) -> Result<Report> {
        (self.check)(self.machinery, file)
    }
}
