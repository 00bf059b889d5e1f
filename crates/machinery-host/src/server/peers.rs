//! Who may use the socket: the host's own user, root, and the members of one group, if
//! `socket_group` in `machinery-host.yaml` names one.
//!
//! The socket's mode says the same to the kernel; that the peer's credentials are looked at as well
//! keeps it so where somebody has opened the mode.

use std::ffi::CString;

use machinery::{Error, Result};
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use tokio::net::UnixStream;

/// Whom the socket is for.
#[derive(Debug, Clone)]
pub struct Peers {
    own: Uid,
    group: Option<Group>,
}

impl Peers {
    /// The host's user, root, and the members of that group.
    ///
    /// # Errors
    /// There is no group of that name.
    pub fn new(group: Option<&str>) -> Result<Self> {
        let group = group.map(find).transpose()?;
        Ok(Peers { own: Uid::effective(), group })
    }

    /// The group's number, if there is one.
    pub fn gid(&self) -> Option<u32> {
        self.group.as_ref().map(|group| group.gid.as_raw())
    }

    /// Sees that the client is one of them.
    ///
    /// # Errors
    /// It is not; the reason is for the client.
    pub async fn admit(&self, stream: &UnixStream) -> Result<(), String> {
        let peer = stream.peer_cred().map_err(|error| format!("cannot tell who you are: {error}"))?;
        let (uid, gid) = (Uid::from_raw(peer.uid()), Gid::from_raw(peer.gid()));
        if uid == self.own || uid.is_root() || self.is_member(uid, gid).await {
            return Ok(());
        }
        let members = match &self.group {
            Some(group) => format!(" and the members of the group {}", group.name),
            None => "; a group can be let in with `socket_group` in machinery-host.yaml".to_owned(),
        };
        Err(format!("user {uid} may not use the machinery host: it is for user {}, root{members}", self.own))
    }

    /// Asks the user database, which can take its time.
    async fn is_member(&self, uid: Uid, gid: Gid) -> bool {
        let Some(group) = self.group.clone() else { return false };
        tokio::task::spawn_blocking(move || has(&group, uid, gid)).await.unwrap_or(false)
    }
}

fn find(name: &str) -> Result<Group> {
    let found = Group::from_name(name)
        .map_err(|error| Error::environment(format!("cannot look up the group '{name}': {error}")))?;
    found.ok_or_else(|| {
        Error::configuration(format!(
            "there is no group '{name}', which machinery-host.yaml names as `socket_group`"
        ))
        .advice("Create it with `groupadd`, or correct the name")
    })
}

fn has(group: &Group, uid: Uid, gid: Gid) -> bool {
    if gid == group.gid {
        return true;
    }
    // Who has no entry is in no group but the one it runs with.
    let Ok(Some(user)) = User::from_uid(uid) else { return false };
    let Ok(name) = CString::new(user.name) else { return false };
    getgrouplist(&name, user.gid).is_ok_and(|groups| groups.contains(&group.gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_that_does_not_exist_is_told() {
        let error = Peers::new(Some("no-such-group-here")).unwrap_err().to_string();
        assert!(error.contains("socket_group") && error.contains("groupadd"), "{error}");
    }

    #[tokio::test]
    async fn the_own_user_is_admitted() {
        let (one, _other) = UnixStream::pair().unwrap();
        assert_eq!(Peers::new(None).unwrap().admit(&one).await, Ok(()));
    }

    #[test]
    fn root_is_in_its_own_group() {
        let root = Group::from_gid(Gid::from_raw(0)).unwrap().unwrap();
        assert!(has(&root, Uid::from_raw(0), Gid::from_raw(12345)));
        assert!(!has(&root, Uid::from_raw(54321), Gid::from_raw(54321)));
    }
}
