//! The users that may use the socket: the host's own user, root, and the members of the group that
//! `socket_group` in `machinery-host.yaml` names.
//!
//! The mode of the socket grants the same. The host checks the peer's credentials too, because somebody may
//! have changed the mode.

use std::os::fd::AsRawFd;

use machinery::{Error, Result};
use nix::unistd::{Group, Uid};
use tokio::net::UnixStream;

use crate::client_file::Owner;

/// The user at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// The number of the user.
    pub uid: u32,
    /// The user as the owner of files, unless it is root or the host's own user.
    pub owner: Option<Owner>,
}

/// The users that may use the socket.
#[derive(Debug, Clone)]
pub struct Peers {
    own: Uid,
    group: Option<Group>,
}

impl Peers {
    /// Returns the host's user, root, and the members of that group.
    ///
    /// # Errors
    /// No group has that name.
    pub fn new(group: Option<&str>) -> Result<Self> {
        Peers::of("socket_group", group)
    }

    /// Returns the host's user, root, and the members of the group that this key names.
    ///
    /// # Errors
    /// No group has that name.
    pub fn of(key: &str, group: Option<&str>) -> Result<Self> {
        let group = group.map(|name| find(key, name)).transpose()?;
        Ok(Peers { own: Uid::effective(), group })
    }

    /// Returns the number of the group, if one is configured.
    pub fn gid(&self) -> Option<u32> {
        self.group.as_ref().map(|group| group.gid.as_raw())
    }

    /// Expects that the client's user may use the socket, and returns that user.
    ///
    /// # Errors
    /// The user may not; the reason is for the client.
    pub fn admit(&self, stream: &UnixStream) -> Result<Peer, String> {
        let peer = stream.peer_cred().map_err(|error| format!("cannot find out your user: {error}"))?;
        let uid = Uid::from_raw(peer.uid());
        let is_member = |gid| peer.gid() == gid || supplementary(stream).is_ok_and(|all| all.contains(&gid));
        let is_trusted = uid == self.own || uid.is_root();
        if is_trusted || self.gid().is_some_and(is_member) {
            let owner = Owner { uid: peer.uid(), gid: peer.gid() };
            return Ok(Peer { uid: peer.uid(), owner: (!is_trusted).then_some(owner) });
        }
        let members = match &self.group {
            Some(group) => format!(" and the members of the group {}", group.name),
            None => "; a group can be let in with `socket_group` in machinery-host.yaml".to_owned(),
        };
        Err(format!("user {uid} may not use the machinery host: it is for user {}, root{members}", self.own))
    }
}

fn find(key: &str, name: &str) -> Result<Group> {
    let found = Group::from_name(name)
        .map_err(|error| Error::environment(format!("cannot look up the group '{name}': {error}")))?;
    found.ok_or_else(|| {
        Error::configuration(format!(
            "there is no group '{name}', which machinery-host.yaml names as `{key}`"
        ))
        .advice("Create it with `groupadd`, or correct the name")
    })
}

/// The groups that the client runs with, beside its first one.
fn supplementary(stream: &UnixStream) -> std::io::Result<Vec<libc::gid_t>> {
    let mut groups = vec![0; 64];
    loop {
        let mut length =
            libc::socklen_t::try_from(size_of_val(groups.as_slice())).map_err(std::io::Error::other)?;
        // SAFETY: the kernel writes at most `length` bytes, which `groups` has, and any bytes are
        // numbers; `length` is a local of the type it expects.
        let got = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let count = length as usize / size_of::<libc::gid_t>();
        if got == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = std::io::Error::last_os_error();
        // Then `length` says how many bytes there are.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_refuse_group_that_does_not_exist() {
        let error = Peers::new(Some("no-such-group-here")).unwrap_err().to_string();
        assert!(error.contains("socket_group") && error.contains("groupadd"), "{error}");
    }

    #[tokio::test]
    async fn peers_admit_the_hosts_own_user() {
        let (one, _other) = UnixStream::pair().unwrap();
        let uid = rustix::process::geteuid().as_raw();
        assert_eq!(Peers::new(None).unwrap().admit(&one), Ok(Peer { uid, owner: None }));
    }

    #[tokio::test]
    async fn supplementary_groups_of_a_client_are_read() {
        let (one, _other) = UnixStream::pair().unwrap();
        let mut own: Vec<_> = rustix::process::getgroups().unwrap().iter().map(|gid| gid.as_raw()).collect();
        let mut told = supplementary(&one).unwrap();
        own.sort_unstable();
        told.sort_unstable();
        assert_eq!(told, own);
    }
}
