//! The socket: who may connect, how much one client may cost.
//!
//! One JSON object a line, both ways. Only its own user, root and one group may use it ([`Peers`]).
//! A client that floods, never reads, or talks garbage costs
//! itself: connections are counted per process, each has a bounded number of requests under way and
//! a bounded backlog of answers, and a write that does not get on ends the connection.

mod connection;
#[cfg(test)]
mod fuzz;
mod lines;
mod peers;
pub mod protocol;

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use machinery::{Error, Result, SocketPath};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::actions::metrics::Metrics;
use crate::actions::worker::Workers;
use crate::events::Events;
use crate::fleet::books::Books;
use crate::fleet::{Fleet, Machine};
use crate::reload::Reloader;

pub use peers::Peers;

/// Connections one process may hold.
const PER_PROCESS: usize = 512;
/// Connections all processes together may hold.
const ALL: usize = 2048;

/// How long a client that may not be served can take to read why.
const TURNING_AWAY: Duration = Duration::from_secs(1);

/// What a connection too many is told.
const TOO_MANY: &[u8] =
    b"{\"success\":false,\"reason\":\"too many connections: close some, or share one\"}\n";

/// What every connection works on.
pub struct Shared {
    /// The machines.
    pub fleet: Arc<Fleet>,
    /// Who acts on them.
    pub workers: Workers,
    /// Takes over a new configuration.
    pub reloader: Reloader,
    /// How often each action was done, and how long it took.
    pub metrics: Arc<Metrics>,
    /// Where is noted who has which machine.
    pub books: Arc<Books>,
    /// What they hear who subscribe.
    pub events: Events,
    /// While false, everything but `stop` is refused.
    pub enabled: AtomicBool,
    /// True once nothing more will happen: connections write what they have, and close.
    pub ending: watch::Sender<bool>,
}

impl Shared {
    /// The machine of that name.
    pub fn find(&self, name: &str) -> Option<Arc<Machine>> {
        self.fleet.roll().find(name).cloned()
    }
}

/// Sees that nobody else manages the machines of this CWD.
///
/// # Errors
/// Another manager answers on the socket.
pub fn expect_no_other(path: &Path) -> Result<()> {
    let socket = SocketPath::new(path).map_err(|error| Error::io("find the socket", path, &error))?;
    if std::os::unix::net::UnixStream::connect(socket.address()).is_ok() {
        let reason = format!("another machinery manager answers on {}", path.display());
        return Err(Error::environment(reason)
            .advice("Stop it first: it may be Cuckoo's own, or another `cuckoo-machinery serve`"));
    }
    Ok(())
}

/// Makes the manager's socket, for those peers alone. It listens before its name appears.
///
/// # Errors
/// It cannot be made.
pub fn bind(path: &Path, peers: &Peers) -> Result<UnixListener> {
    let failed = |error: io::Error| Error::io("make the socket", path, &error);
    if path.as_os_str().len() > 107 {
        tracing::warn!(
            socket = %path.display(),
            "this path is longer than a socket address can hold: this program finds a way around it, Cuckoo's own client does not"
        );
    }
    // A new folder is this user's alone, so nobody can connect before the mode is set.
    let folder = path.parent().unwrap_or(Path::new("/"));
    let hiding = tempfile::Builder::new().prefix(".new-").tempdir_in(folder).map_err(failed)?;
    let hidden = SocketPath::new(&hiding.path().join("sock")).map_err(failed)?;
    let listener = UnixListener::bind(hidden.address()).map_err(failed)?;
    let mode = if peers.gid().is_some() { 0o660 } else { 0o600 };
    chown(hidden.path(), None, peers.gid()).map_err(|error| {
        failed(error).advice("The host's user has to be a member of the group `socket_group`, or root")
    })?;
    std::fs::set_permissions(hidden.path(), std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    warn_of_closed_folders(path, peers);
    std::fs::rename(hidden.path(), path).map_err(failed)?;
    Ok(listener)
}

/// A group that may use the socket has to come as far as there.
fn warn_of_closed_folders(path: &Path, peers: &Peers) {
    let Some(gid) = peers.gid() else { return };
    for folder in path.ancestors().skip(1) {
        let Ok(meta) = folder.metadata() else { continue };
        let open = if meta.gid() == gid { 0o010 } else { 0o001 };
        if meta.mode() & open == 0 {
            tracing::warn!(folder = %folder.display(), gid, "the group `socket_group` cannot pass this folder on its way to the socket: chgrp it and chmod g+x");
        }
    }
}

/// Removes a socket; that there is none is as good.
pub fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove the socket");
    }
}

/// Takes connections for as long as it is polled, and serves each as a task of `connections`.
pub async fn serve(
    listener: &UnixListener,
    peers: &Arc<Peers>,
    shared: &Arc<Shared>,
    connections: &mut JoinSet<()>,
) {
    let counter = Arc::new(Counter::default());
    loop {
        // Those that have ended are forgotten.
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => match counter.admit(&stream) {
                Some(place) => {
                    connections.spawn(greet(stream, Arc::clone(peers), Arc::clone(shared), place));
                }
                None => {
                    tracing::warn!("a connection was refused: its process holds too many");
                    // If it cannot be written at once, the closing says as much.
                    let _ = stream.try_write(TOO_MANY);
                }
            },
            Err(error) => {
                // Out of file descriptors, most likely: wait for some to come back.
                tracing::error!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Serves the client, if it is one that may be served.
async fn greet(stream: UnixStream, peers: Arc<Peers>, shared: Arc<Shared>, place: Place) {
    match peers.admit(&stream) {
        Ok(()) => connection::serve(stream, shared, place).await,
        Err(reason) => {
            tracing::warn!(reason, "a client was refused");
            turn_away(stream, &reason).await;
        }
    }
}

/// Tells the client why it is closed. It is heard out for a moment, because who is still sending
/// when it is closed never reads why.
async fn turn_away(mut stream: UnixStream, reason: &str) {
    let words = protocol::line(protocol::failure(reason), None);
    let last_words = async {
        stream.write_all(&words).await?;
        stream.shutdown().await?;
        stream.read(&mut [0; 4096]).await
    };
    // Nothing is owed to it.
    let _ = tokio::time::timeout(TURNING_AWAY, last_words).await;
}

/// Counts connections by the process at the other end.
#[derive(Default)]
struct Counter {
    by_process: Mutex<HashMap<i32, usize>>,
}

impl Counter {
    fn admit(self: &Arc<Self>, stream: &UnixStream) -> Option<Place> {
        let process = stream.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or(0);
        let mut by_process = self.lock();
        if by_process.values().sum::<usize>() >= ALL {
            return None;
        }
        let count = by_process.entry(process).or_default();
        if *count >= PER_PROCESS {
            return None;
        }
        *count += 1;
        Some(Place { counter: Arc::clone(self), process })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<i32, usize>> {
        self.by_process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's place; given back when dropped.
struct Place {
    counter: Arc<Counter>,
    process: i32,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_process = self.counter.lock();
        if let Some(count) = by_process.get_mut(&self.process) {
            *count -= 1;
            if *count == 0 {
                by_process.remove(&self.process);
            }
        }
    }
}
