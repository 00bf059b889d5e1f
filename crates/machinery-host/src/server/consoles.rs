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
use std::ffi::OsString;
use std::future::pending;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use machinery::Result;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::peers::Peers;
use super::socket_folder::SocketFolder;
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
    /// The sockets, by their names.
    open: BTreeMap<OsString, Socket>,
}

/// The socket of a machine.
struct Socket {
    machine: Arc<Machine>,
    /// Dropping it ends the connections of the viewers.
    _task: JoinSet<()>,
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
        let mut wanted: BTreeMap<OsString, &Arc<Machine>> = BTreeMap::new();
        for machine in roster.machines().iter().filter(|machine| machine.info().console) {
            match console_socket(machine, self.manager.consoles()) {
                Ok(path) => wanted.extend(path.file_name().map(|name| (name.to_owned(), machine))),
                Err(reason) => tracing::error!(machine = machine.name(), reason, "a console has no socket"),
            }
        }
        if wanted.is_empty() && self.open.is_empty() {
            return;
        }
        let folder = own_folder(self.manager.consoles(), &self.peers);
        self.open.retain(|name, socket| {
            // A new machine can have the name of one that is gone.
            let stays = wanted.get(name).is_some_and(|machine| Arc::ptr_eq(machine, &socket.machine));
            if let (false, Ok(folder)) = (stays, &folder) {
                folder.remove(name);
            }
            stays
        });
        wanted.retain(|name, _| !self.open.contains_key(name));
        for (name, machine) in wanted {
            let bound =
                folder.as_ref().map_err(Clone::clone).and_then(|folder| folder.bind(&name, &self.peers));
            match bound {
                Ok(listener) => drop(self.open.insert(name, self.socket(listener, machine))),
                Err(error) => tracing::error!(machine = machine.name(), %error, "a console has no socket"),
            }
        }
    }

    fn socket(&self, listener: UnixListener, machine: &Arc<Machine>) -> Socket {
        let (manager, peers) = (Arc::clone(&self.manager), Arc::clone(&self.peers));
        let mut task = JoinSet::new();
        task.spawn(accept(listener, Arc::clone(machine), manager, peers));
        Socket { machine: Arc::clone(machine), _task: task }
    }
}

/// Opens the folder of the sockets.
fn own_folder(path: &Path, peers: &Peers) -> Result<SocketFolder> {
    let (sockets, name) = SocketFolder::of(path)?;
    sockets.own_folder(name, peers)
}

/// Removes the folder of the sockets. A missing one is no error.
fn remove_folder(path: &Path) {
    if let Ok((sockets, name)) = SocketFolder::of(path) {
        sockets.remove_folder(name);
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

#[cfg(test)]
mod tests {
    use machinery::{MachineInfo, State};

    use super::*;
    use crate::events::Events;
    use crate::fleet::fake_plugin::{FakePlugin, info};
    use crate::manager::lab::manager;

    #[tokio::test]
    async fn socket_stays_with_its_machine_and_serves_a_new_one_of_the_same_name() {
        let (_folder, _fleet, manager) = manager();
        std::fs::create_dir_all(manager.consoles().parent().unwrap()).unwrap();
        let mut consoles = Consoles::open(&manager, &Arc::new(Peers::new(None).unwrap()));
        let plugin = FakePlugin::default();
        let roster = |machinery: &str| {
            let (machinery, info) = (plugin.machinery(machinery), MachineInfo { console: true, ..info("m") });
            let machine = Machine::new(info, Arc::clone(&machinery), State::Poweroff, Events::default());
            Roster::new(vec![machinery], vec![Arc::new(machine)])
        };
        let (first, second) = (roster("first"), roster("second"));
        let file = || rustix::fs::stat(manager.consoles().join("m.sock")).unwrap().st_ino;
        consoles.update(&first);
        let of_first = file();
        consoles.update(&first);
        assert_eq!(file(), of_first, "its viewers stay connected");
        consoles.update(&second);
        let [socket] = consoles.open.values().collect::<Vec<_>>().try_into().ok().unwrap();
        assert!(Arc::ptr_eq(&socket.machine, second.find("m").unwrap()));
    }
}
