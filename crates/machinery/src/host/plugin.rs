//! An opened plugin file, which can be checked and loaded.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::header;
use super::instance::Instance;
use super::library;
use super::open_error::OpenError;
use super::reply::{into_reported_result, into_result};
use crate::abi::{InterfaceVersion, Manifest, ModuleRef, abi_services, from_json, to_json};
use crate::{HostServices, Report, Result, Setup};

/// An opened plugin file.
#[derive(Clone)]
pub struct Plugin {
    path: PathBuf,
    interface: InterfaceVersion,
    manifest: Manifest,
    module: ModuleRef,
}

impl Plugin {
    /// Opens a plugin file. This runs the library's initialisers, so open only trusted files.
    ///
    /// # Errors
    /// Each step of [opening](crate::host) has its own error.
    pub fn open(path: &Path) -> Result<Plugin, OpenError> {
        let interface = header::interface_of(path)?;
        let ours = InterfaceVersion::OURS;
        if interface.major != ours.major || interface.minor > ours.minor {
            return Err(OpenError::InterfaceVersion {
                plugin: interface.to_string(),
                host: InterfaceVersion::OURS.to_string(),
            });
        }
        let module = library::load(path, interface)?;
        let manifest = into_result((module.manifest())())
            .and_then(|json| from_json(json.as_bytes(), "plugin's manifest"));
        let manifest = manifest.map_err(OpenError::Manifest)?;
        Ok(Plugin { path: path.to_owned(), interface, manifest, module })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the machinery's name.
    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    /// Returns the plugin's own version.
    pub fn version(&self) -> &str {
        &self.manifest.version
    }

    /// Returns the plugin's licence.
    pub fn license(&self) -> &str {
        &self.manifest.license
    }

    /// Returns the version of the interface that the plugin was built for, as `major.minor`.
    pub fn interface(&self) -> String {
        self.interface.to_string()
    }

    /// Returns the reason why the plugin cannot share a host with the machinery `other`, if it declares one.
    pub fn conflict_with(&self, other: &str) -> Option<&str> {
        let conflict = self.manifest.conflicts.iter().find(|conflict| conflict.with == other)?;
        Some(&conflict.why)
    }

    /// Checks the configuration and the environment, and returns the plugin's findings.
    ///
    /// # Errors
    /// The plugin panicked or misbehaved. Problems that it finds are in the report.
    pub fn check(&self, setup: &Setup, services: Arc<dyn HostServices>) -> Result<Report> {
        let setup = to_json(setup)?;
        let report = into_reported_result((self.module.check())(setup.as_rstr(), abi_services(services)))?;
        from_json(report.as_bytes(), "plugin's report")
    }

    /// Loads the machinery with its configuration.
    ///
    /// # Errors
    /// The plugin's.
    pub fn load(&self, setup: &Setup, services: Arc<dyn HostServices>) -> Result<Instance> {
        let setup = to_json(setup)?;
        let object = into_reported_result((self.module.load())(setup.as_rstr(), abi_services(services)))?;
        Ok(Instance::new(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_file_is_refused_as_no_library() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libmachinery_x.so");
        std::fs::write(&path, "hello").unwrap();
        let error = Plugin::open(&path).err().unwrap();
        assert!(matches!(error, OpenError::NotALibrary(_)), "{error}");
        assert!(matches!(Plugin::open(&folder.path().join("none")), Err(OpenError::NotALibrary(_))));
    }
}
