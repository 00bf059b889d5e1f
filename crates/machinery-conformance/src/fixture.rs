//! A plugin, its setup, and the description of its backend: everything that a test needs.

use std::any::Any;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use machinery::config::ConfigFile;
use machinery::{Error, Result, Setup};
use tempfile::TempDir;

use crate::report::Report;
use crate::spec::{BackendSpec, Program};
use crate::suite;

/// A plugin file with a configuration, a scratch folder for its sockets, state and caches, and the description of
/// its backend. Dropping it removes the folder.
pub struct Fixture {
    plugin: PathBuf,
    setup: Setup,
    spec: BackendSpec,
    kept: Vec<Box<dyn Any>>,
    folder: TempDir,
}

impl Fixture {
    /// Creates a fixture for the plugin file, with the text of its YAML configuration.
    ///
    /// # Errors
    /// The scratch folder cannot be created.
    pub fn new(plugin: impl Into<PathBuf>, config: &str, spec: BackendSpec) -> Result<Self> {
        let plugin = plugin.into();
        let folder = tempfile::Builder::new().prefix("machinery-fixture.").tempdir();
        let folder = folder.map_err(|error| {
            Error::environment(format!("cannot create a scratch folder for {}: {error}", plugin.display()))
                .advice("Set TMPDIR to a writable folder")
        })?;
        let file = folder.path().join(format!("{}.yaml", machinery_of(&plugin)));
        let config = ConfigFile { path: file, text: config.to_owned() };
        let setup = setup_in(folder.path(), config, None)?;
        Ok(Fixture { plugin, setup, spec, kept: Vec::new(), folder })
    }

    /// Adds the text of a `machinery-host.yaml`.
    #[must_use]
    pub fn host_config(mut self, text: &str) -> Self {
        let path = self.folder.path().join("machinery-host.yaml");
        self.setup.host_config = Some(ConfigFile { path, text: text.to_owned() });
        self
    }

    /// Keeps a value alive as long as the fixture, such as a folder of disks or a hypervisor.
    #[must_use]
    pub fn keep(mut self, value: impl Any) -> Self {
        self.kept.push(Box::new(value));
        self
    }

    /// Sets the program that becomes a host process, unless the spec has one.
    pub(super) fn set_host_program(&mut self, program: Program) {
        self.spec.host_program.get_or_insert(program);
    }

    /// Keeps the scratch folder, and the folders that the author has given to [`keep`](Self::keep); returns the scratch
    /// folder.
    pub(super) fn keep_folders(self) -> PathBuf {
        for value in self.kept {
            match value.downcast::<TempDir>() {
                Ok(folder) => drop(folder.keep()),
                // The last owner would remove the folder.
                Err(value) => drop(value.downcast::<Arc<TempDir>>().map(std::mem::forget)),
            }
        }
        self.folder.keep()
    }

    /// Returns the path of the plugin file.
    pub fn plugin(&self) -> &Path {
        &self.plugin
    }

    /// Returns the setup that the plugin gets.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Checks the plugin against every requirement.
    pub fn run(&self) -> Report {
        suite::run(&self.plugin, &self.setup, &self.spec)
    }

    /// Checks the plugin against the named requirements only. An unknown name fails.
    pub fn run_some(&self, names: &[&str]) -> Report {
        suite::run_some(&self.plugin, &self.setup, &self.spec, names)
    }
}

/// Creates the setup that a host would pass to the plugin, with all of the plugin's folders in `folder`.
///
/// # Errors
/// The folders cannot be created.
pub fn setup_in(folder: &Path, config: ConfigFile, host_config: Option<ConfigFile>) -> Result<Setup> {
    let create = |name: &str| {
        let path = folder.join(name);
        let created = fs::create_dir_all(&path);
        created.map(|()| path.clone()).map_err(|error| Error::io("create the folder", &path, &error))
    };
    Ok(Setup {
        config,
        host_config,
        sockets_dir: create("sockets")?,
        state_dir: create("state")?,
        cache_dir: create("cache")?,
        adopts: false,
        result_server: None,
    })
}

/// Returns the name of the machinery in a file of this name.
fn machinery_of(plugin: &Path) -> String {
    let stem = plugin.file_stem().unwrap_or_default().to_string_lossy();
    stem.strip_prefix("libmachinery_").unwrap_or(&stem).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_remain_when_they_are_kept() {
        let [own, shared] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let paths = [own.path().to_owned(), shared.path().to_owned()];
        let fixture = Fixture::new("libmachinery_x.so", "", BackendSpec::new(&[])).unwrap();
        let scratch = fixture.keep(own).keep(Arc::new(shared)).keep(1).keep_folders();
        for folder in paths.iter().chain([&scratch]) {
            assert!(folder.is_dir(), "{} is gone", folder.display());
            fs::remove_dir_all(folder).unwrap();
        }
    }
}
