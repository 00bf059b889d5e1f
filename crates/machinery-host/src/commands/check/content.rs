//! Asks a plugin about the content of its machinery's configuration file, which may not be written yet.

use std::sync::Arc;

use machinery::config::ConfigFile;
use machinery::host::Plugin;
use machinery::{Error, Report, Result, Setup};

use crate::config::Config;
use crate::cwd::Cwd;
use crate::fleet::services::Services;
use crate::load;
use crate::plugin::call::call_blocking;
use crate::plugin::open::open;
use crate::plugin::search::PluginSearch;

/// Returns the plugin's findings about this setup.
///
/// # Errors
/// The plugin fails or does not return in time.
pub fn check_with_plugin(plugin: &Plugin, setup: Setup, config: &Config) -> Result<Report> {
    let services = Arc::new(Services::new(plugin.name(), Arc::default()));
    let what = format!("checking '{}'", plugin.name());
    let checked = plugin.clone();
    let found = call_blocking(config.timeouts.load, &what, move || checked.check(&setup, services));
    found.map_err(|error| error.action(what))
}

/// Returns the findings of a machinery's plugin about this content of its configuration file.
///
/// # Errors
/// The plugin cannot be opened, or fails.
pub fn check_content(
    cwd: &Cwd,
    machinery: &str,
    file: ConfigFile,
    config: &Config,
    search: &PluginSearch,
) -> Result<Report> {
    let opened =
        open(machinery, search, config.plugin_hashes.as_ref(), config.timeouts.load).map_err(Error::from)?;
    check_with_plugin(&opened.plugin, load::setup_with(file, machinery, cwd, config), config)
}
