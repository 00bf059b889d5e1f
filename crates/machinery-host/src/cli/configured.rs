//! Checks of a machinery's configuration before a command changes it.

use machinery::config::ConfigFile;
use machinery::{Report, Result};

use crate::commands::check::content::check_content;
use crate::config::Config;
use crate::cwd::Cwd;
use crate::plugin::search::{self, PluginSearch};

/// Asks the plugin of a machinery to check this content before it is written to its configuration file.
///
/// # Errors
/// The plugin cannot be opened, or fails.
pub fn check_file(cwd: &Cwd, machinery: &str, file: ConfigFile, search: &PluginSearch) -> Result<Report> {
    check_content(cwd, machinery, file, &Config::read(cwd)?, search)
}

/// Returns a note if `cuckoo.yaml` does not list the machinery.
pub fn unlisted(cwd: &Cwd, machinery: &str) -> Option<String> {
    let machineries = Config::read(cwd).ok()?.machineries;
    let note = format!("cuckoo.yaml does not list the machinery {machinery}: add it to machineries");
    (!search::is_listed(machinery, &machineries)).then_some(note)
}
