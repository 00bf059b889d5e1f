//! Everything that the machines share: the connection to libvirt, the memory for standbys, the folders for save
//! images, and the host.

use std::sync::Arc;

use machinery::{Deadline, Host, Result};
use machinery_backend::Budget;

use crate::config::Config;
use crate::connection::Connection;
use crate::prepare::ImageFolders;

/// Everything that the machines share.
pub struct Kvm {
    pub connection: Arc<Connection>,
    /// The memory for the standbys of all machines.
    pub budget: Arc<Budget>,
    pub images: ImageFolders,
    pub host: Host,
}

impl Kvm {
    /// Connects to libvirt, and locks the folder for save images.
    ///
    /// # Errors
    /// libvirt cannot be reached; another host uses the folder.
    pub fn new(config: &Config, host: Host, deadline: Deadline) -> Result<Self> {
        let images = ImageFolders::default();
        config.image_folder().map_or(Ok(()), |folder| images.open(folder))?;
        let connection = Connection::open(&config.dsn, deadline)?;
        let budget = Budget::new(config.standby_memory_limit);
        Ok(Kvm { connection, budget, images, host })
    }
}
