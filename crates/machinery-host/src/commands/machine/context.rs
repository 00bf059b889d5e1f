//! Everything that the commands share.

use std::ffi::OsString;

use machinery::config::ConfigFile;
use machinery::{Report, Result};

use crate::commands::check::content::check_content;
use crate::config::Config;
use crate::cwd::Cwd;
use crate::plugin::search::PluginSearch;

/// The machinery of machines that QEMU runs without libvirt.
pub const MACHINERY: &str = "qemu";
/// The machinery of machines that are domains of libvirt.
pub const KVM: &str = "kvm";

/// Everything that the commands share.
#[derive(Clone)]
pub struct Context<'a> {
    pub cwd: &'a Cwd,
    pub config: &'a Config,
    /// The machinery of the machine.
    pub machinery: &'static str,
    pub search: &'a PluginSearch,
    /// Shows the present step.
    pub step: &'a (dyn Fn(&str) + Sync),
    /// The arguments of this process that select CWD and plugins.
    pub globals: Vec<OsString>,
}

impl Context<'_> {
    /// Has the plugin of the machine's machinery check this content of its configuration file.
    ///
    /// # Errors
    /// The plugin fails, or the present configuration of the host cannot be read.
    pub fn check(&self, file: ConfigFile) -> Result<Report> {
        self.check_of(self.machinery, file, &Config::read(self.cwd)?)
    }

    /// Has the plugin of a machinery check this content of its configuration file, with this configuration of the host.
    ///
    /// # Errors
    /// The plugin fails.
    pub fn check_of(&self, machinery: &str, file: ConfigFile, config: &Config) -> Result<Report> {
        check_content(self.cwd, machinery, file, config, self.search)
    }
}
