//! The input of a plugin from its host, at its load.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::config::ConfigFile;

/// The configuration and folders that the host passes to a plugin.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Setup {
    /// `conf/machineries/<name>.yaml`, read by the plugin itself.
    pub config: ConfigFile,
    /// `conf/machinery-host.yaml`, if it exists. The plugin's part is [`Setup::section`].
    pub host_config: Option<ConfigFile>,
    /// The folder for sockets. A path in it may be too long for a socket address; see
    /// [`SocketPath`](crate::SocketPath).
    pub sockets_dir: PathBuf,
    /// The plugin's own folder for files that must outlive the host.
    pub state_dir: PathBuf,
    /// The plugin's own folder for files that can be created again.
    pub cache_dir: PathBuf,
    /// True if the host calls [`adopt`](crate::Machinery::adopt) for each machine after the load.
    #[serde(default)]
    pub adopts: bool,
    /// The address and the port of Cuckoo's result server, to which guests send their results; none if `cuckoo.yaml` has
    /// none.
    #[serde(default)]
    pub result_server: Option<SocketAddr>,
}

impl Setup {
    /// Reads the section `machineries.<name>` of `machinery-host.yaml`; returns the default if it does not exist.
    ///
    /// # Errors
    /// The section is not a `T`. The error contains file, line and key.
    pub fn section<T>(&self, name: &str) -> Result<T>
    where
        T: for<'de> Deserialize<'de> + Default,
    {
        match &self.host_config {
            Some(file) => Ok(file.parse_at(&["machineries", name])?.unwrap_or_default()),
            None => Ok(T::default()),
        }
    }
}
