//! The console of a run: QEMU's VNC server, which listens nowhere.
//!
//! ```text
//! viewer ─ host ─ one end of a socketpair ═ the other end ─ getfd, add_client ─▶ QEMU's VNC server
//! ```
//!
//! Only the plugin adds viewers, by the monitor. So the jail opens nothing for a console, and a QEMU that is adopted has
//! it as well. Source: `qmp_add_client` in QEMU's monitor/qmp-cmds.c, `vnc_display_add_client` in its ui/vnc.c.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use machinery::{Deadline, Error, Result};
use qapi::qmp;

use crate::run::Run;

/// Connects a viewer to the VNC server of the run, without authentication.
///
/// # Errors
/// The run has no VNC server, or QEMU ends or does not answer.
pub fn connect(run: &Run, deadline: Deadline) -> Result<OwnedFd> {
    // Without a server, QEMU keeps the viewer's socket open and never answers there.
    let servers = run.execute(&qmp::query_vnc_servers {}, deadline)?;
    if servers.as_array().is_none_or(Vec::is_empty) {
        return Err(Error::not_now("this run was started without a console")
            .advice("Stop the machine, and start it again with `console: true`"));
    }
    let no_pair = |error: io::Error| Error::environment(format!("cannot make a pair of sockets: {error}"));
    let (viewer, server) = UnixStream::pair().map_err(no_pair)?;
    let fdname = run.qmp().pass(server.as_fd(), true, deadline)?;
    drop(server);
    let add = qmp::add_client {
        protocol: "vnc".to_owned(),
        fdname: fdname.clone(),
        skipauth: Some(true),
        tls: None,
    };
    match run.execute(&add, deadline) {
        Ok(_) => Ok(viewer.into()),
        Err(error) => {
            // A QEMU that has taken the socket has no socket of that name any more.
            let _ = run.execute(&qmp::closefd { fdname }, deadline);
            Err(error)
        }
    }
}
