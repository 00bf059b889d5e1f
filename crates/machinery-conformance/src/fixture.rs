//! A plugin, all that a host would give it, and what is known of its backend: what one test needs.

use std::any::Any;
use std::fs;
use std::path::{Path, PathBuf};

use machinery::config::ConfigFile;
use machinery::{Error, Result, Setup};
use tempfile::TempDir;

use crate::{BackendSpec, Report};

/// A plugin file with a configuration, a scratch folder for its sockets, state and caches, and the
/// spec. Dropped, it takes the folder with it.
pub struct Fixture {
    plugin: PathBuf,
    setup: Setup,
    spec: BackendSpec,
    kept: Vec<Box<dyn Any>>,
    folder: TempDir,
}

impl Fixture {
    /// A fixture for the plugin file, with the text of its YAML.
    ///
    /// # Errors
    /// The scratch folder cannot be made.
    pub fn new(plugin: impl Into<PathBuf>, config: &str, spec: BackendSpec) -> Result<Self> {
        let plugin = plugin.into();
        let folder = tempfile::Builder::new().prefix("machinery-fixture.").tempdir();
        let folder = folder.map_err(|error| {
            Error::environment(format!("cannot make a scratch folder for {}: {error}", plugin.display()))
                .advice("Point TMPDIR to a folder that can be written to")
        })?;
        let file = folder.path().join(format!("{}.yaml", machinery_of(&plugin)));
        let config = ConfigFile { path: file, text: config.to_owned() };
        let setup = setup_in(folder.path(), config, None)?;
        Ok(Fixture { plugin, setup, spec, kept: Vec::new(), folder })
    }

    /// The same, with the text of a `machinery-host.yaml`.
    #[must_use]
    pub fn host_config(mut self, text: &str) -> Self {
        let path = self.folder.path().join("machinery-host.yaml");
        self.setup.host_config = Some(ConfigFile { path, text: text.to_owned() });
        self
    }

    /// Keeps something alive as long as the fixture: a folder of disks, a hypervisor of its own.
    #[must_use]
    pub fn keep(mut self, what: impl Any) -> Self {
        self.kept.push(Box::new(what));
        self
    }

    /// The plugin file.
    pub fn plugin(&self) -> &Path {
        &self.plugin
    }

    /// What the plugin is given.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Puts the plugin to every requirement.
    pub fn run(&self) -> Report {
        crate::run(&self.plugin, &self.setup, &self.spec)
    }

    /// Puts the plugin to the requirements of these names only; a name that is none fails.
    pub fn run_some(&self, names: &[&str]) -> Report {
        crate::run_some(&self.plugin, &self.setup, &self.spec, names)
    }
}

/// What a host would give a plugin, with all that it may write in this folder.
///
/// # Errors
/// Its folders cannot be made.
pub fn setup_in(folder: &Path, config: ConfigFile, host_config: Option<ConfigFile>) -> Result<Setup> {
    let make = |name: &str| {
        let path = folder.join(name);
        let made = fs::create_dir_all(&path);
        made.map(|()| path.clone()).map_err(|error| Error::io("make the folder", &path, &error))
    };
    Ok(Setup {
        config,
        host_config,
        sockets_dir: make("sockets")?,
        state_dir: make("state")?,
        cache_dir: make("cache")?,
    })
}

/// The machinery that a file of this name holds.
fn machinery_of(plugin: &Path) -> String {
    let stem = plugin.file_stem().unwrap_or_default().to_string_lossy();
    stem.strip_prefix("libmachinery_").unwrap_or(&stem).to_owned()
}
