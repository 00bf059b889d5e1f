//! Everything that the machines share: the connections to libvirt, the memory for standbys, the folders for save
//! images, and the host.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use machinery::{Deadline, Host, Result};
use machinery_backend::{Budget, OverlayTemplates};

use crate::config::Config;
use crate::connection::Connection;
use crate::connections::{self, Connections};
use crate::leftovers::RunMarker;
use crate::prepare::ImageFolders;

/// The time that a libvirt which no machine has any more gets to end a run.
const ORPHAN_TIMEOUT: Duration = Duration::from_secs(10);

/// Everything that the machines share.
pub struct Kvm {
    /// One for each libvirt. Each machine has that of its own.
    pub connections: Connections,
    /// The memory for the standbys of all machines.
    pub budget: Arc<Budget>,
    pub images: ImageFolders,
    /// The empty overlays of the domains' disks.
    pub overlays: OverlayTemplates,
    pub host: Host,
}

impl Kvm {
    /// Connects to libvirt, locks the folder for save images, and ends the runs that no machine adopts.
    ///
    /// # Errors
    /// No libvirt can be reached; another host uses the folder.
    pub fn new(config: &Config, state_dir: &Path, host: Host, deadline: Deadline) -> Result<Self> {
        let images = ImageFolders::default();
        config.image_folder().map_or(Ok(()), |folder| images.open(folder))?;
        let connections = Connections::default();
        connections.open(&config.dsns(), deadline)?;
        let budget = Budget::new(config.standby_memory_limit, config.standby_memory_reserve);
        end_orphans(config, state_dir);
        let overlays = OverlayTemplates::of_unread_images();
        Ok(Kvm { connections, budget, images, overlays, host })
    }
}

/// Ends the runs of machines that are not configured any more, or have another libvirt by now. Only logs a failure.
fn end_orphans(config: &Config, state_dir: &Path) {
    let dsn_of = |name: &str| {
        let machine = config.machines.iter().find(|keys| keys.info.name == name);
        machine.map(|keys| keys.dsn.clone())
    };
    let mut by_dsn = BTreeMap::<String, Vec<RunMarker>>::new();
    for marker in RunMarker::orphans(state_dir, dsn_of) {
        by_dsn.entry(marker.recorded_dsn().unwrap_or_else(|| config.dsn.clone())).or_default().push(marker);
    }
    connections::for_each(&by_dsn.into_iter().collect::<Vec<_>>(), |(dsn, markers)| {
        if let Err(error) = end_runs(dsn, markers.clone()) {
            tracing::warn!(dsn, %error, "runs of machines that are not configured remain");
        }
    });
}

/// Ends the runs of these markers, on a connection of its own: no machine may have that libvirt any more.
fn end_runs(dsn: &str, markers: Vec<RunMarker>) -> Result<()> {
    let deadline = Deadline::after(ORPHAN_TIMEOUT);
    let connection = Connection::new(dsn);
    let ended = connection.open(deadline).and_then(|()| {
        connection.ask(deadline, "libvirt to find leftover domains", move |connect| {
            markers.iter().try_for_each(|marker| marker.end_run_elsewhere(connect, None))
        })
    });
    connection.close(deadline);
    ended
}
