//! Checks of a machinery's configuration before a command changes it.

use machinery::config::ConfigFile;
use machinery::{Error, Report, Result};

use crate::commands::check;
use crate::cwd::Cwd;
use crate::load;
use crate::plugin::open::open;
use crate::plugin::search::{self, PluginSearch};

/// Asks the plugin of a machinery to check this content before it is written to its configuration file.
///
/// # Errors
/// The plugin cannot be opened, or fails.
pub fn check_file(cwd: &Cwd, machinery: &str, file: ConfigFile, search: &PluginSearch) -> Result<Report> {
    let config = crate::config::Config::read(cwd)?;
    let opened =
        open(machinery, search, config.plugin_hashes.as_ref(), config.timeouts.load).map_err(Error::from)?;
    check::check_with_plugin(&opened.plugin, load::setup_with(file, machinery, cwd, &config), &config)
}

/// Returns a note if `cuckoo.yaml` does not list the machinery.
pub fn unlisted(cwd: &Cwd, machinery: &str) -> Option<String> {
    let machineries = crate::config::Config::read(cwd).ok()?.machineries;
    let note = format!("cuckoo.yaml does not list the machinery {machinery}: add it to machineries");
    (!search::is_listed(machinery, &machineries)).then_some(note)
}
