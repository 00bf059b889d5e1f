//! The sockets of the consoles: one for each machine that has a console, as long as the host serves.
//!
//! ```text
//! start ─▶ the folder of an earlier host is removed ─▶ a socket for each machine with a console
//!                                                       │ a reload: sockets are added and removed
//!                                                       └▶ the host ends: all are removed
//! ```
//!
//! Each connection of a viewer is one connection to the machine's console. The machine has to be on, so a viewer that
//! connects earlier is disconnected. The same users may connect as to the manager's socket.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::future::pending;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use machinery::{Error, Result};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::listener;
use super::peers::Peers;
use crate::cwd::make_folder;
use crate::events::Event;
use crate::fleet::{Machine, Roster};
use crate::manager::Manager;
use crate::manager::console::console_socket;

/// The pause after a connection could not be accepted.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Waits for a reload.
async fn reloaded(events: &mut Receiver<Event>) {
    loop {
        match events.recv().await {
            Ok(Event::Reloaded(_)) | Err(RecvError::Lagged(_)) => return,
            Ok(_) => {}
            Err(RecvError::Closed) => pending().await,
        }
    }
}

/// The sockets that are open.
pub struct Consoles {
    manager: Arc<Manager>,
    peers: Arc<Peers>,
    events: Receiver<Event>,
    /// The task of each socket, by the socket's path. Dropping it ends the connections of its viewers.
    open: BTreeMap<PathBuf, JoinSet<()>>,
}

impl Consoles {
    /// Opens the sockets of all machines with a console, and removes those of an earlier host.
    pub fn open(manager: &Arc<Manager>, peers: &Arc<Peers>) -> Self {
        remove_folder(manager.consoles());
        let (manager, peers, events) = (Arc::clone(manager), Arc::clone(peers), manager.subscribe());
        let mut consoles = Consoles { manager, peers, events, open: BTreeMap::new() };
        consoles.update(&consoles.manager.roster());
        consoles
    }

    /// Serves the consoles until the host ends.
    pub async fn serve(mut self) {
        let mut ended = self.manager.ended().subscribe();
        loop {
            tokio::select! {
                () = reloaded(&mut self.events) => self.update(&self.manager.roster()),
                // The sender lives as long as the manager.
                _ = ended.wait_for(|ended| *ended) => break,
            }
        }
        self.open.clear();
        remove_folder(self.manager.consoles());
    }

    /// Opens the sockets of these machines, and removes all others.
    fn update(&mut self, roster: &Roster) {
        let folder = self.manager.consoles();
        let mut wanted: BTreeMap<PathBuf, &Arc<Machine>> = BTreeMap::new();
        for machine in roster.machines().iter().filter(|machine| machine.info().console) {
            match console_socket(machine, folder) {
                Ok(path) => drop(wanted.insert(path, machine)),
                Err(reason) => tracing::error!(machine = machine.name(), reason, "a console has no socket"),
            }
        }
        self.open.retain(|path, _| {
            let stays = wanted.contains_key(path);
            if !stays {
                listener::remove(path);
            }
            stays
        });
        wanted.retain(|path, _| !self.open.contains_key(path));
        for (path, machine) in wanted {
            let listener =
                make_folder_for(folder, &self.peers).and_then(|()| listener::bind(&path, &self.peers));
            match listener {
                Ok(listener) => {
                    let (manager, peers) = (Arc::clone(&self.manager), Arc::clone(&self.peers));
                    let mut task = JoinSet::new();
                    task.spawn(accept(listener, Arc::clone(machine), manager, peers));
                    self.open.insert(path, task);
                }
                Err(error) => tracing::error!(machine = machine.name(), %error, "a console has no socket"),
            }
        }
    }
}

/// Makes the folder of the sockets, which those peers alone can pass.
fn make_folder_for(folder: &Path, peers: &Peers) -> Result<()> {
    make_folder(folder)?;
    if peers.gid().is_some() {
        let opened = chown(folder, None, peers.gid())
            .and_then(|()| fs::set_permissions(folder, Permissions::from_mode(0o710)));
        opened.map_err(|error| Error::io("open to the group the folder", folder, &error))?;
    }
    Ok(())
}

/// Removes the folder of the sockets. A missing one is no error.
fn remove_folder(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %folder.display(), %error, "cannot remove the folder of the consoles");
    }
}

/// Accepts viewers of the machine. Dropping this ends their connections.
async fn accept(listener: UnixListener, machine: Arc<Machine>, manager: Arc<Manager>, peers: Arc<Peers>) {
    let mut viewers = JoinSet::new();
    loop {
        while viewers.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => {
                let (machine, manager) = (Arc::clone(&machine), Arc::clone(&manager));
                viewers.spawn(view(stream, machine, manager, Arc::clone(&peers)));
            }
            Err(error) => {
                tracing::error!(machine = machine.name(), %error, "cannot accept a viewer");
                sleep(ACCEPT_RETRY_INTERVAL).await;
            }
        }
    }
}

/// Connects the viewer to the machine's console, if its user may use it.
async fn view(viewer: UnixStream, machine: Arc<Machine>, manager: Arc<Manager>, peers: Arc<Peers>) {
    let opened = match peers.admit(&viewer) {
        Ok(peer) => manager.console(&machine).await.map(|console| (peer.uid, console)),
        Err(reason) => Err(reason),
    };
    let machine = machine.name();
    match opened {
        Ok((uid, console)) => {
            tracing::info!(machine, uid, "console opened");
            let relayed = console.relay(viewer).await;
            tracing::info!(machine, uid, error = ?relayed.err(), "console closed");
        }
        Err(reason) => tracing::warn!(machine, reason, "a viewer was refused"),
    }
}
