//! Opens a plugin file that was found and is trusted, and checks that it can be used.

use std::path::Path;
use std::time::Duration;

use machinery::host::{OpenError, Plugin};
use machinery::{Error, Result};

use super::call::call_blocking;
use super::checksum::{AllowList, FileHash};
use super::search::{self, PluginSearch};

/// An open plugin, and the hash of its file.
pub struct OpenedPlugin {
    /// The plugin.
    pub plugin: Plugin,
    /// The SHA-256 of its file.
    pub sha256: FileHash,
}

/// The reason why a plugin cannot be opened, by its consequence.
#[derive(Debug)]
pub enum OpenFailure {
    /// The plugin needs a library that is not installed on this host. Only this machinery is left out.
    LibraryMissing(Error),
    /// The plugin is missing or invalid. The host does not start.
    Invalid(Error),
}

impl OpenFailure {
    fn of(path: &Path, error: &OpenError) -> Self {
        let reason = format!("cannot use {} as a plugin: {error}", path.display());
        match error {
            OpenError::LibraryMissing { .. } => OpenFailure::LibraryMissing(Error::environment(reason)),
            _ => OpenFailure::Invalid(Error::configuration(reason)),
        }
    }
}

/// For callers that only report the reason.
impl From<OpenFailure> for Error {
    fn from(why: OpenFailure) -> Error {
        match why {
            OpenFailure::LibraryMissing(error) | OpenFailure::Invalid(error) => error,
        }
    }
}

/// Finds and opens the plugin of that name.
///
/// # Errors
/// The plugin is missing, is not trusted, or cannot be opened.
pub fn open(
    name: &str,
    plugins: &PluginSearch,
    allowed: Option<&AllowList>,
    limit: Duration,
) -> Result<OpenedPlugin, OpenFailure> {
    let found = search::find(name, &plugins.folders)
        .ok_or_else(|| OpenFailure::Invalid(search::not_found(name, &plugins.folders)))?;
    let (path, sha256) = search::trusted(name, &found, plugins, allowed).map_err(OpenFailure::Invalid)?;
    let file = path.clone();
    // The library's initialisers may never return.
    let opened =
        call_blocking(limit, &format!("opening {}", path.display()), move || Ok(Plugin::open(&file)));
    let plugin = opened.map_err(OpenFailure::Invalid)?.map_err(|error| OpenFailure::of(&path, &error))?;
    if plugin.name() != name {
        return Err(OpenFailure::Invalid(misnamed(&found, plugin.name(), name)));
    }
    tracing::debug!(machinery = name, path = %path.display(), version = plugin.version(), "plugin opened");
    Ok(OpenedPlugin { plugin, sha256 })
}

fn misnamed(path: &Path, real: &str, name: &str) -> Error {
    let path = path.display();
    Error::configuration(format!("{path} holds the machinery '{real}', not '{name}'"))
        .advice(format!("Name the file libmachinery_{real}.so and list '{real}'"))
}

/// Returns an error for each pair of plugins that cannot share a host.
pub fn conflicts(plugins: &[OpenedPlugin]) -> Vec<Error> {
    let mut found = Vec::new();
    let plugins: Vec<&Plugin> = plugins.iter().map(|opened| &opened.plugin).collect();
    for (index, one) in plugins.iter().enumerate() {
        for other in &plugins[index + 1..] {
            let why = one.conflict_with(other.name()).or_else(|| other.conflict_with(one.name()));
            if let Some(why) = why {
                let reason = format!(
                    "the machineries '{}' and '{}' cannot share a host: {why}",
                    one.name(),
                    other.name()
                );
                found.push(Error::configuration(reason).advice("List only one of them in cuckoo.yaml"));
            }
        }
    }
    found
}
