//! Everything that the machines share: the connection to libvirt, the memory for standbys, the folders for save
//! images, and the host.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use machinery::{Deadline, Host, Result};
use machinery_backend::{Budget, OverlayTemplates};

use crate::config::Config;
use crate::connection::Connection;
use crate::leftovers::RunMarker;
use crate::prepare::ImageFolders;

/// Everything that the machines share.
pub struct Kvm {
    pub connection: Arc<Connection>,
    /// The memory for the standbys of all machines.
    pub budget: Arc<Budget>,
    pub images: ImageFolders,
    /// The empty overlays of the domains' disks.
    pub overlays: OverlayTemplates,
    pub host: Host,
    state_dir: PathBuf,
}

impl Kvm {
    /// Connects to libvirt, and locks the folder for save images.
    ///
    /// # Errors
    /// libvirt cannot be reached; another host uses the folder.
    pub fn new(config: &Config, state_dir: &Path, host: Host, deadline: Deadline) -> Result<Self> {
        let images = ImageFolders::default();
        config.image_folder().map_or(Ok(()), |folder| images.open(folder))?;
        let connection = Connection::open(&config.dsn, deadline)?;
        let budget = Budget::new(config.standby_memory_limit, config.standby_memory_reserve);
        let overlays = OverlayTemplates::of_unread_images();
        Ok(Kvm { connection, budget, images, overlays, host, state_dir: state_dir.to_owned() })
    }

    /// Ends the runs of machines that are not configured any more, which no machine adopts.
    ///
    /// # Errors
    /// libvirt does not answer; a run does not end.
    pub fn end_orphans(&self, is_known: impl Fn(&str) -> bool, deadline: Deadline) -> Result<()> {
        let markers = RunMarker::others(&self.state_dir, is_known);
        if markers.is_empty() {
            return Ok(());
        }
        self.connection.ask(deadline, "libvirt to find leftover domains", move |connect| {
            markers.iter().try_for_each(|marker| marker.end_run_elsewhere(connect, None))
        })
    }
}
