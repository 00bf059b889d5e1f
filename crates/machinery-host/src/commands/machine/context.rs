//! Everything that the commands share.

use std::ffi::OsString;

use machinery::host::Plugin;

use crate::commands::import::Check;
use crate::config::Config;
use crate::cwd::Cwd;

/// The machinery of the machines.
pub const MACHINERY: &str = "qemu";

/// Everything that the commands share.
pub struct Context<'a> {
    pub cwd: &'a Cwd,
    pub config: &'a Config,
    pub plugin: &'a Plugin,
    /// Asks the plugin to check a configuration.
    pub check: Check<'a>,
    /// Shows the present step.
    pub step: &'a (dyn Fn(&str) + Sync),
    /// The arguments of this process that select CWD and plugins.
    pub globals: Vec<OsString>,
}
