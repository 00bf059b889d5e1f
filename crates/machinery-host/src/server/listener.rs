//! The manager's socket: binds it, accepts connections, and rejects those that may not use it.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use listenfd::ListenFd;
use machinery::{Error, Result, SocketPath};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

use super::limits::{ConnectionCounter, ConnectionPermit};
use super::peers::Peers;
use super::socket_folder::SocketFolder;
use super::{connection, reply};
use crate::client_file::DescriptorBudget;
use crate::manager::Manager;
use crate::manager::console::MAX_ADDRESS;

/// The time that a rejected client has to read the reason.
const REJECT_TIMEOUT: Duration = Duration::from_secs(1);
/// The pause after a connection could not be accepted.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The reply to a connection too many.
const TOO_MANY: &[u8] =
    b"{\"success\":false,\"reason\":\"too many connections: close some, or share one\"}\n";

/// Expects that no other manager serves this CWD.
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

/// The number of the first descriptor that a service manager, or an earlier host, passes. Source: sd_listen_fds(3).
pub const FIRST_INHERITED: i32 = 3;

/// Returns the manager's socket, if this process was started with it.
///
/// # Errors
/// The process was started with something else.
pub fn inherited(path: &Path) -> Result<Option<std::os::unix::net::UnixListener>> {
    let taken = ListenFd::from_env().take_unix_listener(0);
    taken.map_err(|error| Error::io("inherit the socket", path, &error))
}

/// Returns the inherited socket for this host's threads, or a new one, open to those peers alone. An inherited socket whose
/// name was removed meanwhile is replaced, because no client would find it.
///
/// # Errors
/// The socket can be neither used nor made.
pub fn open(
    inherited: Option<std::os::unix::net::UnixListener>,
    path: &Path,
    peers: &Peers,
) -> Result<UnixListener> {
    let Some(inherited) = inherited else { return bind_manager(path, peers) };
    if !fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        tracing::warn!(socket = %path.display(), "the inherited socket has no name any more: a new one is made");
        return bind_manager(path, peers);
    }
    let failed = |error: io::Error| Error::io("use the inherited socket", path, &error);
    let (folder, name) = SocketFolder::of(path)?;
    folder.open_socket_to(name, peers).map_err(failed)?;
    inherited.set_nonblocking(true).map_err(failed)?;
    UnixListener::from_std(inherited).map_err(failed)
}

/// Returns the socket for the program that this process executes next.
///
/// # Errors
/// The socket cannot be used.
pub fn kept(listener: UnixListener, path: &Path) -> Result<std::os::unix::net::UnixListener> {
    listener.into_std().map_err(|error| Error::io("keep the socket", path, &error))
}

/// Expects that the path is free, or that a socket is there.
///
/// # Errors
/// Another file is there.
pub fn expect_replaceable(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            Err(Error::environment(format!("{} is no socket", path.display())).advice("Choose another path"))
        }
        _ => Ok(()),
    }
}

/// Binds the manager's socket, for those peers alone, and warns if some of them cannot reach it.
///
/// # Errors
/// The socket cannot be made.
fn bind_manager(path: &Path, peers: &Peers) -> Result<UnixListener> {
    if path.as_os_str().len() > MAX_ADDRESS {
        tracing::warn!(
            socket = %path.display(),
            "this path is longer than a socket address can hold: this program finds a way around it, Cuckoo's own client does not"
        );
    }
    let listener = bind(path, peers)?;
    warn_of_closed_folders(path, peers);
    Ok(listener)
}

/// Binds a socket for those peers alone, as `SocketFolder::bind` does.
///
/// # Errors
/// The socket cannot be made.
pub fn bind(path: &Path, peers: &Peers) -> Result<UnixListener> {
    let (folder, name) = SocketFolder::of(path)?;
    folder.bind(name, peers)
}

/// Warns of folders that the group which may use the socket cannot pass.
pub fn warn_of_closed_folders(path: &Path, peers: &Peers) {
    let Some(gid) = peers.gid() else { return };
    for folder in path.ancestors().skip(1) {
        let Ok(meta) = folder.metadata() else { continue };
        let open = if meta.gid() == gid { 0o010 } else { 0o001 };
        if meta.mode() & open == 0 {
            tracing::warn!(folder = %folder.display(), gid, "the group of the socket cannot pass this folder on its way to it: chgrp it and chmod g+x");
        }
    }
}

/// Removes a socket. A missing one is no error.
pub fn remove(path: &Path) {
    match SocketFolder::of(path) {
        Ok((folder, name)) => folder.remove(name),
        Err(error) => tracing::warn!(path = %path.display(), %error, "cannot remove the socket"),
    }
}

/// Accepts connections as long as it is polled, and serves each as a task of `connections`.
pub async fn serve(
    listener: &UnixListener,
    peers: &Arc<Peers>,
    manager: &Arc<Manager>,
    connections: &mut JoinSet<()>,
) {
    let counter = Arc::new(ConnectionCounter::default());
    let descriptors = Arc::new(DescriptorBudget::default());
    loop {
        // Drops the entries of connections that have ended.
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, _)) => match counter.permit(&stream) {
                Some(permit) => {
                    let (peers, manager, descriptors) =
                        (Arc::clone(peers), Arc::clone(manager), Arc::clone(&descriptors));
                    connections.spawn(admit(stream, peers, manager, permit, descriptors));
                }
                None => {
                    tracing::warn!("a connection was refused: its process or user holds too many");
                    // A client that cannot be written to at once sees its connection closed.
                    let _ = stream.try_write(TOO_MANY);
                }
            },
            Err(error) => {
                // Out of file descriptors, most likely.
                tracing::error!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_RETRY_INTERVAL).await;
            }
        }
    }
}

/// Serves the client, if its user may use the socket.
async fn admit(
    stream: UnixStream,
    peers: Arc<Peers>,
    manager: Arc<Manager>,
    permit: ConnectionPermit,
    descriptors: Arc<DescriptorBudget>,
) {
    match peers.admit(&stream) {
        Ok(peer) => connection::serve(stream, manager, permit, peer, descriptors).await,
        Err(reason) => {
            tracing::warn!(reason, "a client was refused");
            reject(stream, &reason).await;
        }
    }
}

/// Sends the reason and closes. A client that is still sending when its connection closes never reads the
/// reason, so its data is read for a moment.
async fn reject(mut stream: UnixStream, reason: &str) {
    let line = reply::line(reply::failure(reason), None);
    let last_words = async {
        stream.write_all(&line).await?;
        stream.shutdown().await?;
        stream.read(&mut [0; 4096]).await
    };
    // A client that does not read the reason has lost nothing.
    let _ = tokio::time::timeout(REJECT_TIMEOUT, last_words).await;
}
